"""The training objective: tree losses and the entailment of paths within and across modalities.

References: Modality Alignment across Trees (arXiv 2510.27391); Wu et al., "ProTeCt: Prompt tuning for taxonomic open set
classification" (arXiv 2306.02240), the node and tree-cut losses; Ganea et al., ICML 2018, and Desai et al., ICML 2023, the
cones.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from hier_losses import Taxonomy
from hier_losses.treecuts import TreeCut, node_classification_loss, sample_cut, treecut_loss
from hyper_geom import cones, lorentz
from mat_align._base import MATOutput, gather
from mat_align._checks import check_choice, check_positive, check_single
from mat_align.features import FeatureMATModel
from mat_align.head import PathFeatures
from mat_align.intermediate._chord import common_dtype
from mat_align.model import MATModel
from mat_align.prompts import PromptSRCRegularizer

__all__ = ["MATLosses", "MATObjective", "entailment_terms", "node_classification_loss", "treecut_loss"]

_MEETS = 1e-6


class MATLosses(NamedTuple):
    """The parts of the objective before their weights, and what to log beside them.

    Attributes:
        total: the weighted sum, to call backward on.
        leaf: cross-entropy over the leaves; 0 for the tree losses.
        cut: cross-entropy over a random tree cut.
        node: mean over internal nodes of the cross-entropy over their children.
        visual, textual, cross: the entailment terms.
        regularizer: PromptSRC's term.
        c_img, c_txt, c_mid: curvatures of this step without gradient; NaN for a variant without them.
    """

    total: Tensor
    leaf: Tensor
    cut: Tensor
    node: Tensor
    visual: Tensor
    textual: Tensor
    cross: Tensor
    regularizer: Tensor
    c_img: Tensor
    c_txt: Tensor
    c_mid: Tensor


def entailment_terms(
    img: Float[Tensor, "B H d"],
    txt: Float[Tensor, "B H d"],
    length: Int[Tensor, " B"],
    c_img: float | Tensor,
    c_txt: float | Tensor,
    c_mid: float | Tensor,
    scale_img: float | Tensor = 1.0,
    scale_txt: float | Tensor = 1.0,
    min_radius: float = 0.1,
    padding: str = "mask",
) -> tuple[Tensor, Tensor, Tensor]:
    """Means of the cone violations along paths: visual, textual, and from text to picture.

    With x = exp_0(scale feature; c): the mean over valid pairs of max(0, phi - omega) for v_i -> v_{i+1} at c_img,
    t_i -> t_{i+1} at c_txt, and t_i -> v_i with both lifted at c_mid.

    On unit features of one scale phi > pi/2 >= omega, so the terms attract and their floor is pi/2 - omega.

    Args:
        img: visual features of the nodes on each path, top node first.
        txt: text features of the same nodes.
        length: number of nodes on each path, 0..H.
        c_img: curvature parameter of the image manifold.
        c_txt: curvature parameter of the text manifold.
        c_mid: curvature parameter of the intermediate manifold.
        scale_img: factor of the visual features.
        scale_txt: factor of the text features.
        min_radius: K of the half aperture.
        padding: "mask" leaves padding out. "released" takes padding as zero vectors into the means, as the released code
            does (a leaf before padding costs pi - omega here, 3.1386 - omega there; padding before padding 0 here, .0014
            there, the floor of its clamps).

    Returns:
        Three scalars in [0, pi]; 0 where there is no pair.

    Raises:
        ValueError: unknown padding, H = 0, shapes that differ, a length outside 0..H, or a number not finite and > 0.
    """
    check_choice("padding", padding, ("mask", "released"))
    for name, value in (
        ("c_img", c_img), ("c_txt", c_txt), ("c_mid", c_mid), ("scale_img", scale_img), ("scale_txt", scale_txt),
        ("min_radius", min_radius),
    ):  # fmt: skip
        check_positive(name, value)
        check_single(name, value)
    if img.ndim != 3 or img.shape != txt.shape or img.shape[1] == 0:
        raise ValueError(
            f"img and txt must share a shape (B, H >= 1, d), got {tuple(img.shape)} and {tuple(txt.shape)}"
        )
    num = img.shape[1]
    if length.shape != img.shape[:1]:
        raise ValueError(f"length must have shape ({len(img)},), got {tuple(length.shape)}")
    if not torch.compiler.is_compiling() and bool(((length < 0) | (length > num)).any()):
        raise ValueError(f"length must lie in [0, {num}], got {length.tolist()}")
    valid = torch.arange(num, device=length.device) < length[:, None]
    # Values of padding must not reach a gradient: 0 times an infinite slope is NaN.
    v, t = (torch.where(valid[..., None], x, 0.0) for x in (scale_img * img, scale_txt * txt))
    if padding == "released":
        valid = torch.ones_like(valid)
    apex, point, c = _chains(v, t, c_img, c_txt, c_mid)
    violation = cones.entailment_violation(apex, point, c=c, min_radius=min_radius)
    kept = (valid[:, 1:], valid[:, 1:], valid)
    parts = zip(violation.split([x.shape[1] for x in kept], dim=1), kept, strict=True)
    return tuple(torch.where(keep, part, 0.0).sum() / keep.sum().clamp(min=1) for part, keep in parts)


def _chains(
    v: Tensor, t: Tensor, c_img: float | Tensor, c_txt: float | Tensor, c_mid: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Apexes, points and the curvature of each pair: down the pictures' path, down the texts', from text to picture."""
    num = v.shape[1]
    # Numbers in the precision of what they meet, single or wider: a number as a tensor of its own would be single.
    dtype = torch.promote_types(common_dtype(v, t, c_img, c_txt, c_mid), torch.float32)
    parts = [
        x.to(dtype).reshape(1) if isinstance(x, Tensor) else torch.full((1,), x, dtype=dtype, device=v.device)
        for x in (c_img, c_txt, c_mid)
    ]
    c = torch.cat([x.expand(n) for x, n in zip(parts, (num - 1, num - 1, num), strict=True)])
    apex, point = torch.cat((v[:, :-1], t[:, :-1], t), dim=1), torch.cat((v[:, 1:], t[:, 1:], v), dim=1)
    return lorentz.exp_map0(apex, c=c), lorentz.exp_map0(point, c=c), c


@torch.no_grad()
def fraction_met(
    features: PathFeatures,
    length: Int[Tensor, " B"],
    c_img: float | Tensor,
    c_txt: float | Tensor,
    c_mid: float | Tensor,
    min_radius: float = 0.1,
) -> tuple[float, float, float]:
    """Share of valid pairs that lie in their cone: visual, textual, cross; NaN where there is no pair.

    Give features in fp64: where those of parent and child are closer than about 1e-3, the rounding of unit norms in fp32
    decides the angle.

    Args:
        features: what `MATHead.path_features` returns.
        length: number of nodes on each path.
        c_img: as in `entailment_terms`.
        c_txt: as in `entailment_terms`.
        c_mid: as in `entailment_terms`.
        min_radius: as in `entailment_terms`.
    """
    valid = torch.arange(features.img.shape[1], device=length.device) < length[:, None]
    v, t = features.scale_img * features.img, features.scale_txt * features.txt
    apex, point, c = _chains(v, t, c_img, c_txt, c_mid)
    met = cones.entailment_violation(apex, point, c=c, min_radius=min_radius) <= _MEETS
    shares = []
    kept = (valid[:, 1:], valid[:, 1:], valid)
    for part, keep in zip(met.split([x.shape[1] for x in kept], dim=1), kept, strict=True):
        shares.append((part & keep).sum().item() / keep.sum().item() if keep.any() else math.nan)
    return tuple(shares)


class MATObjective:
    """Losses of a model on a batch, from one encoding of the pictures and one of the labels in use.

    total = treecut_weight (L_cut + L_SCL) + node_weight L_node + entail_weight (E_img + E_txt + E_cross)

    The model's variant decides which terms there are: cross-entropy over the leaves alone, the tree losses, or all. L_cut
    is taken over one random tree cut a call, in which internal nodes are expanded with probability 1 - treecut_dropout.

    Args:
        taxonomy: the label tree.
        treecut_weight: weight of the cut loss (or of the leaf loss) and of the regularizer.
        node_weight: weight of the node loss.
        entail_weight: weight of the entailment terms.
        treecut_dropout: probability of keeping an internal node instead of its children, in [0, 1).
        names: name of each node for `encode_text`; those of the taxonomy if None.
        regularizer: PromptSRC's; needs a `MATModel`.
        group: processes that share one batch, equally many pictures in each, such as `torch.distributed.group.WORLD`.
            Each computes the losses of the whole batch from the tokens of all, so that several processes under
            DistributedDataParallel take the step of one.

    Raises:
        ValueError: a negative weight, treecut_dropout outside [0, 1), or another number of names than nodes.
    """

    def __init__(
        self,
        taxonomy: Taxonomy,
        treecut_weight: float = 1.0,
        node_weight: float = 0.5,
        entail_weight: float = 0.5,
        treecut_dropout: float = 0.1,
        names: Sequence[str] | None = None,
        regularizer: PromptSRCRegularizer | None = None,
        group: Any = None,
    ) -> None:
        """Check and keep the settings."""
        for name, value in (
            ("treecut_weight", treecut_weight),
            ("node_weight", node_weight),
            ("entail_weight", entail_weight),
        ):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be finite and >= 0, got {value}")
        if not 0 <= treecut_dropout < 1:
            raise ValueError(f"treecut_dropout must lie in [0, 1), got {treecut_dropout}")
        self.names = tuple(taxonomy.names if names is None else names)
        if len(self.names) != taxonomy.num_nodes:
            raise ValueError(f"names must hold {taxonomy.num_nodes} entries, one per node, got {len(self.names)}")
        self.taxonomy = taxonomy
        self.treecut_weight, self.node_weight, self.entail_weight = treecut_weight, node_weight, entail_weight
        self.treecut_dropout = treecut_dropout
        self.regularizer, self.group = regularizer, group
        self._leaves = TreeCut(taxonomy, taxonomy.leaf)

    def __call__(
        self,
        model: nn.Module,
        images: Tensor,
        target: Int[Tensor, " B"],
        generator: torch.Generator | None = None,
    ) -> MATLosses:
        """Compute the losses of a batch.

        Args:
            model: a `MATModel` or `FeatureMATModel` in training mode, or its DistributedDataParallel.
            images: what its `encode_image` takes.
            target: node id of each picture's leaf.
            generator: source of the tree cut, on the CPU; in several processes one seed for all.

        Returns:
            The losses; `total` has the graph.

        Raises:
            ValueError: a target that is no leaf of the taxonomy, or a regularizer with layers that do not end with the
                last block, whose feature it compares.
        """
        tax = self.taxonomy.to(target.device)
        self._check_target(tax, target)
        inner = getattr(model, "module", model)
        if self.regularizer is not None and not inner.layers.ends:
            raise ValueError("layers must end with the last block, unmixed, where there is a regularizer")
        target = gather(target, self.group)
        variant, tree = inner.variant, inner.variant.loss == "tree"
        cut = sample_cut(self.taxonomy, self.treecut_dropout, generator) if tree else self._leaves
        cut = cut.to(target.device)
        needed = self.nodes_in_use(target, cut) if tree else tax.leaf
        paths, length = None, tax.depth[target]
        if variant.curvature != "none":
            place = torch.full((tax.num_nodes,), -1, device=target.device).index_copy(
                0, needed, torch.arange(len(needed), device=target.device)
            )
            paths = place[self._paths(target).clamp(min=0)]
        reference = None if self.regularizer is None else [self.names[node] for node in cut.nodes.tolist()]
        names = [self.names[node] for node in needed.tolist()]
        out = model(images, names, paths, None if paths is None else length, reference, self.group)
        # Columns that no loss of this batch reads stay 0.
        logits = out.logits.new_zeros(len(target), tax.num_nodes).index_copy(1, needed, out.logits)
        base = treecut_loss(logits, cut, target)
        zero = base.new_zeros(())
        node = node_classification_loss(logits, target, tax, variant.skip_single_child) if tree else zero
        scl = zero if self.regularizer is None else self._regularize(inner, out, needed, cut, logits)
        total = self.treecut_weight * (base + scl) + self.node_weight * node
        leaf, cut_loss = (zero, base) if tree else (base, zero)
        none = base.new_full((), math.nan)
        if paths is None:
            return MATLosses(total, leaf, cut_loss, node, zero, zero, zero, scl, none, none, none)
        features, (c_img, c_txt, c_mid) = out.paths, out.curvatures
        terms = entailment_terms(
            features.img, features.txt, length, c_img, c_txt, c_mid, features.scale_img, features.scale_txt,
            inner.head.min_radius, variant.padding,
        )  # fmt: skip
        total = total + self.entail_weight * sum(terms)
        return MATLosses(total, leaf, cut_loss, node, *terms, scl, *(c.detach() for c in (c_img, c_txt, c_mid)))

    def nodes_in_use(self, target: Int[Tensor, " B"], cut: TreeCut) -> Int[Tensor, " k"]:
        """Ids of the nodes whose text a batch needs: the members of the cut and the children of every node on a path."""
        tax = self.taxonomy.to(target.device)
        path = tax.paths[target]
        group = torch.unique(tax.parent[path[path >= 0]]) + 1
        used = torch.zeros(tax.num_nodes + 1, dtype=torch.bool, device=target.device)
        used[group] = True
        wanted = used[tax.parent + 1]
        wanted[cut.nodes] = True
        return wanted.nonzero().squeeze(1)

    def path_features(
        self, model: MATModel | FeatureMATModel, tokens: Tensor, text: Tensor, target: Int[Tensor, " B"]
    ) -> tuple[PathFeatures, Tensor]:
        """Features along each picture's path, and the lengths of the paths.

        Args:
            model: the model.
            tokens: its tokens of the pictures.
            text: its text features of all nodes.
            target: node id of each picture's leaf.
        """
        length = self.taxonomy.to(target.device).depth[target]
        return model.head.path_features(tokens, text[self._paths(target).clamp(min=0)]), length

    def _paths(self, target: Tensor) -> Tensor:
        """Nodes on each path, as wide as the longest of the batch."""
        tax = self.taxonomy.to(target.device)
        length = tax.depth[target]
        return tax.paths[target][:, : max(1, int(length.max()) if len(length) else 1)]

    def _regularize(self, model: MATModel, out: MATOutput, needed: Tensor, cut: TreeCut, logits: Tensor) -> Tensor:
        chosen, (frozen_image, frozen_text) = torch.isin(needed, cut.nodes), out.frozen
        frozen = model.logit_scale.exp() * F.normalize(frozen_image, dim=-1) @ frozen_text.mT
        picked = logits.index_select(1, cut.nodes)
        return self.regularizer(out.text[chosen], frozen_text, out.tokens[:, -1], frozen_image, picked, frozen)

    @staticmethod
    def _check_target(tax: Taxonomy, target: Tensor) -> None:
        inside = (target >= 0) & (target < tax.num_nodes)
        if not bool(inside.all()):
            raise ValueError(f"target must lie in [0, {tax.num_nodes}), got {target[~inside][0].item()}")
        inner = tax.leaf_index[target] < 0
        if bool(inner.any()):
            raise ValueError(f"target must be a leaf, got internal node {target[inner][0].item()}")
