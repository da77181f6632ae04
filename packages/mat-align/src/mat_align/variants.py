"""The rows of the method's ablation as switches.

Reference: Modality Alignment across Trees (arXiv 2510.27391). By our reading of the released configurations the last four
are the paper's Ours-Euc, HypV1, HypV2 and Ours; the keys in parentheses are those of the released code.
"""

from dataclasses import dataclass, replace

from mat_align._checks import check_choice
from mat_align.intermediate import METHODS

# Means of the exact divergence beside the chord objective and the control solvers.
INTERMEDIATES = (*METHODS, "exact-forward", "exact-reverse", "exact-jeffreys")


@dataclass(frozen=True)
class Variant:
    """What a model computes and which losses it is trained with.

    Attributes:
        name: shown in tables.
        feature: "tokens" (text-queried attention over M layers), "last" (the last token), or "mean" (the mean of the M
            tokens, which asks no text).
        loss: "leaf" (cross-entropy over the leaves) or "tree" (tree cut and node losses).
        curvature: "none" (no entailment terms), "one" shared, "three", or "two" with the third derived from them.
        learnable: whether curvatures are parameters.
        intermediate: how c_mid is derived for curvature="two", one of `INTERMEDIATES`.
        pass_through: see `mat_align.visual_tree.value_pass_through`.
        mix: see `mat_align.visual_tree.LayerTokens`.
        padding: see `mat_align.objective.entailment_terms`.
        skip_single_child: see `hier_losses.treecuts.node_classification_loss`.
        drop_digits: see `mat_align.prompts.label_text`.

    Raises:
        ValueError: a setting that is none of its choices.
    """

    name: str
    feature: str = "tokens"
    loss: str = "tree"
    curvature: str = "none"
    learnable: bool = True
    intermediate: str = "chord"
    pass_through: str = "value"
    mix: str = "fixed"
    padding: str = "mask"
    skip_single_child: bool = True
    drop_digits: bool = False

    def __post_init__(self) -> None:
        """Check every choice."""
        for key, choices in (
            ("feature", ("tokens", "last", "mean")),
            ("loss", ("leaf", "tree")),
            ("curvature", ("none", "one", "two", "three")),
            ("intermediate", INTERMEDIATES),
            ("pass_through", ("value", "released")),
            ("mix", ("fixed", "learned")),
            ("padding", ("mask", "released")),
        ):
            check_choice(key, getattr(self, key), choices)


VANILLA = Variant("VANILLA", feature="last", loss="leaf")
"""Last token, cross-entropy over the leaves."""
PROTECT = Variant("PROTECT", feature="last")
"""Last token, tree-cut and node losses (ProTeCt: arXiv 2306.02240)."""
EUCLIDEAN = Variant("EUCLIDEAN")
"""M tokens and text-queried attention, without entailment."""
SHARED = Variant("SHARED", curvature="one")
"""Entailment with one curvature (`learn_common`)."""
SEPARATE = Variant("SEPARATE", curvature="three")
"""Entailment with three curvatures (`learn3`)."""
HETEROGENEOUS = Variant("HETEROGENEOUS", curvature="two")
"""Entailment with two curvatures and the one between derived from them (`learn2derive1`)."""


def released(variant: Variant) -> Variant:
    """The variant with the defects of the released code that change what is computed, for reproduction.

    The pass-through without ln_1 and with a doubled residual, the curvature search and its backward, padding inside the
    means, single-child nodes inside the node mean, and labels without digits. What a training loop adds (a scheduler
    stepped per iteration, the same order in every epoch) belongs to the loop.

    Args:
        variant: any variant.

    Returns:
        A copy with the released settings.

    >>> released(HETEROGENEOUS).intermediate
    'released'
    """
    return replace(
        variant,
        name=f"{variant.name} (released)",
        pass_through="released",
        intermediate="released",
        padding="released",
        skip_single_child=False,
        drop_digits=True,
    )
