"""The published method's adapter: a gated low-rank term on the attention logits, computed as a rewrite of the queries.

Reference: Alipour Talemi et al., "Hyper-ICL", ICML 2026, arXiv 2606.04434, eq. 5-9. It is demonstration-free: the adapted
model reads the query alone. The rewrite, which needs no attention map and leaves sdpa's kernels and GQA alone, is ours.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from hyper_icl._checks import check_count
from hyper_icl._hooks import set_hook
from hyper_icl._routing import check_routed, text_attention_modules

_SETTINGS, _WEIGHTS = "logit_adapter.json", "logit_adapter.safetensors"


class LogitAdapter(nn.Module):
    """S~ = S + diag(g) (Q U_q)(K U_k)^T / sqrt(r) for every text layer and query head, g = sigmoid(LN(Q) w + b).

    LN has no affine part. Initially U_k, w and b are 0, so that the model is unchanged; U_q ~ N(0, 0.02).

    Queries and keys are taken after the rotary embedding, so the added term depends on absolute positions: count
    position_ids from the first real token (transformers does where it makes them from the attention mask).

    Args:
        num_layers: text layers.
        num_heads: query heads.
        head_dim: width of a head.
        r: rank.

    Raises:
        ValueError: a number is below 1.

    >>> sum(p.numel() for p in LogitAdapter(32, 32, 128).parameters())
    1180672
    """

    def __init__(self, num_layers: int, num_heads: int, head_dim: int, r: int = 4) -> None:
        """Initialise as stated."""
        super().__init__()
        self.num_layers, self.num_heads = check_count("num_layers", num_layers), check_count("num_heads", num_heads)
        self.head_dim, self.r = check_count("head_dim", head_dim), check_count("r", r)
        self.u_q = nn.Parameter(0.02 * torch.randn(num_layers, num_heads, head_dim, r))
        self.u_k = nn.Parameter(torch.zeros(num_layers, num_heads, head_dim, r))
        self.w = nn.Parameter(torch.zeros(num_layers, num_heads, head_dim))
        self.b = nn.Parameter(torch.zeros(num_layers, num_heads))

    @classmethod
    def for_model(cls, model: nn.Module, r: int = 4) -> "LogitAdapter":
        """An adapter of the model's sizes, on its device."""
        modules = text_attention_modules(model)
        module = next(iter(modules.values()))
        made = cls(max(modules) + 1, *_heads(module), r)
        return made.to(next(module.parameters()).device)

    def gate(self, layer: int, q: Float[Tensor, "b h t d"]) -> Float[Tensor, "b h t 1"]:
        """G = sigmoid(LN(q) w + b)."""
        normed = F.layer_norm(q, (self.head_dim,))
        w, b = self.w[layer].to(q.dtype), self.b[layer].to(q.dtype)
        return ((normed * w[:, None]).sum(-1) + b[:, None]).sigmoid().unsqueeze(-1)

    def rewrite(self, layer: int, q: Float[Tensor, "b h t d"], scaling: float) -> Float[Tensor, "b h t d"]:
        """q~ = q + g (q U_q) U_k^T / (scaling sqrt(r)): scaling q~ k^T are the adapted logits for any keys.

        Args:
            layer: the text layer.
            q: its queries.
            scaling: factor that attention puts on q k^T.

        Returns:
            Queries of the same shape and dtype.

        Raises:
            ValueError: the queries have other sizes than the adapter.
        """
        if q.shape[1::2] != (self.num_heads, self.head_dim):
            raise ValueError(
                f"adapter must have heads and width of layer {layer}'s queries, {tuple(q.shape[1::2])}, got "
                f"{self.num_heads}, {self.head_dim}"
            )
        u_q, u_k = self.u_q[layer].to(q.dtype), self.u_k[layer].to(q.dtype)
        return q + self.gate(layer, q) * ((q @ u_q) @ u_k.mT) / (scaling * math.sqrt(self.r))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the weights and the sizes."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}, folder / _WEIGHTS
        )
        sizes = {"num_layers": self.num_layers, "num_heads": self.num_heads, "head_dim": self.head_dim, "r": self.r}
        (folder / _SETTINGS).write_text(json.dumps({"format": 1, **sizes}, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "LogitAdapter":
        """Read what `save_pretrained` wrote.

        Raises:
            ValueError: a file is missing or damaged.
        """
        folder = Path(folder)
        try:
            settings = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
            made = cls(settings["num_layers"], settings["num_heads"], settings["head_dim"], settings["r"])
            made.load_state_dict(load_file(folder / _WEIGHTS))
        except (OSError, json.JSONDecodeError, KeyError, SafetensorError, RuntimeError) as error:
            raise ValueError(f"folder must hold a complete saved adapter, got {folder}: {error}") from error
        return made


def _heads(module: nn.Module) -> tuple[int, int]:
    """Number and width of the query heads, whatever the projections: plain, fused (qkv) or latent (MLA)."""
    config = module.config
    num = getattr(module, "num_heads", None) or config.num_attention_heads
    width = getattr(module, "qk_head_dim", None) or getattr(module, "head_dim", None) or config.hidden_size // num
    return num, width


@contextmanager
def attach(model: nn.Module, adapter: LogitAdapter) -> Iterator[LogitAdapter]:
    """Let the adapter rewrite the queries of every text layer inside the block, in this thread or task alone.

    The adapter is no part of the model: freeze the model before training, and give the optimizer the adapter's
    parameters.

    Args:
        model: a model after `use_calibrated_attention`.
        adapter: of the model's sizes; see `LogitAdapter.for_model`.

    Raises:
        ValueError: the attention is not routed here, or the sizes do not fit.
    """
    modules = text_attention_modules(model)
    check_routed(modules)
    for layer, module in modules.items():
        if layer >= adapter.num_layers or _heads(module) != (adapter.num_heads, adapter.head_dim):
            heads, width = _heads(module)
            raise ValueError(
                f"adapter must have {max(modules) + 1} layers of {heads} heads of width {width}, got "
                f"{adapter.num_layers}, {adapter.num_heads}, {adapter.head_dim}"
            )
    before = {module: set_hook(module, "adapter", adapter) for module in modules.values()}
    try:
        yield adapter
    finally:
        for module, previous in before.items():
            set_hook(module, "adapter", previous)
