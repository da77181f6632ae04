"""Behaviour as torchmetrics metrics: collections, processes, devices, precision, pickling, plots."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torchmetrics import MetricCollection

from hier_losses import metrics as M
from hier_losses.decoding import level_argmax, top_k_paths
from hier_losses.path_ops import paths_of
from hier_losses.taxonomy import Taxonomy
from hier_losses.treecuts import sample_cuts


def path_metrics(tax):
    return {
        "fpa": M.FullPathAccuracy(tax),
        "tice": M.TICE(tax),
        "levels": M.LevelAccuracy(tax),
        "leaf": M.LeafAccuracy(tax),
        "leaf_macro": M.LeafAccuracy(tax, "macro"),
        "wap": M.WeightedAveragePrecision(tax),
        "wap_accuracy": M.WeightedAveragePrecision(tax, "accuracy"),
        "ms": M.MistakeSeverity(tax),
        "ahd1": M.AverageHierarchicalDistance(tax),
        "ahd2": M.AverageHierarchicalDistance(tax, 2),
        "hp2": M.HierarchicalPrecisionAtK(tax, 2),
        "hmap2": M.HierarchicalPrecisionAtK(tax, 2, over_ranks=True),
        "edges": M.EdgeDistance(tax),
        "prf": M.HierarchicalPRF(tax),
        "prf_macro": M.HierarchicalPRF(tax, "macro", beta=2.0),
        "lca": M.LCAMetrics(tax),
        "lca_info": M.LCAMetrics(tax, "info"),
    }


def score_metrics(tax):
    cuts = sample_cuts(tax, per_rate=1)
    return {
        "hca": M.HCA(tax),
        "mta": M.MTA(tax, cuts),
        "mta_per_cut": M.MTA(tax, cuts, per_cut=True),
        "violations": M.ViolationRate(tax),
        "violations_margin": M.ViolationRate(tax, 0.5),
    }


def label_metrics(tax):
    return {"auroc": M.NodeAUROC(tax), "auroc_bins": M.NodeAUROC(tax, num_bins=16)}


def small_tax():
    return Taxonomy.from_paths(
        [("a", "a1", "x"), ("a", "a1", "y"), ("a", "a2"), ("b", "b1", "b11"), ("b", "b1", "b12"), ("c",)]
    )


def data(tax, num=40):
    """Dyadic scores, so that sums of ratios are the only rounding."""
    generator = torch.Generator().manual_seed(11)
    logits = torch.randint(-40, 40, (num, tax.num_nodes), generator=generator).float() / 8
    target = torch.randint(tax.num_nodes, (num,), generator=generator)
    ranked = torch.stack([level_argmax(logits, tax), top_k_paths(logits, tax, 2)[:, 1]], 1)
    labels = torch.zeros(num, tax.num_nodes, dtype=torch.bool)
    path = tax.paths[target]
    labels.scatter_(1, path.clamp(min=0), True)
    labels[:, 0] = labels[:, tax.paths[:, 0] == 0].any(1)
    return logits, target, ranked, labels


def consume(tax, picks, batches):
    """Values of all metrics over the samples in `picks`, fed in `batches` pieces (0: no update at all)."""
    logits, target, ranked, labels = data(tax)
    paths, scores = MetricCollection(path_metrics(tax)), MetricCollection(score_metrics(tax))
    several = MetricCollection(label_metrics(tax))
    for part in torch.tensor(picks, dtype=torch.int64).chunk(batches) if batches else ():
        paths.update(pred_paths=ranked[part], target=target[part])
        scores.update(logits=logits[part], target=target[part])
        several.update(logits[part], labels[part])
    return paths.compute() | scores.compute() | several.compute()


SHARES = {
    "uneven": [(list(range(29)), 3), (list(range(29, 40)), 1)],
    "second empty": [(list(range(40)), 2), ([], 0)],
    "first empty": [([], 0), (list(range(40)), 4)],
    "empty batch": [(list(range(40)), 1), ([], 1)],
}


def run_rank(rank, folder):
    """Body of one of the two processes that `two_processes` starts."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    values = {name: consume(small_tax(), *shares[rank]) for name, shares in SHARES.items()}
    torch.save(values, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Values of every metric in each of two gloo processes, for every way of sharing the samples."""
    folder = tmp_path_factory.mktemp("gloo")
    # A test module has no importable name, so it runs as a script instead of through torch.multiprocessing.
    ranks = [subprocess.Popen([sys.executable, "-W", "ignore", __file__, str(rank), str(folder)]) for rank in range(2)]
    try:
        codes = [rank.wait(timeout=300) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", SHARES)
def test_two_processes_equal_one(name, two_processes):
    single = consume(small_tax(), list(range(40)), 1)
    for values in two_processes:
        assert values[name].keys() == single.keys()
        for key, value in values[name].items():
            # Counts are exact; the order of float64 additions may change the last digit.
            torch.testing.assert_close(value, single[key], rtol=1e-14, atol=0, msg=lambda m, k=key: f"{k}: {m}")


def test_states_are_integer_sums_where_the_metric_counts(t11):
    ratios = {"hp2", "hmap2", "prf_macro", "lca", "lca_info"}
    for name, metric in (path_metrics(t11) | score_metrics(t11)).items():
        kinds = {getattr(metric, state).dtype for state in metric._defaults}
        assert kinds == ({torch.int64, torch.float64} if name in ratios else {torch.int64}), name
        assert all("sum" in reduction.__name__ for reduction in metric._reductions.values())


def test_collection_equals_the_functions(t11):
    logits, target, ranked, _ = data(t11)
    cuts = sample_cuts(t11, per_rate=1)
    metrics = MetricCollection(path_metrics(t11) | score_metrics(t11))
    for part in torch.arange(40).split(7):
        metrics.update(pred_paths=ranked[part], logits=logits[part], target=target[part])
    values = metrics.compute()
    first = ranked[:, 0]
    expected = {
        "fpa": M.full_path_accuracy(first, target, t11),
        "tice": M.tice(first, t11),
        "leaf_macro": M.leaf_accuracy(first, target, t11, "macro"),
        "wap": M.weighted_average_precision(first, target, t11),
        "ms": M.mistake_severity(first, target, t11),
        "ahd1": M.average_hierarchical_distance(first, target, t11),
        "ahd2": M.average_hierarchical_distance(ranked, target, t11, 2),
        "hmap2": M.hierarchical_precision_at_k(ranked, target, t11, 2, over_ranks=True),
        "edges": M.edge_distance(first, target, t11),
        "hca": M.hca(logits, target, t11),
        "mta": M.mta(logits, target, t11, cuts),
        "violations": M.violation_rate(logits, t11),
        "violations_margin": M.violation_rate(logits, t11, 0.5),
    }
    for name, value in expected.items():
        torch.testing.assert_close(values[name], value, rtol=1e-13, atol=0)
    # Two metrics of one kind share the names of their results; torchmetrics then puts the metric's name in front.
    torch.testing.assert_close(values["prf_hierarchical_f"], M.hierarchical_prf(first, target, t11)["hierarchical_f"])
    torch.testing.assert_close(values["lca_info_lca_f1"], M.lca_metrics(first, target, t11, "info")["lca_f1"])
    torch.testing.assert_close(values["levels"], M.level_accuracy(first, target, t11))


def test_metrics_that_agree_at_first_stay_apart(t11):
    """A collection merges metrics with equal states after one batch; ours must never be merged."""
    right = paths_of(torch.tensor([[7, 8], [9, 10]]), t11)
    metrics = MetricCollection(path_metrics(t11))
    metrics.update(right, torch.tensor([7, 9]))
    assert all(len(group) == 1 for group in metrics.compute_groups.values())
    metrics.update(torch.tensor([[[1, 3, 7], [0, 3, 8]]]), torch.tensor([7]))
    values = metrics.compute()
    assert values["fpa"] == pytest.approx(2 / 3)
    assert values["leaf"] == 1
    assert values["tice"] == pytest.approx(1 / 3)
    pair = {"a": M.ViolationRate(t11), "b": M.ViolationRate(t11, 0.5)}
    metrics = MetricCollection(pair)
    metrics.update(torch.zeros(1, 11))
    jump = torch.zeros(1, 11)
    jump[0, 3] = 0.25
    metrics.update(jump)
    assert metrics.compute()["a"] > 0
    assert metrics.compute()["b"] == 0


def test_two_taxonomies_stay_apart(t11):
    # b1 below a: the same names in the same order, only the parents differ.
    rewired = Taxonomy(t11.names, [0 if v == 6 else up for v, up in enumerate(t11.parent.tolist())])
    assert rewired.names == t11.names
    metrics = MetricCollection({"here": M.MistakeSeverity(t11), "there": M.MistakeSeverity(rewired)})
    assert len(MetricCollection({"here": M.HCA(t11), "there": M.HCA(rewired)})) == 2
    metrics.update(paths_of(torch.tensor([2]), t11), torch.tensor([2]))
    assert all(len(group) == 1 for group in metrics.compute_groups.values())


def test_forward_reset_and_clone(t11):
    _, target, ranked, _ = data(t11)
    for name, metric in path_metrics(t11).items():
        batch = metric(ranked[:5], target[:5])
        metric.update(ranked[5:], target[5:])
        whole = metric.compute()
        fresh = metric.clone()
        fresh.reset()
        fresh.update(ranked, target)
        torch.testing.assert_close(fresh.compute(), whole, rtol=1e-13, atol=0, equal_nan=True)
        metric.reset()
        metric.update(ranked[:5], target[:5])
        torch.testing.assert_close(metric.compute(), batch, rtol=1e-13, atol=0, equal_nan=True, msg=name)
        assert fresh.tax is t11


def test_pickle_and_deepcopy(t11):
    logits, target, ranked, labels = data(t11)
    for metric in path_metrics(t11).values():
        metric.update(ranked, target)
        for other in (pickle.loads(pickle.dumps(metric)), copy.deepcopy(metric)):
            torch.testing.assert_close(other.compute(), metric.compute(), equal_nan=True)
    for metric in score_metrics(t11).values():
        metric.update(logits, target)
        torch.testing.assert_close(pickle.loads(pickle.dumps(metric)).compute(), metric.compute())
    for metric in label_metrics(t11).values():
        metric.update(logits, labels)
        torch.testing.assert_close(pickle.loads(pickle.dumps(metric)).compute(), metric.compute())


def test_state_dict_round_trip(t11):
    _, target, ranked, _ = data(t11)
    metric, other = M.HierarchicalPRF(t11, "macro", beta=0.5), M.HierarchicalPRF(t11, "macro", beta=0.5)
    for item in (metric, other):
        item.persistent(True)
    metric.update(ranked, target)
    other.load_state_dict(metric.state_dict())
    other.update(ranked[:0], target[:0])
    torch.testing.assert_close(other.compute(), metric.compute())


def test_casting_a_model_leaves_counts_alone(t11):
    _, target, ranked, _ = data(t11)
    for name, metric in path_metrics(t11).items():
        metric.update(ranked, target)
        before = metric.compute()
        module = torch.nn.ModuleDict({"metric": metric}).half().to("cpu")
        module["metric"]._computed = None
        torch.testing.assert_close(module["metric"].compute(), before, rtol=0, atol=0, equal_nan=True, msg=name)


def test_int32_paths_and_targets(t11):
    _, target, ranked, _ = data(t11)
    for metric in path_metrics(t11).values():
        value = metric(ranked, target)
        other = metric.clone()
        other.reset()
        torch.testing.assert_close(other(ranked.int(), target.int()), value, equal_nan=True)


def test_unchecked_inputs_give_the_same(t11):
    _, target, ranked, _ = data(t11)
    checked, unchecked = M.FullPathAccuracy(t11), M.FullPathAccuracy(t11, validate_args=False)
    assert checked(ranked, target) == unchecked(ranked, target)
    unchecked.update(torch.full((1, 3), 10), torch.tensor([10]))


def test_value_before_any_update(t11):
    for metric in (path_metrics(t11) | score_metrics(t11) | label_metrics(t11)).values():
        with pytest.warns(UserWarning, match="called before the ``update`` method"):
            value = metric.compute()
        values = value.values() if isinstance(value, dict) else [value]
        assert all(v.isnan().all() for v in values)


def test_plots(t11):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    logits, target, ranked, labels = data(t11)
    for metric in path_metrics(t11).values():
        metric.update(ranked, target)
        figure, axis = metric.plot()
        assert figure is not None
        assert axis is not None
        plt.close(figure)
    values = [M.FullPathAccuracy(t11)(ranked[i : i + 5], target[i : i + 5]) for i in range(0, 40, 5)]
    figure, axis = M.FullPathAccuracy(t11).plot(values)
    assert len(axis.lines[0].get_xdata()) == 8
    plt.close(figure)
    auroc = M.NodeAUROC(t11, num_bins=8)
    auroc.update(logits, labels)
    figure, _ = auroc.plot()
    plt.close(figure)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees(t11):
    logits, target, ranked, labels = data(t11)
    for metric in path_metrics(t11).values():
        expected = metric(ranked, target)
        value = copy.deepcopy(metric).to("cuda")
        value.reset()
        torch.testing.assert_close(value(ranked.cuda(), target.cuda()), expected, check_device=False, equal_nan=True)
    for metric in score_metrics(t11).values():
        expected = metric(logits, target)
        value = copy.deepcopy(metric).to("cuda")
        value.reset()
        torch.testing.assert_close(value(logits.cuda(), target.cuda()), expected, check_device=False)
    for metric in label_metrics(t11).values():
        expected = metric(logits, labels)
        value = copy.deepcopy(metric).to("cuda")
        value.reset()
        torch.testing.assert_close(value(logits.cuda(), labels.cuda()), expected, check_device=False)
    there = M.WeightedAveragePrecision(t11.to("cuda"))
    assert all(getattr(there, name).device.type == "cpu" for name in there._defaults)


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), sys.argv[2])
