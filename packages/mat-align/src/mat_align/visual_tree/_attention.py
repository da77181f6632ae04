"""Attention over a picture's layer tokens, asked by the text of each label.

Reference: Modality Alignment across Trees (arXiv 2510.27391); the Gram form of the logits is ours.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mat_align._checks import check_choice, check_width


def _wide(x: Tensor) -> Tensor:
    """In fp32 or wider: half precision would lose the cosine of two nearly parallel vectors."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cosine_logits(
    features: Float[Tensor, "*b d"], text: Float[Tensor, "*#b d"], logit_scale: float | Tensor
) -> Float[Tensor, "*b"]:
    """exp(logit_scale) times the cosine of two vectors; a vector of length 0 gives 0.

    Args:
        features: visual features.
        text: text features.
        logit_scale: logarithm of the factor.
    """
    features, text = _wide(features), _wide(text)
    tiny = torch.finfo(features.dtype).tiny
    sizes = _length(features, tiny) * _length(text, tiny)
    return _factor(logit_scale, features) * ((features * text).sum(dim=-1) / sizes)


def pooled_logits(
    features: Float[Tensor, "B d"], text: Float[Tensor, "n d"], logit_scale: float | Tensor
) -> Float[Tensor, "B n"]:
    """`cosine_logits` of all pairs.

    Args:
        features: one visual feature per picture.
        text: text features.
        logit_scale: logarithm of the factor.
    """
    dtype = torch.promote_types(torch.promote_types(features.dtype, text.dtype), torch.float32)
    features, text = features.to(dtype), text.to(dtype)
    tiny = torch.finfo(dtype).tiny
    with torch.autocast(text.device.type, enabled=False):
        cosine = (features / _length(features, tiny)[:, None]) @ (text / _length(text, tiny)[:, None]).mT
    return _factor(logit_scale, cosine) * cosine


def _length(x: Tensor, tiny: float) -> Tensor:
    return (x * x).sum(dim=-1).clamp(min=tiny).sqrt()


def _factor(logit_scale: float | Tensor, like: Tensor) -> Tensor:
    return torch.as_tensor(logit_scale, dtype=like.dtype, device=like.device).exp()


class TextQueriedAttention(nn.Module):
    """One visual feature per label: attention of a label's text over the M layer tokens of a picture.

    Q = T W_Q^T + b_Q, K = H W_K^T + b_K, V = H W_V^T + b_V, A = softmax_M(Q K^T / sqrt(d)), v_bj = sum_l A_bjl V_bl

    One head; no norm, no residual, no dropout. W_Q and W_K start uniform in +-sqrt(6/(4d)), W_V at the identity and the
    biases at 0, so at first v is a convex mixture of the tokens. The feature of one label does not depend on the other
    labels. Results are in fp32, or fp64 for fp64 inputs, also under autocast.

    Args:
        dim: width d of the joint space.

    Raises:
        ValueError: dim < 1.

    >>> attention = TextQueriedAttention(8)
    >>> attention.logits(torch.ones(2, 3, 8), torch.eye(8)[:5], 0.0).shape
    torch.Size([2, 5])
    """

    def __init__(self, dim: int) -> None:
        """Make the three projections."""
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        self.dim = dim
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        bound = math.sqrt(6 / (4 * dim))
        nn.init.uniform_(self.query.weight, -bound, bound)
        nn.init.uniform_(self.key.weight, -bound, bound)
        nn.init.eye_(self.value.weight)
        for linear in (self.query, self.key, self.value):
            nn.init.zeros_(linear.bias)

    def weights(self, tokens: Float[Tensor, "B M d"], text: Float[Tensor, "n d"]) -> Float[Tensor, "B n M"]:
        """Attention of every label over the tokens of every picture.

        Args:
            tokens: layer tokens.
            text: text features, not normalised.

        Returns:
            Weights `(B n M)` in [0, 1] that add up to 1.
        """
        return self._weights(self._checked("tokens", tokens), self._checked_text(text))

    def attended(self, tokens: Float[Tensor, "B M d"], text: Float[Tensor, "n d"]) -> Float[Tensor, "B n d"]:
        """The visual feature of every label for every picture; large, see `logits`.

        Args:
            tokens: layer tokens.
            text: text features, not normalised.

        Returns:
            Features `(B n d)`.
        """
        return self.weights(tokens, text) @ _wide(self.value(self._checked("tokens", tokens)))

    def attended_at(self, tokens: Float[Tensor, "B M d"], path_text: Float[Tensor, "B H d"]) -> Float[Tensor, "B H d"]:
        """The visual features of each picture for its own labels.

        Args:
            tokens: layer tokens.
            path_text: text features of H labels for each picture, not normalised.

        Returns:
            Features `(B H d)`.
        """
        if path_text.ndim != 3 or len(path_text) != len(tokens):
            raise ValueError(f"path_text must have shape ({len(tokens)}, H, d), got {tuple(path_text.shape)}")
        tokens = self._checked("tokens", tokens)
        return self._weights(tokens, self._checked("path_text", path_text)) @ _wide(self.value(tokens))

    def logits(
        self,
        tokens: Float[Tensor, "B M d"],
        text: Float[Tensor, "n d"],
        logit_scale: float | Tensor,
        form: str = "gram",
    ) -> Float[Tensor, "B n"]:
        """Scaled cosine of every label's text and its visual feature.

        z_bj = exp(logit_scale) <v_bj, t_j> / (|v_bj| |t_j|)

        The Gram form never makes a (B, n, d) tensor: [S1; S2] = [K_b W_Q; V_b] T^T is one product of shape (B, 2M, n);
        A = softmax_M((S1 + K_b b_Q)/sqrt(d)), <v_bj, t_j> = sum_l A_bjl S2_blj, |v_bj|^2 = A_bj V_b V_b^T A_bj^T.

        Args:
            tokens: layer tokens.
            text: text features, not normalised.
            logit_scale: logarithm of the factor.
            form: "gram", or "naive" for the features themselves.

        Returns:
            Logits `(B n)` in +-exp(logit_scale).

        Raises:
            ValueError: unknown form, no label, or widths that differ.
        """
        check_choice("form", form, ("gram", "naive"))
        tokens, text = self._checked("tokens", tokens), self._checked_text(text)
        if form == "naive":
            return cosine_logits(self.attended(tokens, text), text, logit_scale)
        key, value = self.key(tokens), self.value(tokens)
        num = tokens.shape[1]
        with torch.autocast(tokens.device.type, enabled=False):
            key, value, text = _wide(key), _wide(value), _wide(text)
            query_weight, query_bias = self.query.weight.to(key.dtype), self.query.bias.to(key.dtype)
            products = torch.cat((key @ query_weight, value), dim=1) @ text.mT
            scores = products[:, :num] + (key @ query_bias)[:, :, None]
            a = (scores / math.sqrt(self.dim)).softmax(dim=1)
            tiny = torch.finfo(a.dtype).tiny
            size = (a * (value @ value.mT @ a)).sum(dim=1).clamp(min=tiny).sqrt()
            along = (a * products[:, num:]).sum(dim=1)
            return _factor(logit_scale, along) * (along / (size * _length(text, tiny)))

    def _weights(self, tokens: Tensor, text: Tensor) -> Tensor:
        query, key = _wide(self.query(text)), _wide(self.key(tokens))
        return (query @ key.mT / math.sqrt(self.dim)).softmax(dim=-1)

    def _checked(self, name: str, x: Tensor) -> Tensor:
        check_width(name, x, self.dim)
        return x.to(self.query.weight.dtype)

    def _checked_text(self, text: Tensor) -> Tensor:
        if len(text) == 0:
            raise ValueError("text must hold at least one label, got n = 0")
        return self._checked("text", text)
