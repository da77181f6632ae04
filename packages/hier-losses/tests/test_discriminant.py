"""TreeLDA against the dense joint Gaussian, hand-computed numbers, sklearn's LDA, and itself in another order."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch

from hier_losses import Taxonomy, decoding, match_taxonomies
from hier_losses._walk import Walk
from hier_losses.discriminant import TreeLDA
from hier_losses.functional import subtree_sum

GOLDEN_PATHS = [("A", "a1"), ("A", "a2", "x"), ("A", "a2", "y"), ("B", "b"), ("C",)]
GOLDEN = {
    "C": [(0, 4, 1), (2, 4, 1)],
    "a1": [(1, 0, 0)],
    "b": [(-3, 0, 2), (-3, 3, 2), (-3, 0, -1)],
    "x": [(2, 1, -1), (4, 1, 1)],
}


def golden(v=(2.0, 1.0, 0.5), **settings):
    tax = Taxonomy.from_paths(GOLDEN_PATHS)
    features = torch.tensor([row for rows in GOLDEN.values() for row in rows], dtype=torch.float64)
    target = tax.indices([name for name, rows in GOLDEN.items() for _ in rows])
    return TreeLDA(tax, v=v, covariance=torch.eye(3), **settings).fit(features, target), tax


def draw(tax, seed, dim=5, most=4, empty=0.3):
    """Pictures of the leaves of a tree, some leaves without any, each at least one with two."""
    rng = np.random.default_rng(seed)
    count = np.where(rng.random(tax.num_leaves) < empty, 0, rng.integers(1, most + 1, tax.num_leaves))
    count[rng.integers(tax.num_leaves)] = max(most, 2)
    parent, mean = tax.parent.tolist(), []
    for up in parent:
        mean.append((mean[up] if up >= 0 else np.zeros(dim)) + rng.normal(size=dim))
    target = np.repeat(tax.leaf.numpy(), count)
    target = target[rng.permutation(len(target))]
    features = np.stack([mean[v] for v in target]) + rng.normal(size=(len(target), dim)) * rng.uniform(0.5, 2, dim)
    return torch.from_numpy(features), torch.from_numpy(target)


class Dense:
    """The joint Gaussian of all node means and pictures, one axis after whitening, from matrices over all of them."""

    def __init__(self, tax, features, target, v, covariance):
        self.x, self.s, self.target = features.numpy(), covariance.numpy(), target.numpy()
        number, parent, depth = tax.num_nodes, tax.parent.tolist(), tax.depth.tolist()
        precision = np.zeros((number + 1, number + 1))  # the root is the last
        for node, up in enumerate(parent):
            edge = np.zeros(number + 1)
            edge[node], edge[up] = 1, -1
            precision += np.outer(edge, edge) / v[depth[node] - 1]
        right = np.zeros((number + 1, features.shape[1]))
        for node, row in zip(self.target, self.x, strict=True):
            precision[node, node] += 1
            right[node] += row
        self.cov = np.linalg.inv(precision)
        self.mean = self.cov @ right
        self.parent, self.depth, self.v = parent, depth, v
        self.ancestors = [set(path[path >= 0].tolist()) for path in tax.paths]

    def moments(self, known):
        """E |mu_c - mu_parent|^2 / d in units of S, averaged over the known nodes of each level."""
        inverse = np.linalg.inv(self.s)
        found = [[] for _ in self.v]
        for node in np.flatnonzero(known):
            up = self.parent[node]
            step = self.mean[node] - self.mean[up]
            rest = self.cov[node, node] + self.cov[up, up] - 2 * self.cov[node, up]
            found[self.depth[node] - 1].append(step @ inverse @ step / len(step) + rest)
        return [np.mean(rows) if rows else self.v[level] for level, rows in enumerate(found)]

    def log_likelihood(self):
        """The generalised least-squares form of the restricted likelihood, pictures times axes at once."""
        n, d = self.x.shape
        shared = np.array(
            [[sum(self.v[self.depth[u] - 1] for u in self.ancestors[a] & self.ancestors[b]) for b in self.target] for a in self.target]
        )  # fmt: skip
        cov = np.kron(shared + np.eye(n), self.s)
        design = np.kron(np.ones((n, 1)), np.eye(d))
        inverse = np.linalg.inv(cov)
        middle = design.T @ inverse @ design
        y = self.x.reshape(-1)
        inner = inverse - inverse @ design @ np.linalg.inv(middle) @ design.T @ inverse
        logs = np.linalg.slogdet(cov)[1] + np.linalg.slogdet(middle)[1]
        return -0.5 * ((n - 1) * d * math.log(2 * math.pi) + logs + y @ inner @ y)


def test_golden(close):
    model, tax = golden()
    mean, spread = model.posterior()
    means = {
        "A": (1.387097, 1, 0.225806), "B": (-1.735484, 1.4, 0.870968), "a2": (2.193548, 1, 0.112903),
        "C": (0.832258, 3.6, 0.935484), "a1": (1.193548, 0.5, 0.112903), "b": (-2.683871, 1.1, 0.967742),
        "x": (2.596774, 1, 0.056452), "y": (2.193548, 1, 0.112903),
    }  # fmt: skip
    spreads = {"A": 0.774194, "B": 0.954839, "a2": 0.693548, "C": 0.438710, "a1": 0.693548, "b": 0.309677}
    spreads |= {"x": 0.423387, "y": 1.193548}
    close(mean[tax.indices(means)], list(means.values()), atol=5e-7)
    close(spread[tax.indices(spreads)], list(spreads.values()), atol=5e-7)
    query = torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float64)
    given = {"C": -6.429804, "a1": -3.816640, "b": -11.898437, "x": -3.412597, "y": -3.946541}
    after = {"C": -3.851441, "a1": -1.238276, "b": -9.320073, "x": -0.834233, "y": -1.368177}
    nodes = tax.indices(given)
    close(model.log_likelihood(query)[0, tax.leaf_index[nodes]], list(given.values()), atol=5e-7)
    close(model.log_prob(query, include_empty=True)[0, nodes], list(after.values()), atol=5e-7)
    close(model.restricted_log_likelihood(), -43.248138, atol=5e-7)
    once, _ = model._whitened_walk().em_step(model.v)
    close(once, [2.174679, 0.942745, 0.478646], atol=5e-7)
    close(golden(once)[0].restricted_log_likelihood(), -43.200654, atol=5e-7)


@pytest.mark.parametrize("block", range(8))
def test_dense_joint_gaussian(random_tree, close, block):
    for seed in range(25 * block, 25 * block + 25):
        tax = random_tree(seed, 3 + seed % 17)
        features, target = draw(tax, seed, dim=3, most=1 + seed % 4)
        rng = np.random.default_rng(seed)
        v = rng.uniform(0.05, 3, tax.num_levels)
        root = rng.normal(size=(3, 3))
        covariance = torch.from_numpy(root @ root.T + 0.3 * np.eye(3))
        model = TreeLDA(tax, v=v.tolist(), covariance=covariance).fit(features, target)
        dense = Dense(tax, features, target, v, covariance)
        mean, spread = model.posterior()
        close(mean, dense.mean[:-1], rtol=1e-10, atol=1e-10)
        close(spread, np.diag(dense.cov)[:-1].copy(), rtol=1e-10)
        close(model.restricted_log_likelihood(), dense.log_likelihood(), rtol=1e-10, atol=1e-9)
        known = subtree_sum(torch.zeros(tax.num_nodes).index_add(0, target, torch.ones(len(target))), tax) > 0
        close(model._whitened_walk().em_step(model.v)[0], dense.moments(known.numpy()), rtol=1e-10)


@pytest.mark.parametrize("seed", range(10))
def test_em_climbs_and_settles(random_tree, seed):
    tax = random_tree(seed, 60)
    features, target = draw(tax, seed)
    model = TreeLDA(tax).fit(features, target)
    walk = model._whitened_walk()
    v, last = torch.ones(tax.num_levels, dtype=torch.float64), -math.inf
    for _ in range(30):
        v, value = walk.em_step(v)
        assert value >= last - 1e-9
        last = value
    best = float(walk.log_likelihood(model.v))
    assert best >= float(walk.log_likelihood(v)) - 1e-7
    # A maximum: no single v does better when it moves.
    for level in range(tax.num_levels):
        for factor in (0.9, 1.1):
            other = model.v.clone()
            other[level] *= factor
            assert best >= float(walk.log_likelihood(other)) - 1e-6


@pytest.mark.parametrize("star", [False, True])
@pytest.mark.parametrize("pieces", [2, 7, "one by one"])
def test_any_split_gives_the_same_model(random_tree, close, star, pieces):
    tax = random_tree(3, 25)
    features, target = draw(tax, 3)
    whole = TreeLDA(tax, star=star).fit(features, target)
    parts = TreeLDA(tax, star=star)
    for rows in torch.arange(len(target)).tensor_split(len(target) if pieces == "one by one" else pieces):
        parts.partial_fit(features[rows], target[rows])
    parts.partial_fit(features[:0], target[:0])
    for name in ("count", "mean", "scatter", "spare"):
        close(getattr(parts, name), getattr(whole, name), rtol=1e-10, atol=1e-10)
    close(parts.v, whole.v, rtol=1e-4, atol=1e-7)
    close(parts.log_prob(features), whole.log_prob(features), rtol=1e-4, atol=1e-4)


def test_a_new_picture_changes_what_was_predicted(random_tree):
    tax = random_tree(4, 25)
    features, target = draw(tax, 4)
    model = TreeLDA(tax).fit(features, target)
    before = model.log_prob(features)
    model.partial_fit(features[:1] + 3, target[:1])
    assert not torch.equal(model.log_prob(features), before)


def test_moved_subtrees_and_new_classes_are_exact(close):
    old = Taxonomy.from_paths([("a", "x"), ("a", "y"), ("b", "p", "q"), ("b", "p", "r"), ("c",)])
    new = Taxonomy.from_paths([("a", "x"), ("a", "p", "q"), ("a", "p", "r"), ("b", "y"), ("b", "new"), ("c",)])
    features, target = draw(old, 0, empty=0)
    model = TreeLDA(old).fit(features, target)
    update = model.update_taxonomy(new)
    fresh = TreeLDA(new).fit(features, update.old_to_new[target])
    for name in ("count", "mean", "scatter", "spare"):
        close(getattr(model, name), getattr(fresh, name), rtol=1e-12)
    close(model.log_prob(features), fresh.log_prob(features), rtol=1e-10)
    assert model.log_prob(features)[:, new.index("new")].isneginf().all()
    more = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    goal = torch.full((3,), new.index("new"))
    model.partial_fit(more, goal)
    fresh = TreeLDA(new).fit(torch.cat([features, more]), torch.cat([update.old_to_new[target], goal]))
    close(model.log_prob(features), fresh.log_prob(features), rtol=1e-9)


def test_removed_classes_leave_their_spread(close):
    tax = Taxonomy.from_paths([("a", "x"), ("a", "y"), ("b", "z"), ("b", "w")])
    features, target = draw(tax, 1, empty=0)
    model = TreeLDA(tax).fit(features, target)
    update = model.update_taxonomy(tax.prune([tax.index("z")]))
    kept = update.old_to_new[target] >= 0
    fresh = TreeLDA(update.taxonomy).fit(features[kept], update.old_to_new[target[kept]])
    close(model.count, fresh.count)
    close(model.mean, fresh.mean)
    assert model.spare > fresh.spare
    assert model.scatter.trace() > fresh.scatter.trace()
    assert model.log_prob(features).shape == (len(features), 5)


def test_a_leaf_with_pictures_stays_a_leaf():
    model, tax = golden()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match="update must keep leaves with pictures as leaves, got children for 'x' with 2"
    ):
        model.update_taxonomy(tax.extend([("A", "a2", "x", "deeper")]))
    with pytest.raises(ValueError, match="update must start from the model's 8 nodes, got 1"):
        model.update_taxonomy(Taxonomy.from_paths([("q",)]).extend([("r",)]))
    with pytest.raises(ValueError, match="v must hold 4 finite numbers"):
        model.update_taxonomy(tax.extend([("A", "a2", "y", "deeper")]))
    assert model.tax is tax
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    free = TreeLDA(tax).fit(torch.randn(6, 3), tax.indices(["x", "x", "b", "b", "C", "C"]))
    free.update_taxonomy(tax.extend([("A", "a2", "y", "deeper")]))
    assert free.log_prob(torch.randn(2, 3)).shape == (2, 9)


def lda_peer(features, target, shrinkage):
    """Log posteriors of plain LDA with equal priors, from numpy alone."""
    x, y = features.numpy(), target.numpy()
    classes = np.unique(y)
    means = np.stack([x[y == c].mean(0) for c in classes])
    rest = np.concatenate([x[y == c] - x[y == c].mean(0) for c in classes])
    within = rest.T @ rest / (len(x) - len(classes))
    cov = (1 - shrinkage) * within + shrinkage * np.trace(within) / x.shape[1] * np.eye(x.shape[1])
    apart = x[:, None] - means
    score = -0.5 * np.einsum("bkd,de,bke->bk", apart, np.linalg.inv(cov), apart)
    return score - np.logaddexp.reduce(score, 1)[:, None]


@pytest.mark.parametrize("dim", [4, 60])
def test_far_steps_give_plain_lda(random_tree, close, dim):
    tax = random_tree(5, 20)
    features, target = draw(tax, 5, dim=dim)
    far = [1e9] * tax.num_levels
    model = TreeLDA(tax, shrinkage=0.3, plug_in=True, v=far).fit(features, target)
    classes = target.unique()
    close(model.log_prob(features)[:, classes], lda_peer(features, target, 0.3), rtol=1e-5, atol=1e-5)


def test_sklearn(random_tree, close):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peers = pytest.importorskip("sklearn.discriminant_analysis")
    tax = random_tree(6, 20)
    features, target = draw(tax, 6, dim=6)
    model = TreeLDA(tax, shrinkage=0.4, plug_in=True, v=[1e9] * tax.num_levels)
    model.fit(features, target)
    classes, number = target.unique(return_counts=True)
    # Theirs divides the scatter by N: scale our covariance to it.
    scaled = model._spread_within() * model.spare / len(target)
    model = TreeLDA(tax, plug_in=True, v=[1e9] * tax.num_levels, covariance=scaled).fit(features, target)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = peers.LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.4).fit(features.numpy(), target.numpy())
    # Theirs shrinks features scaled to unit variance; undo it by comparing with a common covariance.
    peer.covariance_ = scaled.numpy()
    peer.coef_ = np.linalg.lstsq(scaled.numpy(), peer.means_.T, rcond=None)[0].T
    peer.intercept_ = -0.5 * np.diag(peer.means_ @ peer.coef_.T) + np.log(peer.priors_)
    theirs = torch.from_numpy(peer.decision_function(features.numpy())) - (number / len(target)).log()
    close(model.log_prob(features)[:, classes], theirs.log_softmax(1), rtol=1e-6, atol=1e-6)


def test_star_is_the_tree_without_levels(random_tree, close):
    tax = random_tree(7, 25)
    features, target = draw(tax, 7)
    flat = Taxonomy([str(k) for k in range(tax.num_leaves)], [-1] * tax.num_leaves)
    star, tree = TreeLDA(tax, star=True).fit(features, target), TreeLDA(flat).fit(features, tax.leaf_index[target])
    close(star.v, tree.v)
    close(star.log_prob(features)[:, tax.leaf], tree.log_prob(features))
    assert star.posterior()[0].shape == (tax.num_leaves, 5)


def test_upper_nodes_are_sums_and_decoders_apply(random_tree, close):
    tax = random_tree(8, 30)
    features, target = draw(tax, 8)
    found = TreeLDA(tax).fit(features, target).log_prob(features.float(), temperature=5.0)
    assert found.dtype == torch.float32
    assert (found <= 0).all()
    p = found.exp().double()
    for node in range(tax.num_nodes):
        below = (tax.paths[tax.leaf] == node).any(1)
        close(p[:, node], p[:, tax.leaf[below]].sum(1), rtol=1e-4, atol=1e-6)
    seen = target.unique()
    for decoder in ("bottom_up", "level_argmax", "top_down", "joint_path", "crm"):
        paths = getattr(decoding, decoder)(found, tax)
        last = paths.gather(1, (paths >= 0).sum(1, keepdim=True) - 1).squeeze(1)
        if decoder != "level_argmax":
            assert torch.isin(last, seen).all(), decoder
    assert (decoding.threshold(found, tax, 0.5)[:, 0] >= 0).any()
    assert (decoding.bottom_up(found, tax) == decoding.bottom_up(found[:, tax.leaf], tax)).all()


def test_prior_and_temperature(random_tree, close):
    tax = random_tree(9, 20)
    features, target = draw(tax, 9, empty=0)
    model = TreeLDA(tax).fit(features, target)
    prior = torch.rand(tax.num_leaves, generator=torch.Generator().manual_seed(0)).double() + 0.1
    expected = (model.log_likelihood(features) / 3 + prior.log()).log_softmax(1)
    close(model.log_prob(features, 3.0, prior=prior)[:, tax.leaf], expected)


def test_unidentified_levels_start_equal_and_are_reported():
    tax = Taxonomy.from_paths([("a", "b", "x"), ("c", "d", "y"), ("e", "f", "z")])
    features, target = draw(tax, 0, empty=0)
    model = TreeLDA(tax).fit(features, target)
    assert model.unidentified == ((1, 2, 3),)
    torch.testing.assert_close(model.v, model.v.mean().expand(3), rtol=0.2, atol=1e-6)
    lone = Taxonomy.from_paths([("a", "x"), ("a", "y"), ("b", "z")])
    only_a = TreeLDA(lone).fit(torch.randn(6, 2), lone.indices(["x", "x", "x", "y", "y", "y"]))
    assert only_a.unidentified == ((0, 1),)
    assert only_a.v[0] == pytest.approx(1)
    one = TreeLDA(lone).fit(torch.randn(3, 2), lone.indices(["x", "x", "x"]))
    assert one.unidentified == ((0, 1, 2),)
    both = Taxonomy.from_paths([("a", "x"), ("b", "y", "z"), ("b", "w"), ("c",)])
    features, target = draw(both, 0, empty=0)
    assert TreeLDA(both).fit(features, target).unidentified == ()


def test_chains_and_hard_data(random_tree):
    chain = Taxonomy.from_paths([("a", "b", "c", "d")])
    model = TreeLDA(chain).fit(torch.randn(4, 3), torch.full((4,), 3))
    assert torch.equal(model.log_prob(torch.randn(2, 3)), torch.zeros(2, 4))
    tax = random_tree(10, 20)
    features, target = draw(tax, 10, dim=3)
    wide = torch.cat([features, torch.ones(len(features), 40)], 1)  # d > n, constant features
    assert TreeLDA(tax).fit(wide, target).log_prob(wide).isfinite().any()
    same = TreeLDA(tax).fit(features * 0 + torch.randn(len(features), 3).double(), target)  # no classes at all
    assert (same.v < 1).all()
    near, far = TreeLDA(tax).fit(features, target), TreeLDA(tax).fit(features + 1e6, target)
    torch.testing.assert_close(far.log_prob(features + 1e6), near.log_prob(features), rtol=1e-3, atol=1e-3)


def test_state_round_trip(random_tree, tmp_path):
    tax = random_tree(11, 20)
    features, target = draw(tax, 11)
    model = TreeLDA(tax).fit(features, target)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = TreeLDA(tax)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(other.log_prob(features), model.log_prob(features))
    other.partial_fit(features[:2], target[:2])
    assert other.count.sum() == model.count.sum() + 2
    wrapped = torch.nn.Sequential(TreeLDA(tax))
    wrapped.load_state_dict({f"0.{k}": v for k, v in model.state_dict().items()})
    assert torch.equal(wrapped(features), model.log_prob(features))
    assert torch.equal(copy.deepcopy(model).half().log_prob(features), model.log_prob(features))
    with pytest.raises(RuntimeError, match="size mismatch"):
        TreeLDA(Taxonomy.from_paths([("a",), ("b",)])).load_state_dict(model.state_dict())


def test_gradients_reach_the_features(random_tree):
    tax = random_tree(12, 12)
    features, target = draw(tax, 12, dim=3, empty=0)
    model = TreeLDA(tax).fit(features, target)
    assert torch.autograd.gradcheck(lambda x: model.log_prob(x, 2.0), features[:3].clone().requires_grad_())


def test_small_batches(random_tree):
    tax = random_tree(13, 12)
    features, target = draw(tax, 13)
    model = TreeLDA(tax).fit(features, target)
    assert model.log_prob(features[:0]).shape == (0, tax.num_nodes)
    torch.testing.assert_close(model.log_prob(features[:1]), model.log_prob(features)[:1])
    assert "shrinkage=0.4" in repr(model)


@pytest.mark.compile
def test_compile(random_tree):
    tax = random_tree(14, 20)
    features, target = draw(tax, 14)
    model = TreeLDA(tax).fit(features, target)
    compiled = torch.compile(lambda x: model.log_prob(x, 2.0), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(features), model.log_prob(features, 2.0))


def test_estimation_that_does_not_settle_warns(random_tree):
    tax = random_tree(15, 30)
    features, target = draw(tax, 15)
    with pytest.warns(RuntimeWarning, match="v has not settled to 1e-05 in 1 steps"):
        TreeLDA(tax, max_steps=1).fit(features, target)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shrinkage": 1.5}, r"shrinkage must lie in \[0, 1\], got 1.5"),
        ({"tolerance": 0.0}, "tolerance must lie in"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
        ({"v": [1.0]}, "v must hold 3 finite numbers of at least 0"),
        ({"v": [1.0, -1.0, 1.0]}, "v must hold 3 finite numbers of at least 0"),
        ({"v": [1.0, 1.0], "star": True}, "v must hold 1 finite numbers"),
        ({"covariance": torch.zeros(2, 2)}, "covariance must be symmetric and positive definite"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        TreeLDA(Taxonomy.from_paths(GOLDEN_PATHS), **settings)


def test_data_are_checked():
    model, tax = golden()
    query = torch.randn(2, 3)
    leaves = tax.indices(["x", "x"])
    flat = torch.cat([torch.randn(9, 2), torch.ones(9, 1)], 1)
    for call, message in (
        (lambda: TreeLDA(tax).log_prob(query), "features must hold pictures of some class: fit has seen none"),
        (lambda: TreeLDA(tax).fit(query[:0], leaves[:0]), "fit has seen none"),
        (
            lambda: TreeLDA(tax).fit(query, tax.indices(["x", "a2"])),
            r"target must hold leaves, got inner node 4 \('a2'\) at row 1",
        ),
        (lambda: TreeLDA(tax).fit(query, tax.indices(["x", "C"])), "features must hold two pictures of some class"),
        (lambda: TreeLDA(tax).fit(query[:1].expand(2, 3), leaves), "features must differ within some class"),
        (
            lambda: TreeLDA(tax, shrinkage=0.0).fit(query, leaves),
            "shrinkage must be above 0 for 3 features and 1 degrees",
        ),
        (lambda: TreeLDA(tax, 0.0).fit(flat, leaves[:1].expand(9)), "shrinkage must be above 0 here, got 0.0"),
        (lambda: TreeLDA(tax).fit(query / 0, leaves), "features must be finite, got 2 rows"),
        (lambda: model.partial_fit(torch.randn(2, 4), leaves), r"features must have shape \(batch, 3\), got \(2, 4\)"),
        (lambda: model.log_prob(torch.randn(2, 4)), r"features must have shape \(batch, 3\)"),
        (lambda: model.log_prob(query, 0.0), "temperature must be above 0, got 0.0"),
        (lambda: model.log_prob(query, prior=torch.zeros(5)), "prior must hold 5 weights above 0"),
        (lambda: model.partial_fit(query, torch.tensor([0.0, 1.0])), "target must hold integer node ids"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_matching_is_public(close):
    old = Taxonomy.from_paths([("a", "x"), ("b", "y")])
    assert match_taxonomies(old, Taxonomy.from_paths([("b", "x"), ("b", "y")])).new_to_old.tolist() == [1, 2, 3]


def test_walk_without_pictures_below_a_level_keeps_its_v():
    tax = Taxonomy.from_paths([("a", "x", "deep"), ("b",), ("c",)])
    walk = Walk(tax, torch.tensor([2.0, 3.0, 0.0]).double(), torch.tensor([[0.0], [1.0], [0.0]]).double())
    v, settled = walk.fit(1e-6, 500)
    assert settled
    assert v[1:].tolist() == [1, 1]
