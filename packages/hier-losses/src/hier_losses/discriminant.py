"""Linear discriminant analysis whose class means are shrunk along the tree, in closed form and without training.

Class k has pictures x ~ N(mu_k, S), and the class means walk down the tree in Gaussian steps, mu_child ~ N(mu_parent, v_l S)
(Felsenstein, 1985, "Phylogenies and the Comparative Method"): classes with few pictures borrow from those close by. Pooled
covariance: Fisher, 1936; its shrinkage: Friedman, 1989, "Regularized Discriminant Analysis". Updates of means and scatter:
Chan, Golub and LeVeque, 1983.
"""

import math
import warnings
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hier_losses._tree import Tree
from hier_losses._walk import Walk, squares
from hier_losses.functional._inputs import check_matrix, check_target, check_taxonomy
from hier_losses.probabilities import leaf_to_node_logits
from hier_losses.taxonomy import Taxonomy, TaxonomyUpdate, match_taxonomies


class TreeLDA(nn.Module):
    r"""A Gaussian classifier on features, with class means shrunk along the tree.

    $x \mid k \sim N(\mu_k, S)$ and $\mu_c \sim N(\mu_{parent(c)}, v_{depth(c)} S)$ below a root with a flat prior;
    $S = (1 - s) S_w + s\, tr(S_w) / d\; I$, $S_w$ = scatter within classes / (pictures - classes with pictures). The v
    maximise the restricted likelihood at that S. All is computed in float64 from the number and the mean of the pictures
    of each leaf and the scatter within leaves. They suffice: after new pictures, new classes or moved subtrees the model
    is the one that all pictures at once would give. It is brought up to date when it is first asked for something.

    Args:
        tax: the taxonomy.
        shrinkage: s in [0, 1]. Held-out pictures choose it (0.4 to 0.8 serves); the likelihood takes the smallest.
        star: shrink all leaves to one common mean, without the tree: the control for what the tree gives.
        plug_in: leave out how sure the means are: predict with N(m_k, S) instead of N(m_k, (1 + w_k) S).
        v: variance of the steps of each level in units of S, at least 0 (one number with `star`); estimated if None.
        covariance: S itself, (d, d); estimated if None.
        tolerance: the estimation of v stops when a step of it would change no v by more than this share.
        max_steps: steps after which the estimation of v stops with a warning.

    Attributes:
        count: (K,) pictures of each leaf, in the order of `tax.leaf`.
        mean: (K, d) mean of the pictures of each leaf; 0 where there are none.
        scatter: (d, d) sums of squares and products within leaves.
        spare: pictures minus classes with pictures, counted over all that the scatter holds.

    Raises:
        ValueError: a number out of its range, v of another length, a covariance that is not positive definite.

    >>> tax = Taxonomy.from_paths([("a", "x"), ("a", "y"), ("b",)])
    >>> features = torch.tensor([[0.0, 1.0], [0.0, 3.0], [3.0, 2.0], [9.0, 9.0], [8.0, 9.0]])
    >>> model = TreeLDA(tax).fit(features, tax.indices(["x", "x", "y", "b", "b"]))
    >>> model.log_prob(torch.tensor([[1.0, 2.0]])).exp().round(decimals=2)  # a, b, x, y
    tensor([[1.0000, 0.0000, 0.8500, 0.1500]])
    """

    count: Tensor
    mean: Tensor
    scatter: Tensor
    spare: Tensor
    given_v: Tensor | None
    covariance: Tensor | None
    _v: Tensor
    _factor: Tensor | None
    _inverse: Tensor | None
    _center: Tensor
    _leaf_mean: Tensor
    _leaf_spread: Tensor

    def __init__(
        self,
        tax: Taxonomy,
        shrinkage: float = 0.4,
        star: bool = False,
        plug_in: bool = False,
        *,
        v: Sequence[float] | Tensor | None = None,
        covariance: Float[Tensor, "dim dim"] | None = None,
        tolerance: float = 1e-5,
        max_steps: int = 1000,
    ):
        super().__init__()
        check_taxonomy(tax)
        if not 0 <= shrinkage <= 1:
            raise ValueError(f"shrinkage must lie in [0, 1], got {shrinkage}")
        if not 0 < tolerance < 1:
            raise ValueError(f"tolerance must lie in (0, 1), got {tolerance}")
        if max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, got {max_steps}")
        self.shrinkage, self.star, self.plug_in = float(shrinkage), star, plug_in
        self.tolerance, self.max_steps = tolerance, max_steps
        empty, dim = torch.zeros(0, dtype=torch.float64), 0
        self.register_buffer("given_v", None if v is None else torch.as_tensor(v, dtype=torch.float64))
        self.register_buffer("covariance", None if covariance is None else covariance.detach().double())
        if self.covariance is not None:
            dim = len(self.covariance)
            _factorise(self.covariance, "covariance must be symmetric and positive definite")
        self._set_tree(tax)
        self.register_buffer("count", empty.new_zeros(tax.num_leaves))
        self.register_buffer("mean", empty.new_zeros(tax.num_leaves, dim))
        self.register_buffer("scatter", empty.new_zeros(dim, dim))
        self.register_buffer("spare", empty.new_zeros(()))
        self.register_buffer("_v", empty)  # empty: not estimated from these statistics yet
        for name in ("_factor", "_inverse", "_center", "_leaf_mean", "_leaf_spread"):
            self.register_buffer(name, None, persistent=False)

    def fit(self, features: Float[Tensor, "batch dim"], target: Tensor) -> "TreeLDA":
        """Forget all pictures and take these.

        Args:
            features: one row per picture.
            target: (batch,) integer node ids of leaves.

        Returns:
            The model itself.

        Raises:
            ValueError: what `partial_fit` raises; features that no model follows from: no picture, no class with two
                pictures, no difference within a class, or a singular covariance with shrinkage 0.
        """
        dim = 0 if self.covariance is None else len(self.covariance)
        self.count, self.spare = torch.zeros_like(self.count), torch.zeros_like(self.spare)
        self.mean, self.scatter = self.mean.new_zeros(len(self.count), dim), self.scatter.new_zeros(dim, dim)
        self.partial_fit(features, target)
        self._refresh()
        return self

    @torch.no_grad()
    def partial_fit(self, features: Float[Tensor, "batch dim"], target: Tensor) -> "TreeLDA":
        """Add pictures; however they are split, the model is that of `fit` on all of them.

        Args:
            features: one row per picture.
            target: (batch,) integer node ids of leaves. A picture of which only an inner class is known has a mixture of
                Gaussians for its density, which these statistics cannot hold.

        Returns:
            The model itself.

        Raises:
            ValueError: features that are not finite or of another width, targets that are not leaves.
        """
        x = check_matrix("features", features, self.mean.shape[1] or features.shape[-1]).detach().double()
        tax = self.tax.to(x.device)
        target = check_target(target, len(x), tax)
        bad = (tax.leaf_index[target] < 0).nonzero()
        if len(bad):
            row = int(bad[0, 0])
            node = int(target[row])
            raise ValueError(f"target must hold leaves, got inner node {node} ({tax.names[node]!r}) at row {row}")
        if not torch.isfinite(x).all():
            raise ValueError(f"features must be finite, got {int((~torch.isfinite(x)).any(1).sum())} rows that are not")
        if not len(x):
            return self
        if not self.mean.shape[1]:
            self.mean, self.scatter = x.new_zeros(len(self.count), x.shape[1]), x.new_zeros(x.shape[1], x.shape[1])
        leaf, place = tax.leaf_index[target].unique(return_inverse=True)
        new = torch.bincount(place, minlength=len(leaf)).double()
        center = x.new_zeros(len(leaf), x.shape[1]).index_add_(0, place, x) / new[:, None]
        inside = x - center[place]
        old = self.count[leaf]
        apart = center - self.mean[leaf]
        between = apart * (old * new / (old + new)).sqrt()[:, None]
        self.scatter = self.scatter + inside.T @ inside + between.T @ between
        self.spare = self.spare + len(x) - (old == 0).sum()
        self.mean = self.mean.index_add(0, leaf, apart * (new / (old + new))[:, None])
        self.count = self.count.index_add(0, leaf, new)
        self._forget()
        return self

    @torch.no_grad()
    def update_taxonomy(self, update: TaxonomyUpdate | Taxonomy) -> TaxonomyUpdate:
        """Change the tree: leaves may come, go and move, and keep their pictures.

        The model becomes that of a fit on the new tree. What a removed class showed of the spread within classes stays.

        Args:
            update: from `Taxonomy.extend`, `Taxonomy.prune` or `match_taxonomies`; or the new taxonomy, which is matched.

        Returns:
            The update, whose maps carry targets over.

        Raises:
            ValueError: an update of another taxonomy; a leaf with pictures that gets children, since nothing says which of
                them its pictures show; given v whose number is not that of the new levels.
        """
        if not isinstance(update, TaxonomyUpdate):
            update = match_taxonomies(self.tax, update)
        tax: Taxonomy = update.taxonomy
        if len(update.old_to_new) != self.tax.num_nodes:
            raise ValueError(
                f"update must start from the model's {self.tax.num_nodes} nodes, got {len(update.old_to_new)}"
            )
        device = self.count.device
        new = update.old_to_new.to(device)[self.tax.to(device).leaf]
        place = torch.where(new >= 0, tax.to(device).leaf_index[new.clamp(min=0)], -1)
        split = ((new >= 0) & (place < 0) & (self.count > 0)).nonzero()
        if len(split):
            leaf = int(split[0, 0])
            raise ValueError(
                f"update must keep leaves with pictures as leaves, got children for {self.tax.leaf_names[leaf]!r} with "
                f"{int(self.count[leaf])} pictures: fit again with finer targets, or prune it first to forget them"
            )
        self._set_tree(tax)
        kept = place >= 0
        self.count = self.count.new_zeros(tax.num_leaves).index_copy(0, place[kept], self.count[kept])
        mean = self.mean.new_zeros(tax.num_leaves, self.mean.shape[1])
        self.mean = mean.index_copy(0, place[kept], self.mean[kept])
        self._forget()
        return update

    @property
    def v(self) -> Tensor:
        """Variance of the steps of each level in units of S, (D,), or (1,) with `star`; 1 where nothing informs a level."""
        self._refresh()
        return self._v

    @property
    def unidentified(self) -> tuple[tuple[int, ...], ...]:
        """Runs of levels that the pictures cannot tell apart: only the sum of their v counts.

        A run that starts with 0, the root whose prior is flat, says nothing at all about its v. Such v stay equal or at 1.
        """
        return self._walk(self.mean).unidentified()

    @torch.no_grad()
    def posterior(self) -> tuple[Float[Tensor, "nodes dim"], Float[Tensor, " nodes"]]:
        """Mean of every node, and the variance around it in units of S; with `star` those of the leaves."""
        factor = self._refresh()
        mean, spread = self._whitened_walk().posterior(self._v)
        return mean @ factor.T + self._center, spread

    @torch.no_grad()
    def restricted_log_likelihood(self) -> float:
        """Log density of the pictures with the root integrated out; after classes were removed, up to a constant."""
        factor = self._refresh()
        number, dim = float(self.count.sum()), self.mean.shape[1]
        within = torch.cholesky_solve(self.scatter, factor).trace() + number * dim * math.log(2 * math.pi)
        between = self._whitened_walk().log_likelihood(self._v)
        return float(between - 0.5 * within - (number - 1) * factor.diagonal().log().sum())

    def log_likelihood(self, features: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch leaves"]:
        """Log density of each picture under each leaf, those without pictures included.

        Args:
            features: one row per picture.

        Returns:
            (batch, K) in the order of `tax.leaf`, float64.

        Raises:
            ValueError: features of another width, or what `fit` raises if the pictures so far give no model.
        """
        factor = self._refresh()
        features = check_matrix("features", features, self.mean.shape[1])
        if self._inverse is not None and torch.compiler.is_exporting():
            x = (features.double() - self._center) @ self._inverse.T
        else:
            x = _whiten(features.double(), self._center, factor)
        mean, dim = self._leaf_mean, x.shape[1]
        distance = x.square().sum(1, keepdim=True) + squares(mean) - 2 * x @ mean.T
        scale = torch.ones_like(self._leaf_spread) if self.plug_in else 1 + self._leaf_spread
        constant = dim * (2 * math.pi * scale).log() + 2 * factor.diagonal().log().sum()
        return -0.5 * (distance / scale + constant)

    def log_prob(
        self,
        features: Float[Tensor, "batch dim"],
        temperature: float = 1.0,
        *,
        prior: Float[Tensor, " leaves"] | None = None,
        include_empty: bool = False,
    ) -> Float[Tensor, "batch nodes"]:
        """Log-probability of every node, P(k | x) ~ p(x | k)^(1 / temperature) prior_k summed over the leaves below.

        All levels agree, so every decoder and metric for node logits applies, as does any for leaf logits.

        Args:
            features: one row per picture; gradients flow into them.
            temperature: above 0; features are not independent, so 1 is far too sure: fit it on held-out pictures.
            prior: (K,) weights above 0 of the leaves; equal if None.
            include_empty: let leaves without pictures take part. Such a leaf has its parent's mean and a wider spread; it
                wins pictures that lie far from everything, rarely its own.

        Returns:
            (batch, N) at most 0, -inf for leaves that are left out and nodes with no other leaf below.

        Raises:
            ValueError: a temperature or prior out of range, what `log_likelihood` raises.
        """
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        score = self.log_likelihood(features) / temperature
        if prior is not None:
            if prior.shape != self.count.shape or not (prior > 0).all():
                raise ValueError(f"prior must hold {len(self.count)} weights above 0, got shape {tuple(prior.shape)}")
            score = score + prior.to(score).log()
        if not include_empty:
            score = score.masked_fill(self.count == 0, -torch.inf)
        found = leaf_to_node_logits(score.log_softmax(1), self.tax).clamp(max=0)
        return found.to(torch.promote_types(features.dtype, torch.float32))

    forward = log_prob

    @torch.no_grad()
    def prepare_export(self) -> "TreeLDA":
        """Keep the inverse of the covariance's factor, with which exported graphs multiply: ONNX has no triangular solve.

        Returns:
            The model itself; call it once before `torch.onnx.export`, again after new pictures.

        Raises:
            ValueError: no picture so far.
        """
        factor = self._refresh()
        eye = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
        self._inverse = torch.linalg.solve_triangular(factor, eye, upper=False)
        return self

    def extra_repr(self) -> str:
        """Return the settings."""
        return f"{self.tax!r}, shrinkage={self.shrinkage}, star={self.star}, plug_in={self.plug_in}"

    def _set_tree(self, tax: Taxonomy) -> None:
        walked: Tree = Taxonomy([str(k) for k in range(tax.num_leaves)], [-1] * tax.num_leaves) if self.star else tax
        given = self.given_v
        if given is not None and (given.shape != (walked.num_levels,) or not ((given >= 0) & given.isfinite()).all()):
            raise ValueError(f"v must hold {walked.num_levels} finite numbers of at least 0, got {given.tolist()}")
        self.tax, self._walked = tax, walked

    def _walk(self, mean: Tensor) -> Walk:
        return Walk(self._walked.to(mean.device), self.count, mean)

    def _whitened_walk(self) -> Walk:
        factor = self._refresh()
        return self._walk(_whiten(self.mean, self._center, factor))

    def _forget(self) -> None:
        self._v = self._v.new_zeros(0)
        self._factor = self._inverse = None

    @torch.no_grad()
    def _refresh(self) -> Tensor:
        """Estimate what predictions need from the statistics, unless it is there; give the covariance's factor."""
        if self._factor is not None:
            return self._factor
        if not self.mean.shape[1] or not self.count.sum() > 0:
            raise ValueError("features must hold pictures of some class: fit has seen none")
        factor = _factorise(self._spread_within(), f"shrinkage must be above 0 here, got {self.shrinkage}")
        # The root's prior is flat, so any origin serves; one in the middle keeps the digits.
        center = self.count @ self.mean / self.count.sum()
        walk = self._walk(_whiten(self.mean, center, factor))
        if not len(self._v):
            self._v = self._estimate(walk) if self.given_v is None else self.given_v.clone()
        mean, spread = walk.posterior(self._v)
        self._leaf_mean, self._leaf_spread = mean[walk.tax.leaf], spread[walk.tax.leaf]
        self._center, self._factor = center, factor
        return factor

    def _estimate(self, walk: Walk) -> Tensor:
        v, settled = walk.fit(self.tolerance, self.max_steps)
        if not settled:
            warnings.warn(
                f"v has not settled to {self.tolerance} in {self.max_steps} steps", RuntimeWarning, stacklevel=4
            )
        return v

    def _spread_within(self) -> Tensor:
        if self.covariance is not None:
            return self.covariance
        if not self.spare > 0:
            raise ValueError("features must hold two pictures of some class, or covariance must be given")
        within, s, dim = self.scatter / self.spare, self.shrinkage, len(self.scatter)
        level = within.trace() / dim
        if not level > 0:
            raise ValueError("features must differ within some class, or covariance must be given")
        if s == 0 and self.spare < dim:
            raise ValueError(
                f"shrinkage must be above 0 for {dim} features and {int(self.spare)} degrees of freedom, got 0.0"
            )
        return (1 - s) * within + s * level * torch.eye(dim, dtype=within.dtype, device=within.device)

    def _apply(self, fn, recurse: bool = True):
        # float() and half() move nothing: the statistics of a million pictures would lose their last ones.
        return super()._apply(lambda x: x.to(fn(x.new_zeros(0)).device), recurse)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name, axis in (("mean", 1), ("scatter", 0), ("_v", 0)):
            found, own = state_dict.get(prefix + name), getattr(self, name)
            if found is not None and found.ndim == own.ndim and found.shape[:axis] == own.shape[:axis]:
                setattr(self, name, own.new_zeros(found.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._factor = self._inverse = None


def _whiten(rows: Tensor, center: Tensor, factor: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(factor, (rows - center).T, upper=False).T


def _factorise(matrix: Tensor, message: str) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed or not torch.allclose(matrix, matrix.T):
        raise ValueError(f"{message}, the covariance is singular")
    return factor


__all__ = ["TreeLDA"]
