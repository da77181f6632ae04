"""Scores per level, calibration and the report, against loops over samples and classes."""

import json
import math

import pytest
import torch
from torchmetrics import MetricCollection

from hier_losses import decoding
from hier_losses import metrics as M
from hier_losses.path_ops import extend_paths
from hier_losses.probabilities import extended_level
from hier_losses.taxonomy import Taxonomy


def batch(tax, num=60, seed=0, leaves=False):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num, tax.num_nodes, generator=generator)
    pool = tax.leaf if leaves else torch.arange(tax.num_nodes)
    return logits, pool[torch.randint(len(pool), (num,), generator=generator)]


def pairs(tax, paths, target, level):
    """Predicted and true class of each sample known on a level; None where the prediction ends above it."""
    found = []
    for p, y in zip(extend_paths(paths, tax)[:, level].tolist(), target, strict=True):
        g = extend_paths(tax.paths[y], tax)[level].item()
        if g >= 0:
            classes = extended_level(tax, level + 1).tolist()
            found.append((p if p in classes else None, g))
    return found


def slow_prf(known):
    rows = []
    for c in sorted({x for pair in known for x in pair if x is not None}):
        tp = sum(p == g == c for p, g in known)
        predicted, true = sum(p == c for p, _ in known), sum(g == c for _, g in known)
        p, r = tp / predicted if predicted else 0.0, tp / true if true else 0.0
        rows.append((p, r, 2 * p * r / (p + r) if p + r else 0.0))
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)] if rows else [math.nan] * 3


def slow_ece(tax, logits, target, level, bins):
    cells = {}
    nodes = extended_level(tax, level + 1).tolist()
    for z, y in zip(logits.double(), target, strict=True):
        g = extend_paths(tax.paths[y], tax)[level].item()
        if g < 0:
            continue
        p = [math.exp(z[v]) for v in nodes]
        best = max(range(len(nodes)), key=p.__getitem__)
        conf = p[best] / sum(p)
        cells.setdefault(min(int(conf * bins), bins - 1), []).append((conf, nodes[best] == g))
    total = sum(map(len, cells.values()))
    gap = sum(abs(sum(r for _, r in cell) - sum(c for c, _ in cell)) for cell in cells.values())
    return gap / total if total else math.nan


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_levels_against_loops(seed, random_tree, close):
    tax = random_tree(seed)
    logits, target = batch(tax, seed=seed)
    for paths in (decoding.level_argmax(logits, tax), decoding.threshold(logits, tax, 0.3)):
        slow = [slow_prf(pairs(tax, paths, target, level)) for level in range(tax.num_levels)]
        found = M.level_prf(paths, target, tax)
        for column, name in enumerate(("precision", "recall", "f1")):
            close(found[name], [row[column] for row in slow])
    slow = [slow_ece(tax, logits, target, level, 7) for level in range(tax.num_levels)]
    close(M.level_calibration(logits, target, tax, 7), slow)


@pytest.mark.parametrize("k", [1, 3])
def test_top_k(k, t11, close):
    logits, target = batch(t11)
    ranked = decoding.top_k_paths(logits, t11, 4)
    best = logits[:, t11.leaf].argsort(1, descending=True)[:, :k].tolist()
    hits = [y in t11.leaf[row] for row, y in zip(best, target.tolist(), strict=True) if t11.leaf_index[y] >= 0]
    close(M.top_k_accuracy(ranked, target, t11, k), sum(hits) / len(hits))
    close(M.top_k_accuracy(ranked, target, t11, 1), M.leaf_accuracy(ranked[:, 0], target, t11))
    with pytest.raises(ValueError, match="at least k=5 ranked paths"):
        M.top_k_accuracy(ranked, target, t11, 5)


def test_batches_add_up_and_log_as_scalars(t11, close):
    logits, target = batch(t11)
    target[::7] = -100
    together = MetricCollection(
        {
            "levels": M.LevelAccuracy(t11, as_dict=True),
            "prf": M.LevelPRF(t11),
            "ece": M.LevelCalibration(t11, num_bins=5),
            "top": M.TopKAccuracy(t11, k=3),
        },
        prefix="val/",
    )
    for part in torch.arange(60).split(17):
        ranked = decoding.top_k_paths(logits[part], t11, 3)
        together.update(pred_paths=ranked, logits=logits[part], target=target[part])
    found = together.compute()
    assert all(name.startswith("val/") and value.ndim == 0 for name, value in found.items())
    assert {"val/level_accuracy_1", "val/precision_3", "val/recall_1", "val/f1_2", "val/ece_3"} < set(found)
    paths = decoding.top_k_paths(logits, t11, 3)
    close([found[f"val/level_accuracy_{i}"] for i in (1, 2, 3)], M.level_accuracy(paths, target, t11))
    close([found[f"val/f1_{i}"] for i in (1, 2, 3)], M.level_prf(paths, target, t11)["f1"])
    close([found[f"val/ece_{i}"] for i in (1, 2, 3)], M.level_calibration(logits, target, t11, 5))
    close(found["val/top"], M.top_k_accuracy(paths, target, t11, 3))


def test_report(t11, close):
    logits, target = batch(t11)
    target[5] = -100
    found = M.report(logits, target, t11, decoder="level_argmax", top_k=(2, 100))
    kept = target != -100
    paths = decoding.level_argmax(logits, t11)
    assert found.num_samples == 59
    close(found.scores["tice"], M.tice(paths[kept], t11))
    close(found.scores["full_path_accuracy"], M.full_path_accuracy(paths, target, t11))
    close(found.scores["hca"], M.hca(logits, target, t11))
    close(found.scores["top_2_accuracy"], M.top_k_accuracy(decoding.top_k_paths(logits, t11, 2), target, t11, 2))
    assert "top_100_accuracy" not in found.scores
    close([row.accuracy for row in found.levels], M.level_accuracy(paths, target, t11))
    close([row.f1 for row in found.levels], M.level_prf(paths, target, t11)["f1"])
    close([row.ece for row in found.levels], M.level_calibration(logits, target, t11))
    for row in found.classes:
        known = pairs(t11, paths[kept], target[kept], row.level - 1)
        hits = sum(p == g == row.node for p, g in known)
        assert row.support == sum(g == row.node for _, g in known)
        assert row.predicted == sum(p == row.node for p, _ in known)
        assert row.precision == pytest.approx(hits / max(row.predicted, 1))
        assert row.recall == pytest.approx(hits / max(row.support, 1))
        assert row.name == " > ".join(t11.path_of(row.node))
    again = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert again["levels"][0]["level"] == 1
    assert again["classes"][0]["name"] == "a"
    text = str(found)
    assert "59 samples, decoder level_argmax" in text
    assert "a > a1" in text


@pytest.mark.parametrize("num", [0, 1])
def test_small_reports(num, t11):
    logits, target = batch(t11, num, leaves=True)
    found = M.report(logits, target, t11)
    assert found.num_samples == num
    json.dumps(found.to_dict(), allow_nan=False)
    assert str(found)
    assert found.scores["full_path_accuracy"] >= 0 or num == 0


def test_plots(t11):
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot as plt

    logits, target = batch(t11)
    figure, axes = M.report(logits, target, t11).plot()
    assert len(axes.lines) == 3
    assert M.report(logits, target, t11).plot(axes)[0] is figure
    paths = decoding.joint_path(logits, t11)
    metrics = [M.LevelAccuracy(t11), M.LevelAccuracy(t11, as_dict=True), M.LevelPRF(t11), M.TopKAccuracy(t11, k=1)]
    metrics += [M.FullPathAccuracy(t11), M.LCAMetrics(t11), M.HierarchicalPRF(t11)]
    for metric in metrics:
        metric.update(paths, target)
        assert len(metric.plot()) == 2
    ece = M.LevelCalibration(t11)
    ece.update(logits, target)
    assert len(ece.plot()) == 2
    plt.close("all")


def test_bad_settings(t11):
    logits, target = batch(t11, 2)
    with pytest.raises(ValueError, match="decoder must be one of 'joint_path'"):
        M.report(logits, target, t11, decoder="best")
    with pytest.raises(ValueError, match="num_bins must be at least 1, got 0"):
        M.LevelCalibration(t11, num_bins=0)
    with pytest.raises(ValueError, match="num_bins must be at least 1, got 0"):
        M.level_calibration(logits, target, t11, 0)


def test_report_of_a_perfect_classifier():
    tax = Taxonomy.synthetic((3, 6, 12), seed=0)
    target = tax.leaf
    logits = 30 * (tax.paths[target][:, :, None] == torch.arange(tax.num_nodes)).any(1).float()
    found = M.report(logits, target, tax)
    assert {found.scores[n] for n in ("leaf_accuracy", "full_path_accuracy", "hca", "top_5_accuracy")} == {1.0}
    assert all(row.f1 == 1.0 and row.ece < 1e-6 for row in found.levels)
    assert len(found.classes) == tax.num_nodes


@pytest.mark.filterwarnings("ignore")
def test_lightning_logs_a_value_per_level(t11, tmp_path, close):
    """`log_dict` takes the metric's values, and Lightning resets the metric after each epoch."""
    lightning = pytest.importorskip("lightning.pytorch")
    logits, target = batch(t11)

    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.accuracy = M.LevelAccuracy(t11, as_dict=True)
            self.whole = M.FullPathAccuracy(t11)

        def validation_step(self, rows, _):
            scores, node = rows
            paths = decoding.joint_path(scores, t11)
            self.accuracy.update(paths, node)
            self.whole.update(paths, node)
            self.log("val/path", self.whole)

        def on_validation_epoch_end(self):
            self.log_dict(self.accuracy.compute())
            self.accuracy.reset()

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(logits, target), batch_size=17)
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    (found,) = trainer.validate(Model(), data, verbose=False)
    paths = decoding.joint_path(logits, t11)
    expected = M.level_accuracy(paths, target, t11)
    close([torch.tensor(found[f"level_accuracy_{i}"]).double() for i in (1, 2, 3)], expected, rtol=1e-6, atol=1e-6)
    assert found["val/path"] == pytest.approx(float(M.full_path_accuracy(paths, target, t11)))
