"""The model: a frozen CLIP with learned prompts under the head of a variant.

Reference: Modality Alignment across Trees (arXiv 2510.27391).
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mat_align._base import TreeModel
from mat_align.backbones import Backbone, backbone
from mat_align.backbones._layer import Masked
from mat_align.head import MATHead
from mat_align.prompts import PromptLearner, encode_text, label_text, template_features
from mat_align.prompts._learners import LEARNERS
from mat_align.variants import HETEROGENEOUS, Variant
from mat_align.visual_tree import LayerTokens

_FORMAT = 1
# Folders written before labels kept their digits.
_DEFAULTS = {"drop_digits": True}
_CONFIG, _WEIGHTS = "mat_align.json", "mat_align.safetensors"


class MATModel(TreeModel):
    """A frozen CLIP-like model with learned prompts under the head of a variant.

    Only prompts, attention, curvatures and radii (and a learned mix of layers) train; they are fp32.

    Args:
        clip: open_clip model with a vision transformer (or EVA) with class token and a text transformer, transformers'
            CLIP, or a `Backbone`; see `mat_align.backbones`. Its parameters stop asking for gradients. For OpenAI's
            weights build `ViT-B-16-quickgelu`: the state dict does not record it.
        prompts: `MaPLePrompts` or `PromptSRCPrompts` of this model; None for the frozen model's own features.
        variant: what is computed.
        layers: 0-based blocks, see `LayerTokens`; the last one alone for a variant of the last token.
        radius: see `MATHead`.
        chunk_size: labels, and pictures, encoded at a time; the backward encodes each chunk again in place of holding its
            states. None holds them all.
        **settings: further settings of `MATHead`.

    Raises:
        ValueError: from the parts, see there.
    """

    def __init__(
        self,
        clip: nn.Module | Backbone,
        prompts: PromptLearner | None,
        variant: Variant = HETEROGENEOUS,
        layers: Sequence[int] | None = None,
        radius: str = "unit",
        chunk_size: int | None = None,
        **settings: Any,
    ) -> None:
        """Freeze the model and add the trained parts."""
        super().__init__()
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        self.chunk_size = chunk_size
        self.backbone = backbone(clip)
        self.clip = self.backbone.model.requires_grad_(False).eval()
        self.prompts = prompts
        if layers is None and variant.feature == "last":
            layers = (self.backbone.image.num_blocks - 1,)
        self.layers = LayerTokens(self.backbone.image, layers, variant.pass_through, variant.mix)
        if variant.feature == "last" and not self.layers.ends:
            raise ValueError(f"layers must end with the last block for feature='last', got {self.layers.layers}")
        dim = self.backbone.text.dim
        if self.backbone.image.dim != dim:
            raise ValueError(f"clip's towers must share a width, got {self.backbone.image.dim} and {dim}")
        self.head = MATHead(dim, variant, radius=radius, **settings)
        self._ids: dict[str, list[int]] = {}
        self._frozen_text: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> "MATModel":
        """Training mode of the trained parts; the frozen model stays in evaluation mode."""
        super().train(mode)
        self.clip.eval()
        return self

    def shard_frozen(self, mesh: Any = None) -> "MATModel":
        """Spread the blocks of the frozen towers over all processes (FSDP2).

        Each process then holds 1 / processes of them and gathers one block at a time. What trains stays whole on every
        process, for DistributedDataParallel or accelerate, which leave the spread blocks alone. Call it before either of
        them; every process must then take part in every encoding. Blocks that are spread already stay as they are.

        Args:
            mesh: a one-dimensional `DeviceMesh`; all processes, on CUDA if there is any, if None.

        Returns:
            This model.

        Raises:
            ValueError: no process group, a variant with pass_through="released", which reads weights outside of the
                block's forward, or torch before 2.11, which leaves a block spread when checkpointing computes it again.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "shard_frozen needs an initialised process group: start with torchrun or accelerate launch"
            )
        if self.layers.pass_through != "value":
            raise ValueError(f"variant must have pass_through='value' to be sharded, got {self.layers.pass_through!r}")
        if torch.__version__ < (2, 11):
            raise ValueError(f"shard_frozen needs torch 2.11 or later, got {torch.__version__}")
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard
        from torch.distributed.tensor import DTensor

        if mesh is None:
            mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (dist.get_world_size(),))
        for block in (*self.backbone.image.blocks, *self.backbone.text.blocks):
            layer = block.layer if isinstance(block, Masked) else block
            if not isinstance(layer, FSDPModule):
                # Each block is a root of its own, and a root stays whole after its forward unless told otherwise.
                fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        # DistributedDataParallel reads this attribute; its broadcast at the start knows no DTensor.
        self._ddp_params_and_buffers_to_ignore = [n for n, p in self.named_parameters() if isinstance(p, DTensor)]
        return self

    @property
    def logit_scale(self) -> Tensor:
        """Logarithm of the factor on the cosines, frozen."""
        return self.backbone.logit_scale

    def encode_image(self, images: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "B M d"]:
        """Layer tokens of preprocessed pictures, one pass for each.

        Args:
            images: pictures as the model's preprocessing returns them.

        Returns:
            Tokens `(B M d)`, not normalised; the last is the prompted CLIP feature.
        """
        prompts = None if self.prompts is None else self.prompts.visual_prompts()
        return self._in_chunks(self.layers, images, prompts)

    def encode_text(self, names: Sequence[str]) -> Float[Tensor, "n d"]:
        """Features of labels in the learned prompt.

        Args:
            names: node names, cleaned by `label_text`.

        Returns:
            Features `(n d)`, not normalised.

        Raises:
            ValueError: no name, or a prompt that does not fit into the text tower.
        """
        rows, learner = self.tokens_of(names), self.prompts
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=self.logit_scale.device)
        first, deeper = (None, ()) if learner is None else learner.text_prompts()
        return self._in_chunks(lambda part: encode_text(self.backbone, part, first, deeper), ids)

    def tokens_of(self, names: Sequence[str]) -> list[list[int]]:
        """Token ids of labels in the prompt, which no later call computes again.

        What follows the end token of a causal tower changes nothing and is left out: the longest sentence decides how long
        a batch is.

        Args:
            names: node names, cleaned by `label_text`.

        Returns:
            One list for each name.

        Raises:
            ValueError: no name, or a prompt that does not fit into the text tower.
        """
        if not len(names):
            raise ValueError("names must hold at least one label, got n = 0")
        sentence = "a photo of a {}.".format if self.prompts is None else self.prompts.prompt
        new = [name for name in dict.fromkeys(names) if name not in self._ids]
        if new:
            tower = self.backbone.text
            rows = tower.tokenize([sentence(self._label_text(name)) for name in new])
            ends = (tower.end(rows) + 1).tolist() if tower.causal else [rows.shape[1]] * len(rows)
            self._ids.update((name, row[:end].tolist()) for name, row, end in zip(new, rows, ends, strict=True))
        return [self._ids[name] for name in names]

    def _in_chunks(self, encode: Callable[..., Tensor], rows: Tensor, *rest: Any) -> Tensor:
        """`encode` of all rows, in fp32 or wider."""
        if self.chunk_size is None or len(rows) <= self.chunk_size:
            found = encode(rows, *rest)
        elif not torch.is_grad_enabled():
            found = torch.cat([encode(part, *rest) for part in rows.split(self.chunk_size)])
        else:
            options = {"use_reentrant": False, "preserve_rng_state": False}
            found = torch.cat([checkpoint(encode, part, *rest, **options) for part in rows.split(self.chunk_size)])
        return found.to(torch.promote_types(found.dtype, torch.float32))

    @torch.no_grad()
    def frozen_image(self, images: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "B d"]:
        """CLIP features of the frozen model, for `PromptSRCRegularizer`."""
        return self.backbone.encode_image(images)

    def frozen_text(self, names: Sequence[str]) -> Float[Tensor, "n d"]:
        """Unit text features of the frozen model over 60 templates, computed once for each name."""
        new = [name for name in dict.fromkeys(names) if name not in self._frozen_text]
        if new:
            rows = template_features(self.backbone, [self._label_text(name) for name in new])
            self._frozen_text.update(zip(new, rows, strict=True))
        return torch.stack([self._frozen_text[name] for name in names]).to(self.logit_scale.device)

    def trained_state(self) -> dict[str, Tensor]:
        """Everything but the frozen model: what `save_pretrained` writes."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith("clip.")}

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write `mat_align.json` and `mat_align.safetensors`; the frozen model is not part of them.

        Args:
            folder: made if it does not exist.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "format": _FORMAT,
            "variant": asdict(self.variant),
            "layers": list(self.layers.layers),
            "head": self.head.settings,
            "prompts": None if self.prompts is None else {"kind": self.prompts.kind, **self.prompts.settings},
        }
        # One curvature under two names is one tensor: safetensors refuses to write it twice.
        state = _without_aliases(self.trained_state())
        save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, folder / _WEIGHTS)
        (folder / _CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, clip: nn.Module | Backbone) -> "MATModel":
        """Rebuild what `save_pretrained` wrote, around the same frozen model.

        Args:
            folder: the folder.
            clip: the model with the weights used in training.

        Raises:
            ValueError: a folder of another format, or weights that do not fit.
        """
        folder = Path(folder)
        try:
            config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        except RecursionError as error:
            raise ValueError(f"{folder / _CONFIG} is nested too deep to be read") from error
        if config.get("format") != _FORMAT:
            raise ValueError(f"folder must hold format {_FORMAT}, got {config.get('format')} in {folder / _CONFIG}")
        prompts = None
        if config["prompts"] is not None:
            chosen = dict(config["prompts"])
            kind = chosen.pop("kind")
            if kind not in LEARNERS:
                raise ValueError(f"prompts of kind {kind!r} must be defined first; known are {sorted(LEARNERS)}")
            prompts = LEARNERS[kind](clip, **chosen)
        model = cls(clip, prompts, Variant(**_DEFAULTS | config["variant"]), config["layers"], **config["head"])
        stored, expected = load_file(folder / _WEIGHTS), set(_without_aliases(model.trained_state()))
        if set(stored) != expected:
            raise ValueError(f"{folder / _WEIGHTS} must hold {sorted(expected)}, got {sorted(stored)}")
        model.load_state_dict(stored, strict=False)
        return model

    def _label_text(self, name: str) -> str:
        return label_text(name, self.variant.drop_digits)


def _without_aliases(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the first of their names; a curvature that is shared has two."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in state.items():
        if value.data_ptr() not in seen:
            seen.add(value.data_ptr())
            found[name] = value
    return found
