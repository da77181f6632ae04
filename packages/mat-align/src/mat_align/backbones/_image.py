"""Image towers in parts: open_clip's ViT and EVA, transformers' CLIP, SigLIP and SigLIP2.

References: Radford et al., "Learning transferable visual models from natural language supervision", 2021 (CLIP); Fang et
al., "EVA-02", 2023; Zhai et al., "Sigmoid loss for language image pre-training", ICCV 2023 (SigLIP, no class token).
What a layer's token is in a tower without class token is ours.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mat_align._checks import check_choice
from mat_align._step import value_pass_through
from mat_align.backbones._layer import Masked


class ImageTower:
    """An image tower in parts; the defaults are those of a tower with a class token in front.

    Attributes:
        module: the tower itself.
        num_blocks: number of blocks.
        width: of the states.
        dim: of the features.
    """

    def __init__(self, module: nn.Module, blocks: nn.ModuleList | list, width: int, dim: int) -> None:
        self.module, self.blocks, self.width, self.dim = module, blocks, width, dim
        self.num_blocks = len(blocks)

    def embed(self, images: Tensor, first: Tensor | None) -> Float[Tensor, "B N w"]:
        """States before the first block, learned tokens `(m w)` last."""
        raise NotImplementedError

    def block(self, number: int, x: Tensor) -> Tensor:
        """One block on all states."""
        return self.blocks[number](x)

    def alone(self, number: int, h: Float[Tensor, "B m w"], mode: str = "value") -> Float[Tensor, "B m w"]:
        """One block in which each token sees only itself: the block on sequences of one token."""
        check_choice("mode", mode, ("value",))
        return self.blocks[number](h.flatten(0, 1).unsqueeze(1)).view(h.shape)

    def summary(self, x: Tensor, num_learned: int) -> Float[Tensor, "B 1 w"]:
        """What a layer's token starts from."""
        return x[:, :1]

    def pool(self, h: Float[Tensor, "B m w"]) -> Float[Tensor, "B m d"]:
        """Tokens that come alone to features."""
        raise NotImplementedError

    def feature(self, x: Tensor, num_learned: int) -> Float[Tensor, "B 1 d"]:
        """The model's own feature from the states after the last block."""
        return self.pool(self.summary(x, num_learned))


class OpenClipViT(ImageTower):
    """open_clip's vision transformer with a class token."""

    def __init__(self, visual: nn.Module) -> None:
        if not visual.transformer.batch_first:
            raise ValueError("visual must keep the batch first, got batch_first=False")
        width = visual.class_embedding.shape[0]
        dim = width if visual.proj is None else visual.proj.shape[1]
        super().__init__(visual, visual.transformer.resblocks, width, dim)

    def embed(self, images: Tensor, first: Tensor | None) -> Float[Tensor, "B N w"]:
        """See `ImageTower`."""
        visual = self.module
        x = visual.conv1(images.to(visual.conv1.weight.dtype)).flatten(2).transpose(1, 2)
        x = torch.cat((visual.class_embedding.to(x.dtype).expand(len(x), 1, -1), x), dim=1)
        x = visual.patch_dropout(x + visual.positional_embedding.to(x.dtype))
        return visual.ln_pre(_appended(x, first))

    def alone(self, number: int, h: Float[Tensor, "B m w"], mode: str = "value") -> Float[Tensor, "B m w"]:
        """See `mat_align.visual_tree.value_pass_through`."""
        # FSDP2 gathers the weights of a block for its forward alone.
        if hasattr(self.blocks[number], "unshard"):
            return super().alone(number, h, mode)
        return value_pass_through(self.blocks[number], h, mode)

    def pool(self, h: Float[Tensor, "B m w"]) -> Float[Tensor, "B m d"]:
        """See `ImageTower`."""
        h = self.module.ln_post(h)
        return h if self.module.proj is None else h @ self.module.proj


class EvaViT(ImageTower):
    """open_clip's EVA, a timm trunk with a class token and rotary positions; learned tokens are not rotated."""

    def __init__(self, visual: nn.Module) -> None:
        trunk = visual.trunk
        if trunk.global_pool != "token" or trunk.dynamic_img_size or getattr(trunk, "rope_mixed", False):
            raise ValueError(f"clip's EVA must pool its class token at one size, got pool {trunk.global_pool!r}")
        dim = next((m.out_features for m in (*reversed(visual.head), trunk.head) if hasattr(m, "out_features")), None)
        super().__init__(visual, trunk.blocks, trunk.embed_dim, dim or trunk.embed_dim)

    def embed(self, images: Tensor, first: Tensor | None) -> Float[Tensor, "B N w"]:
        """See `ImageTower`."""
        trunk = self.module.trunk
        return trunk.norm_pre(_appended(trunk._pos_embed(trunk.patch_embed(images))[0], first))

    def block(self, number: int, x: Tensor) -> Tensor:
        """See `ImageTower`."""
        trunk, rope = self.module.trunk, None
        if trunk.rope is not None:
            rope = trunk.rope.get_embed()  # sines, then cosines, of each patch
            rest = x.shape[1] - trunk.num_prefix_tokens - len(rope)
            still = rope.new_tensor([0.0, 1.0]).repeat_interleave(rope.shape[1] // 2).expand(rest, -1)
            rope = torch.cat((rope, still))
        return self.blocks[number](x, rope=rope)

    def pool(self, h: Float[Tensor, "B m w"]) -> Float[Tensor, "B m d"]:
        """See `ImageTower`."""
        trunk = self.module.trunk
        return self.module.head(trunk.head(trunk.head_drop(trunk.fc_norm(trunk.norm(h)))))


class HFCLIPVision(ImageTower):
    """The vision transformer of transformers' CLIP."""

    def __init__(self, model: nn.Module) -> None:
        tower, self.projection = model.vision_model, model.visual_projection
        blocks = [Masked(layer) for layer in tower.encoder.layers]
        super().__init__(tower, blocks, self.projection.in_features, self.projection.out_features)

    def embed(self, images: Tensor, first: Tensor | None) -> Float[Tensor, "B N w"]:
        """See `ImageTower`."""
        return self.module.pre_layrnorm(_appended(self.module.embeddings(images), first))

    def pool(self, h: Float[Tensor, "B m w"]) -> Float[Tensor, "B m d"]:
        """See `ImageTower`."""
        return self.projection(self.module.post_layernorm(h))


class HFSigLIPVision(ImageTower):
    """The vision transformer of transformers' SigLIP and SigLIP2, whose head attends to all patches.

    A layer's token starts as the mean of the patches; the head then attends to it alone. Learned tokens are not pooled.
    """

    def __init__(self, model: nn.Module) -> None:
        tower = model.vision_model
        if not hasattr(tower, "head"):
            raise ValueError("clip's SigLIP must pool by its attention head, got vision_use_head=False")
        width = tower.post_layernorm.weight.shape[0]
        super().__init__(tower, [Masked(layer) for layer in tower.encoder.layers], width, width)

    def embed(self, images: Tensor, first: Tensor | None) -> Float[Tensor, "B N w"]:
        """See `ImageTower`."""
        embeddings = self.module.embeddings
        if isinstance(embeddings.patch_embedding, nn.Conv2d):
            return _appended(embeddings(images), first)
        # SigLIP2 takes patches (row, column, channel) and the number of them along each side.
        size = embeddings.patch_size
        rows, columns = images.shape[2] // size, images.shape[3] // size
        patches = F.unfold(images, size, stride=size).unflatten(1, (-1, size * size)).permute(0, 3, 2, 1).flatten(2)
        shapes = torch.tensor([[rows, columns]]).expand(len(images), 2)
        return _appended(embeddings(patches, shapes), first)

    def summary(self, x: Tensor, num_learned: int) -> Float[Tensor, "B 1 w"]:
        """The mean of the patches."""
        return x[:, : x.shape[1] - num_learned].mean(dim=1, keepdim=True)

    def pool(self, h: Float[Tensor, "B m w"]) -> Float[Tensor, "B m d"]:
        """See `ImageTower`."""
        return self._head(h.flatten(0, 1).unsqueeze(1)).view(*h.shape[:2], -1)

    def feature(self, x: Tensor, num_learned: int) -> Float[Tensor, "B 1 d"]:
        """See `ImageTower`."""
        return self._head(x[:, : x.shape[1] - num_learned]).unsqueeze(1)

    def _head(self, x: Tensor) -> Tensor:
        return self.module.head(self.module.post_layernorm(x))


def image_tower(model: nn.Module) -> ImageTower:
    """The image tower of a model, or an open_clip tower itself, in parts.

    Raises:
        ValueError: a tower of another kind, such as a residual network.
    """
    if hasattr(model, "vision_model"):
        return HFCLIPVision(model) if hasattr(model, "visual_projection") else HFSigLIPVision(model)
    visual = getattr(model, "visual", model)
    pooled = getattr(visual, "attn_pool", None) is not None or getattr(visual, "pool_type", "tok") != "tok"
    if hasattr(getattr(visual, "transformer", None), "resblocks") and hasattr(visual, "class_embedding") and not pooled:
        return OpenClipViT(visual)
    if type(getattr(visual, "trunk", None)).__name__ == "Eva":
        return EvaViT(visual)
    raise ValueError(
        f"the image tower must be a vision transformer with a class token (open_clip, EVA) or transformers' CLIP or SigLIP, "
        f"got {type(visual).__name__}"
    )


def _appended(x: Tensor, first: Tensor | None) -> Tensor:
    return x if first is None else torch.cat((x, first.to(x.dtype).expand(len(x), -1, -1)), dim=1)
