"""The model over precomputed features: maps of pooled stages and of the text, under the head of a variant."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mat_align._base import TreeModel
from mat_align.head import MATHead
from mat_align.variants import HETEROGENEOUS, Variant
from mat_align.visual_tree import StageTokens, relative_layers
from mat_align.visual_tree._layers import initial_mix


class FeatureMATModel(TreeModel):
    """The head of a variant over frozen towers whose outputs were computed once (ours).

    Pictures come as pooled stage features, labels as a table of text features. The stage maps and one linear map of the
    text, the identity at first, train; a variant of the last token trains the last map alone. A variant with mix="learned"
    makes three softmax mixtures of the tokens of all stages, started at the stages of `relative_layers`.

    Args:
        tokens: maps of the stages, fitted beforehand.
        text: text feature of each label by name.
        variant: what is computed.
        logit_scale: initial logarithm of the factor on the cosines, learned.
        train_text: learn the map of the text.
        dropout: share of the pooled features that the maps do not see in training mode, in [0, 1).
        **settings: settings of `MATHead`.

    Raises:
        ValueError: no text, widths that differ, dropout out of range, or a learned mix of one token.
    """

    def __init__(
        self,
        tokens: StageTokens,
        text: Mapping[str, Tensor],
        variant: Variant = HETEROGENEOUS,
        logit_scale: float = 2.6593,
        train_text: bool = True,
        dropout: float = 0.0,
        **settings: Any,
    ) -> None:
        """Add the trained parts."""
        super().__init__()
        widths = {len(value) for value in text.values()}
        if widths != {tokens.dim}:
            raise ValueError(f"text must hold features of width {tokens.dim}, got widths {sorted(widths)}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        self.tokens = tokens
        self.dropout = nn.Dropout(dropout)
        self.text_map = nn.Linear(tokens.dim, tokens.dim)
        nn.init.eye_(self.text_map.weight)
        nn.init.zeros_(self.text_map.bias)
        self.text_map.requires_grad_(train_text)
        if variant.feature == "last":
            self.tokens.maps[:-1].requires_grad_(False)
        self.mix_logits = None
        if variant.mix == "learned":
            if variant.feature == "last":
                raise ValueError("variant must use more than the last token for mix='learned', got feature='last'")
            self.mix_logits = nn.Parameter(initial_mix(relative_layers(tokens.num_tokens), tokens.num_tokens))
        self._row = {name: row for row, name in enumerate(text)}
        self.register_buffer("table", torch.stack(tuple(text.values())), persistent=False)
        self.logit_scale = nn.Parameter(torch.tensor(logit_scale))
        self.head = MATHead(tokens.dim, variant, **settings)

    def encode_image(self, images: Float[Tensor, "B features"]) -> Float[Tensor, "B M d"]:
        """Tokens of pooled features, or learned mixtures of them; see `StageTokens`."""
        tokens = self.tokens(self.dropout(images))
        return tokens if self.mix_logits is None else self.mix_logits.softmax(dim=-1) @ tokens

    def encode_text(self, names: Sequence[str]) -> Float[Tensor, "n d"]:
        """Mapped text features of labels.

        Args:
            names: keys of the table.

        Raises:
            ValueError: no name, or one that the table lacks.
        """
        missing = [name for name in names if name not in self._row]
        if missing or not len(names):
            raise ValueError(f"names must be known labels, at least one, got {missing[:3] or 'none'}")
        rows = torch.tensor([self._row[name] for name in names], device=self.table.device)
        return self.text_map(self.table[rows])
