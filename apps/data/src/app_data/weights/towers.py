"""Towers that give one token per depth: pooled stages of EfficientNet-Lite0, and a DINOv2 ViT in open_clip's form.

References: Tan and Le, 2019 (the stages); Oquab et al., "DINOv2", 2024, and Ilharco et al., open_clip, 2021 (the ViT).
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import Dinov2Model

# Channels after the stages 1..6, then the pooled features before the classifier in place of stage 7.
LITE0_WIDTHS = (16, 24, 40, 80, 112, 192, 1280)


def lite0_stages(vision: nn.Module, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch features"]:
    """Averaged feature maps of the stages 1..6 and the network's own pooled features, side by side.

    Args:
        vision: See `app_data.weights.lite0_minilm.lite0`; without classifier.
        pixels: Preprocessed pictures.

    Returns:
        Float[B 1744], widths `LITE0_WIDTHS`.
    """
    x = vision.bn1(vision.conv_stem(pixels.contiguous(memory_format=torch.channels_last)))
    pooled = []
    for stage in vision.blocks:
        x = stage(x)
        pooled.append(x.mean(dim=(2, 3)))
    last = vision.global_pool(vision.bn2(vision.conv_head(x)))
    return torch.cat([*pooled[:-1], last], dim=1)


def dinov2_visual(model: Dinov2Model, image_size: int) -> nn.Module:
    """A DINOv2 backbone as open_clip's VisionTransformer, with the same weights and a unit projection.

    Args:
        model: A transformers model with plain (not gated) blocks.
        image_size: Side of the pictures, a multiple of the patch; position embeddings are interpolated to it.

    Returns:
        A module whose output equals the model's pooled output, for `mat_align.LayerTokens`.

    Raises:
        ValueError: The side is no multiple of the patch.
    """
    from open_clip.transformer import VisionTransformer

    config = model.config
    if image_size < 1 or image_size % config.patch_size:
        raise ValueError(f"image_size must be a multiple of {config.patch_size}, got {image_size}")
    visual = VisionTransformer(
        image_size,
        config.patch_size,
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.mlp_ratio,
        ls_init_value=1.0,
        output_dim=config.hidden_size,
        no_ln_pre=True,
        norm_layer=lambda width: nn.LayerNorm(width, eps=config.layer_norm_eps),
    )
    patches = model.embeddings.patch_embeddings.projection
    # open_clip's patch embedding has no bias: it moves into the position embeddings of the patches.
    dummy = torch.zeros(1, (image_size // config.patch_size) ** 2 + 1, config.hidden_size)
    positions = model.embeddings.interpolate_pos_encoding(dummy, image_size, image_size)[0].detach().clone()
    positions[1:] += patches.bias
    state = {
        "class_embedding": model.embeddings.cls_token.reshape(-1),
        "positional_embedding": positions,
        "conv1.weight": patches.weight,
        "ln_post.weight": model.layernorm.weight,
        "ln_post.bias": model.layernorm.bias,
        "proj": torch.eye(config.hidden_size),
    }
    for number, layer in enumerate(model.encoder.layer if hasattr(model, "encoder") else model.layers):
        attention, name = layer.attention, f"transformer.resblocks.{number}"
        packed = (attention.q_proj, attention.k_proj, attention.v_proj)
        state |= {
            f"{name}.attn.in_proj_weight": torch.cat([m.weight for m in packed]),
            f"{name}.attn.in_proj_bias": torch.cat([m.bias for m in packed]),
            f"{name}.attn.out_proj.weight": attention.o_proj.weight,
            f"{name}.attn.out_proj.bias": attention.o_proj.bias,
            f"{name}.ls_1.gamma": layer.layer_scale1.lambda1,
            f"{name}.ls_2.gamma": layer.layer_scale2.lambda1,
            f"{name}.mlp.c_fc.weight": layer.mlp.fc1.weight,
            f"{name}.mlp.c_fc.bias": layer.mlp.fc1.bias,
            f"{name}.mlp.c_proj.weight": layer.mlp.fc2.weight,
            f"{name}.mlp.c_proj.bias": layer.mlp.fc2.bias,
        }
        for ours, theirs in (("ln_1", layer.norm1), ("ln_2", layer.norm2)):
            state |= {f"{name}.{ours}.weight": theirs.weight, f"{name}.{ours}.bias": theirs.bias}
    visual.load_state_dict(state)
    return visual.eval().requires_grad_(False)
