"""From logits over all nodes to named paths with a probability for every level."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from hier_losses import Taxonomy, decoding
from hier_losses.probabilities import extended_level, level_probabilities

DECODERS = ("joint_path", "bottom_up", "top_down", "level_argmax")


@dataclass(frozen=True)
class Prediction:
    """A path from the top level to the deepest named node: `names[l]` with probability `probabilities[l]` on level l + 1."""

    nodes: tuple[int, ...]
    names: tuple[str, ...]
    probabilities: tuple[float, ...]
    decoder: str

    def __str__(self) -> str:
        return " > ".join(f"{n} ({p:.2f})" for n, p in zip(self.names, self.probabilities, strict=True))


def predict_paths(logits: Float[Tensor, "batch nodes"], tax: Taxonomy, decoder: str = "joint_path") -> list[Prediction]:
    """Decode logits into named paths.

    Args:
        logits: scores of all nodes.
        tax: the taxonomy.
        decoder: one of `DECODERS`.

    Returns:
        One `Prediction` a row; each probability is the softmax among the nodes of that level (shallower leaves included).

    Raises:
        ValueError: for an unknown decoder.
    """
    if decoder not in DECODERS:
        raise ValueError(f"decoder must be one of {DECODERS}, got {decoder!r}")
    paths = getattr(decoding, decoder)(logits, tax)
    probabilities = level_probabilities(logits, tax)
    levels = [extended_level(tax, level + 1).tolist() for level in range(tax.num_levels)]
    column = [{node: i for i, node in enumerate(nodes)} for nodes in levels]
    found = []
    for row, path in enumerate(paths.tolist()):
        nodes = [v for v in path if v >= 0]
        # An extended path repeats a shallow leaf on the levels below it: name it once.
        keep = [level for level, v in enumerate(nodes) if level == 0 or v != nodes[level - 1]]
        chosen = tuple(nodes[level] for level in keep)
        scores = tuple(float(probabilities[level][row, column[level][nodes[level]]]) for level in keep)
        found.append(Prediction(chosen, tuple(tax.names[v] for v in chosen), scores, decoder))
    return found


__all__ = ["DECODERS", "Prediction", "predict_paths"]
