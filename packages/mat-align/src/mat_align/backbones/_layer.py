"""A block of transformers in the form of open_clip's.

Reference: Wolf et al., "Transformers: State-of-the-art natural language processing", EMNLP 2020.
"""

from torch import Tensor, nn


class Masked:
    """A block of transformers, called as one of open_clip."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        out = self.layer(x, attention_mask=mask)
        return out[0] if isinstance(out, tuple) else out
