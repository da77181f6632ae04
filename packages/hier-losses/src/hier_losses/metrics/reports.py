"""One call for all that one would print about a classifier over a taxonomy."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hier_losses import decoding
from hier_losses._order import show_path
from hier_losses.functional._inputs import IGNORE, check_choice, check_matrix
from hier_losses.metrics._counts import check_paths
from hier_losses.metrics.levels import PRF, class_table, level_calibration, level_prf, top_k_accuracy
from hier_losses.metrics.paths import WeightedAveragePrecisionCounts
from hier_losses.metrics.samples import logit_scores, path_scores
from hier_losses.taxonomy import Taxonomy

_DECODERS = {
    "joint_path": decoding.joint_path,
    "level_argmax": decoding.level_argmax,
    "bottom_up": decoding.bottom_up,
    "top_down": decoding.top_down,
}


@dataclass(frozen=True)
class LevelRow:
    """What one level gets right.

    Attributes:
        level: from 1, the top.
        samples: number of samples whose class on the level is known.
        accuracy, precision, recall, f1: the last three are macro averages.
        ece: expected calibration error of the softmax over the level.
    """

    level: int
    samples: int
    accuracy: float
    precision: float
    recall: float
    f1: float
    ece: float


@dataclass(frozen=True)
class ClassRow:
    """What one class gets right on its own level.

    Attributes:
        node: node id.
        name: full path.
        level: its level.
        support: number of samples at or below it.
        predicted: how often it is predicted.
        precision, recall, f1: 0 where nothing is predicted or occurs.
    """

    node: int
    name: str
    level: int
    support: int
    predicted: int
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class Report:
    """The scores of one set of logits; `str` gives tables to read, `to_dict` plain data, `plot` a figure.

    Attributes:
        decoder: how paths were decoded.
        num_samples: number of samples with a label.
        scores: name and value of each score over all samples.
        levels: one row per level, top first.
        classes: one row per class that occurs or is predicted, in node order.
    """

    decoder: str
    num_samples: int
    scores: dict[str, float]
    levels: tuple[LevelRow, ...]
    classes: tuple[ClassRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return numbers, texts, lists and dictionaries, ready for `json.dump`; None where a score has no samples."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: plain(item) for name, item in value.items()}
            if isinstance(value, (list, tuple)):
                return [plain(item) for item in value]
            return None if isinstance(value, float) and math.isnan(value) else value

        return plain(asdict(self))

    def __str__(self) -> str:
        """Return the scores, the levels, and the ten classes with most samples."""
        lines = [f"{self.num_samples} samples, decoder {self.decoder}"]
        lines += [f"  {name:32s} {value:8.4f}" for name, value in self.scores.items()]
        lines.append("  level  samples  accuracy  precision  recall      f1     ece")
        for row in self.levels:
            lines.append(
                f"  {row.level:5d}  {row.samples:7d}  {row.accuracy:8.4f}  {row.precision:9.4f}  {row.recall:6.4f}"
                f"  {row.f1:6.4f}  {row.ece:6.4f}"
            )
        most = sorted(self.classes, key=lambda row: (-row.support, row.node))[:10]
        lines.append(f"  support  precision  recall      f1  class ({len(most)} of {len(self.classes)})")
        for one in most:
            lines.append(f"  {one.support:7d}  {one.precision:9.4f}  {one.recall:6.4f}  {one.f1:6.4f}  {one.name}")
        return "\n".join(lines)

    def plot(self, ax: Any = None) -> Any:
        """Draw accuracy, macro F1 and calibration error over the levels; needs matplotlib.

        Args:
            ax: the axes to draw into; new ones if None.

        Returns:
            Figure and axes, as the metrics return them.
        """
        import matplotlib.pyplot as plt  # optional, and slow to import

        if ax is None:
            _, ax = plt.subplots()
        level = [row.level for row in self.levels]
        for name in ("accuracy", "f1", "ece"):
            ax.plot(level, [getattr(row, name) for row in self.levels], marker="o", label=name)
        ax.set_xticks(level)
        ax.set_xlabel("level")
        ax.set_ylim(0, 1)
        ax.legend()
        return ax.figure, ax


def report(
    logits: Float[Tensor, "batch nodes"],
    target: Tensor,
    tax: Taxonomy,
    *,
    decoder: str = "joint_path",
    top_k: Sequence[int] = (5,),
    num_bins: int = 15,
    ignore_index: int = IGNORE,
) -> Report:
    """Score logits in every common way.

    Args:
        logits: one score per node.
        target: (B,) node ids, internal ones for partial labels.
        tax: the taxonomy.
        decoder: "joint_path", "level_argmax", "bottom_up" or "top_down".
        top_k: ranks of the accuracies at k beside the first; those above the number of leaves are left out.
        num_bins: bins of the calibration error.
        ignore_index: the target that stands for no label; such samples are left out.

    Returns:
        The report; scores without samples are NaN.

    Raises:
        ValueError: wrong width, target out of range or not integers, unknown decoder.

    >>> tax = Taxonomy.from_paths([("a", "x"), ("a", "y"), ("b",)])
    >>> found = report(torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 1.0, 0.0, 0.0]]), torch.tensor([2, 1]), tax)
    >>> found.scores["full_path_accuracy"], [row.accuracy for row in found.levels], found.classes[0].name
    (1.0, [1.0, 1.0], 'a')
    """
    check_choice("decoder", decoder, tuple(_DECODERS))
    logits = check_matrix("logits", logits, tax.num_nodes)
    tax = tax.to(logits.device)
    paths = _DECODERS[decoder](logits, tax)
    singles = path_scores(paths, target, tax, ignore_index=ignore_index)
    by_level = singles.pop("level_accuracy")
    singles |= logit_scores(logits, target, tax, ignore_index=ignore_index)
    scores = {name: float(score.value) for name, score in singles.items()}
    ranks = [k for k in top_k if k <= tax.num_leaves]
    if ranks:
        ranked = decoding.top_k_paths(logits, tax, max(ranks))
        for k in ranks:
            scores[f"top_{k}_accuracy"] = float(top_k_accuracy(ranked, target, tax, k, ignore_index=ignore_index))
    prf = level_prf(paths, target, tax, ignore_index=ignore_index)
    ece = level_calibration(logits, target, tax, num_bins, ignore_index=ignore_index)
    columns = [by_level.value, *(prf[name] for name in PRF), ece]
    levels = tuple(
        LevelRow(level + 1, int(by_level.denominator[:, level].sum()), *(float(column[level]) for column in columns))
        for level in range(tax.num_levels)
    )
    checked, node = check_paths(paths, target, tax, ignore_index=ignore_index)
    return Report(decoder, len(node), scores, levels, _class_rows(checked, node, tax))


def _class_rows(paths: Tensor, target: Tensor, tax: Taxonomy) -> tuple[ClassRow, ...]:
    counts = WeightedAveragePrecisionCounts._sums(paths, target, tax, "precision")
    # Each class on its own level: below it, a shallow leaf would be counted again.
    own = {name: part[tax.depth - 1, torch.arange(tax.num_nodes, device=part.device)] for name, part in counts.items()}
    table = {name: column.tolist() for name, column in class_table(own).items()}
    support, predicted, depth = own["total"].tolist(), own["predicted"].tolist(), tax.depth.tolist()
    return tuple(
        ClassRow(
            node,
            show_path(tax.path_of(node)),
            depth[node],
            support[node],
            predicted[node],
            *(table[name][node] for name in PRF),
        )
        for node in range(tax.num_nodes)
        if support[node] or predicted[node]
    )
