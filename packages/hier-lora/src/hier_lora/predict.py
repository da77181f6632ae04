"""From logits over all nodes to named paths with a probability for every level, or to named labels."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hier_losses import LabelGraph, Taxonomy, decoding
from hier_losses.functional import mcm
from hier_losses.probabilities import extended_level

# Each decoder of hier_losses.decoding that returns one path, with the options that it takes and their defaults.
_OPTIONS: dict[str, dict[str, object]] = {
    "joint_path": {},
    "bottom_up": {},
    "top_down": {},
    "level_argmax": {},
    "crm": {"candidates": "leaves", "distance": "height", "probabilities": "leaf"},
    "threshold": {"tau": 0.5, "probabilities": "leaf"},
}
DECODERS = tuple(_OPTIONS)


@dataclass(frozen=True)
class Prediction:
    """A path from the top level to the deepest named node: `names[l]` with probability `probabilities[l]` on level l + 1.

    The path is empty where a decoder stops at the root.
    """

    nodes: tuple[int, ...]
    names: tuple[str, ...]
    probabilities: tuple[float, ...]
    decoder: str

    def __str__(self) -> str:
        found = " > ".join(f"{n} ({p:.2f})" for n, p in zip(self.names, self.probabilities, strict=True))
        return found or "(undecided)"


@dataclass(frozen=True)
class LabelPrediction:
    """Labels of a picture, ancestors included: `names` with `probabilities` at or above the threshold, most likely first."""

    names: tuple[str, ...]
    probabilities: tuple[float, ...]

    def __str__(self) -> str:
        found = ", ".join(f"{n} ({p:.2f})" for n, p in zip(self.names, self.probabilities, strict=True))
        return found or "(no label)"


def check_decoder(decoder: str, options: dict[str, object]) -> None:
    """Refuse an unknown decoder, or an option that it does not take.

    Raises:
        ValueError: naming what is known.
    """
    if decoder not in DECODERS:
        raise ValueError(f"decoder must be one of {DECODERS}, got {decoder!r}")
    for name in options:
        if name not in _OPTIONS[decoder]:
            known = ", ".join(_OPTIONS[decoder]) or "none"
            raise ValueError(
                f"{name} must be an option of the decoder {decoder} ({known}), got {name}={options[name]!r}"
            )


def predict_paths(
    logits: Float[Tensor, "batch nodes"],
    tax: Taxonomy,
    decoder: str = "joint_path",
    temperature: Float[Tensor, " levels"] | None = None,
    **options: object,
) -> list[Prediction]:
    """Decode logits into named paths.

    Args:
        logits: scores of all nodes.
        tax: the taxonomy.
        decoder: one of `DECODERS`.
        temperature: one for each level, from `fit_temperatures`; 1 if None. It sets the probabilities that are shown, and
            those that `crm` and `threshold` decide by (the deepest level's); the other decoders compare raw scores.
        options: of the decoder, such as tau=0.7 for "threshold" (0.5 if not given) or candidates="nodes" for "crm".

    Returns:
        One `Prediction` a row; each probability is the softmax among the nodes of that level (shallower leaves included).

    Raises:
        ValueError: for an unknown decoder or option, or a temperature of another length.

    >>> tax = Taxonomy.from_paths([("a", "x"), ("a", "y"), ("b",)])
    >>> print(predict_paths(torch.tensor([[1.0, 0.0, 3.0, 0.0]]), tax)[0])
    a (0.73) > x (0.91)
    """
    check_decoder(decoder, options)
    tax = tax.to(logits.device)
    temperature = torch.ones(tax.num_levels) if temperature is None else temperature.cpu()
    if temperature.shape != (tax.num_levels,):
        raise ValueError(
            f"temperature must hold one number for each of the {tax.num_levels} levels, got {tuple(temperature.shape)}"
        )
    decided = logits / temperature[-1].to(logits.device) if decoder in ("crm", "threshold") else logits
    paths = getattr(decoding, decoder)(decided, tax, **{**_OPTIONS[decoder], **options})
    return _named(paths, logits, tax, temperature, decoder)


def predict_top(
    logits: Float[Tensor, "batch nodes"],
    tax: Taxonomy,
    k: int,
    temperature: Float[Tensor, " levels"] | None = None,
) -> list[list[Prediction]]:
    """Name the paths of the k best leaves of each row, best first.

    Args:
        logits: scores of all nodes.
        tax: the taxonomy.
        k: number of leaves; all if there are fewer.
        temperature: see `predict_paths`.

    >>> tax = Taxonomy.from_paths([("a", "x"), ("a", "y"), ("b",)])
    >>> [str(p) for p in predict_top(torch.tensor([[1.0, 0.0, 3.0, 0.0]]), tax, 2)[0]]
    ['a (0.73) > x (0.91)', 'b (0.27)']
    """
    temperature = torch.ones(tax.num_levels) if temperature is None else temperature.cpu()
    tax = tax.to(logits.device)
    paths = decoding.top_k_paths(logits, tax, min(k, tax.num_leaves)).unbind(1)
    ranked = [_named(part, logits, tax, temperature, "top_k_paths") for part in paths]
    return [list(row) for row in zip(*ranked, strict=True)]


def _named(paths: Tensor, logits: Tensor, tax: Taxonomy, temperature: Tensor, decoder: str) -> list[Prediction]:
    """Names and level probabilities of paths (batch, D)."""
    scores = []
    for level in range(tax.num_levels):
        classes = extended_level(tax, level + 1)
        log_norm = (logits.float() / float(temperature[level])).index_select(1, classes).logsumexp(1)
        own = logits.float().gather(1, paths[:, level : level + 1].clamp(min=0)).squeeze(1) / float(temperature[level])
        scores.append((own - log_norm).exp())
    found = []
    for path, row in zip(paths.tolist(), torch.stack(scores, 1).tolist(), strict=True):
        nodes = [v for v in path if v >= 0]
        # An extended path repeats a shallow leaf on the levels below it: name it once.
        keep = [level for level, v in enumerate(nodes) if level == 0 or v != nodes[level - 1]]
        chosen = tuple(nodes[level] for level in keep)
        names = tuple(tax.names[v] for v in chosen)
        found.append(Prediction(chosen, names, tuple(min(row[level], 1.0) for level in keep), decoder))
    return found


def label_probabilities(
    logits: Float[Tensor, "batch nodes"], graph: Taxonomy | LabelGraph, slope: float = 1.0, offset: float = 0.0
) -> Float[Tensor, "batch nodes"]:
    """sigmoid(slope * MCM(logits) + offset): a parent is never less likely than its child.

    Args:
        logits: scores of all labels.
        graph: the tree or graph of the labels.
        slope: positive, from `fit_sigmoid`.
        offset: from `fit_sigmoid`.

    Returns:
        Values in [0, 1].
    """
    return (slope * mcm(logits, graph) + offset).sigmoid()


def name_labels(
    probabilities: Float[Tensor, "batch nodes"], names: Sequence[str], threshold: float = 0.5
) -> list[LabelPrediction]:
    """The labels at or above a threshold, most likely first.

    Args:
        probabilities: one for each label.
        names: of the labels.
        threshold: in [0, 1].

    Raises:
        ValueError: if the threshold lies outside.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must lie in [0, 1], got {threshold}")
    found = []
    for row in probabilities.tolist():
        order = sorted((v for v, p in enumerate(row) if p >= threshold), key=lambda v: -row[v])
        found.append(LabelPrediction(tuple(names[v] for v in order), tuple(row[v] for v in order)))
    return found


__all__ = ["DECODERS", "LabelPrediction", "Prediction", "check_decoder", "label_probabilities", "name_labels", "predict_paths"]  # fmt: skip
