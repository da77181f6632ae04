"""A learned lift of CLIP-like features into hyperbolic space, the contrastive loss that trains it, and the bank it fills.

References: Khosla et al., "Supervised contrastive learning", NeurIPS 2020, eq. 2 (the loss, here on minus the distance);
Desai et al., "Hyperbolic image-text representations", ICML 2023, section 3 (learned scale before the exponential map).
Features of unit norm under a fixed exponential map all have one depth, and rank exactly as cosines do: the norm is
learned here.
"""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor, nn

from hyper_geom import lorentz
from hyper_icl._checks import check_count, check_groups, check_positive, check_rows
from hyper_icl.demonstrations._pool_file import fp64_norm, read_pool, write_pool
from hyper_icl.demonstrations.selection import HyperbolicDemoIndex


class HyperbolicLift(nn.Module):
    """Linear map to tangent vectors at the origin with a learned scale and a bounded radius.

    v = exp(log_alpha) W f,  w = v R tanh(k|v|/R) / (k|v|),  k = sqrt(c), R = max_radius

    Lorentz convention: the depth of w's point is |w|. The Poincare point of the same place is that of w/2.

    Args:
        in_dim: width of the features.
        out_dim: width of the tangent vectors.
        c: curvature parameter of the space, kept for the bank and the loss.
        max_radius: bound R on k|w|.

    Attributes:
        log_alpha: logarithm of the scale, shape (1,), at first -log(out_dim)/2.
        weight: W, shape (out_dim, in_dim).

    Raises:
        ValueError: a width is below 1, or c or max_radius is not positive.

    >>> lift = HyperbolicLift(4, 2)
    >>> lift(torch.zeros(3, 4)).shape
    torch.Size([3, 2])
    """

    def __init__(self, in_dim: int, out_dim: int = 512, c: float = 1.0, max_radius: float = 6.0) -> None:
        """Draw W as `nn.Linear` does."""
        super().__init__()
        self.in_dim, self.out_dim = check_count("in_dim", in_dim), check_count("out_dim", out_dim)
        self.c, self.max_radius = check_positive("c", c), check_positive("max_radius", max_radius)
        self.weight = nn.Parameter(nn.Linear(in_dim, out_dim, bias=False).weight.detach().clone())
        self.log_alpha = nn.Parameter(torch.full((1,), float(out_dim)).log() / -2)

    def forward(self, features: Float[Tensor, "*batch in_dim"]) -> Float[Tensor, "*batch out_dim"]:
        """Lift features.

        Args:
            features: e.g. CLIP embeddings, normalised or not.

        Returns:
            Lorentz tangent vectors at the origin with k|w| < max_radius, in fp32 (fp64 for fp64 features).
        """
        if features.shape[-1] != self.in_dim:
            raise ValueError(f"features must have width {self.in_dim}, got {features.shape[-1]}")
        dtype = torch.promote_types(features.dtype, torch.float32)
        with torch.autocast(features.device.type, enabled=False):
            v = self.log_alpha.to(dtype).exp() * (features.to(dtype) @ self.weight.to(dtype).mT)
            scaled = self.c**0.5 * v.norm(dim=-1, keepdim=True) / self.max_radius
            # tanh(x)/x, which is 1 at 0.
            ratio = torch.where(scaled == 0, 1.0, scaled.tanh() / torch.where(scaled == 0, 1.0, scaled))
            return v * ratio

    def extra_repr(self) -> str:
        """Widths, curvature and bound."""
        return f"in_dim={self.in_dim}, out_dim={self.out_dim}, c={self.c}, max_radius={self.max_radius}"


def anchor_loss(
    w: Float[Tensor, "n d"], positives: Bool[Tensor, "n n"], c: float | Tensor = 1.0, tau: float = 0.1
) -> Float[Tensor, ""]:
    """Supervised contrastive loss on hyperbolic distances.

    L = -(1/n) sum_i (1/|P_i|) sum_{p in P_i} log[exp(-d_ip/tau) / sum_{j != i} exp(-d_ij/tau)]

    over the n anchors i that have a positive. The diagonal takes no part: its distance 0 would dominate the sum.
    Distances of positive pairs are computed pair by pair, because one matrix product cannot resolve close ones.

    Args:
        w: Lorentz tangent vectors at the origin, k|w| up to 40.
        positives: True at (i, p) where p is a positive of i; the diagonal is ignored.
        c: curvature parameter.
        tau: temperature.

    Returns:
        The loss, a scalar >= 0.

    Raises:
        ValueError: shapes do not fit, w is not finite, tau <= 0, or no anchor has a positive.

    >>> w = torch.tensor([[1.0, 0.0], [1.2, -0.1], [0.0, 3.0], [1.0, 1.0]])
    >>> group = torch.tensor([0, 0, 1, 1])
    >>> round(anchor_loss(w, group[:, None] == group, tau=0.5).item(), 5)
    1.10911
    """
    check_rows("w", w)
    tau = check_positive("tau", tau)
    num = w.shape[0]
    if positives.dtype != torch.bool or positives.shape != (num, num):
        raise ValueError(
            f"positives must be bool of shape ({num}, {num}), got {positives.dtype} {tuple(positives.shape)}"
        )
    itself = torch.eye(num, dtype=torch.bool, device=w.device)
    positives = positives & ~itself
    if not positives.any():
        raise ValueError(
            "positives must give at least one anchor a positive other than itself: put two items of a group in a batch"
        )
    points = lorentz.exp_map0(w, c=c)
    rows, columns = positives.nonzero(as_tuple=True)
    d = lorentz.pairwise_dist(points, points, c=c)
    d = d.index_put((rows, columns), lorentz.tangent0_dist(w[rows], w[columns], c=c))
    logits = -d / tau
    normaliser = logits.masked_fill(itself, -torch.inf).logsumexp(-1)
    count = positives.sum(-1)
    own = torch.where(positives, logits, 0.0).sum(-1)
    has_positive = count > 0
    return (normaliser - own / count.clamp(min=1))[has_positive].mean()


class AnchorLoss(nn.Module):
    """Module form of `anchor_loss`.

    Args:
        c: curvature parameter.
        tau: temperature.
    """

    def __init__(self, c: float = 1.0, tau: float = 0.1) -> None:
        """Keep the settings."""
        super().__init__()
        self.c, self.tau = check_positive("c", c), check_positive("tau", tau)

    def forward(self, w: Float[Tensor, "n d"], positives: Bool[Tensor, "n n"]) -> Float[Tensor, ""]:
        """See `anchor_loss`."""
        return anchor_loss(w, positives, self.c, self.tau)


class AnchorBank:
    """The lifted pool of demonstrations: tangent vectors, their groups and their names.

    Args:
        tangent: Lorentz tangent vectors at the origin.
        c: curvature parameter.
        groups: one number an item, e.g. its image; `search(exclude=...)` drops a group.
        ids: names of the items, the row numbers by default.

    Attributes:
        depth: |w| of every item, fp32 (N,).

    Raises:
        ValueError: the bank is empty, not finite or misshapen.

    >>> bank = AnchorBank(torch.tensor([[0.5, 0.0], [0.0, 3.0]]), ids=["dog", "poodle"])
    >>> bank.depth
    tensor([0.5000, 3.0000])
    >>> bank.remove(["dog"]).add(torch.ones(1, 2), ids=["cat"]).ids
    ('poodle', 'cat')
    """

    def __init__(
        self,
        tangent: Float32[Tensor, "n d"],
        c: float = 1.0,
        groups: Int64[Tensor, " n"] | None = None,
        ids: Sequence[str] | None = None,
    ) -> None:
        """Check and keep the pool."""
        self._keep(check_rows("tangent", tangent).detach(), c, groups, ids, None)

    def _keep(
        self, tangent: Tensor, c: float, groups: Tensor | None, ids: Sequence[str] | None, depth: Tensor | None
    ) -> None:
        if len(tangent) == 0:
            raise ValueError("tangent must hold at least one item, got an empty bank")
        self.tangent, self.c = tangent, check_positive("c", c)
        self.groups = check_groups("groups", groups, len(tangent))
        self._ids = None if ids is None else tuple(ids)
        if self._ids is not None and len(self._ids) != len(tangent):
            raise ValueError(f"ids must name all {len(tangent)} items, got {len(self._ids)}")
        self._depth = fp64_norm(tangent) if depth is None else depth

    def __len__(self) -> int:
        """Number of items."""
        return len(self.tangent)

    @property
    def ids(self) -> tuple[str, ...]:
        """Names of the items."""
        return tuple(str(i) for i in range(len(self))) if self._ids is None else self._ids

    @property
    def depth(self) -> Float[Tensor, " n"]:
        """Depth |w| of every item: distance of its point from the origin."""
        return self._depth.to(self.tangent.dtype)

    def index(self, mu: float = 0.0, backend: str = "auto") -> HyperbolicDemoIndex:
        """An index of this bank; see `HyperbolicDemoIndex`."""
        return HyperbolicDemoIndex(self.tangent, self.c, mu, backend, groups=self.groups, depth=self._depth)

    def add(
        self,
        tangent: Float32[Tensor, "m d"],
        groups: Int64[Tensor, " m"] | None = None,
        ids: Sequence[str] | None = None,
    ) -> "AnchorBank":
        """A bank with more items at its end.

        Args:
            tangent: the new points.
            groups: their groups, if this bank has groups.
            ids: their names; by default their row numbers, if this bank has no other names.

        Raises:
            ValueError: widths differ, a name is there already, or groups or names are missing or superfluous.
        """
        check_rows("tangent", tangent, dim=self.tangent.shape[1])
        if (groups is None) != (self.groups is None) or (ids is None) != (self._ids is None):
            raise ValueError("groups and ids must be given exactly where the bank has them")
        joined = None if self._ids is None else (*self._ids, *(ids or ()))
        if joined is not None and len(set(joined)) != len(joined):
            raise ValueError(f"ids must be new names, got {sorted({i for i in joined if joined.count(i) > 1})[:5]}")
        more = None if groups is None else torch.cat((self.groups, check_groups("groups", groups, len(tangent))))
        return AnchorBank(torch.cat((self.tangent, tangent.to(self.tangent))), self.c, more, joined)

    def remove(self, ids: Collection[str]) -> "AnchorBank":
        """A bank without some items; later rows move up.

        Raises:
            ValueError: a name is not in the bank, or nothing is left.
        """
        unknown = sorted(set(ids) - set(self.ids))
        if unknown:
            raise ValueError(f"ids must be in the bank, got {unknown[:5]}")
        gone = set(ids)
        kept = torch.tensor([i for i, name in enumerate(self.ids) if name not in gone], dtype=torch.int64)
        names = None if self._ids is None else [self._ids[i] for i in kept.tolist()]
        return AnchorBank(self.tangent[kept], self.c, None if self.groups is None else self.groups[kept], names)

    def save(self, folder: str | Path) -> None:
        """Write `bank.safetensors` into a folder, and `ids.json` if the items have names."""
        write_pool(folder, self.tangent.split(1 << 15), self.groups, self._ids, {"c": repr(self.c)})

    @classmethod
    def build(
        cls,
        folder: str | Path,
        parts: Iterable[Float[Tensor, "_ d"]],
        c: float = 1.0,
        groups: Int64[Tensor, " n"] | None = None,
        ids: Sequence[str] | None = None,
    ) -> "AnchorBank":
        """Write a bank part by part and open it through the memory map; no more than a part is ever in memory.

        Args:
            folder: where to write; it may be the folder of a bank whose rows the parts come from.
            parts: points in order, e.g. a generator that lifts features of a memory-mapped array.
            c: curvature parameter.
            groups: one number an item.
            ids: names of the items.

        Raises:
            ValueError: there is no row, or rows are not finite or differ in width, or groups or ids do not fit.
        """
        facts = {"c": repr(check_positive("c", c))}
        write_pool(folder, parts, groups, None if ids is None else tuple(ids), facts)
        return cls.load(folder)

    @classmethod
    def load(cls, folder: str | Path) -> "AnchorBank":
        """Open what `save` or `build` wrote; rows stay in the file until they are used.

        Raises:
            ValueError: the file is missing or damaged.
        """
        tensors, facts, ids = read_pool(folder)
        made = cls.__new__(cls)
        made._keep(tensors["tangent"], float(facts["c"]), tensors.get("groups"), ids, tensors.get("depth"))
        return made
