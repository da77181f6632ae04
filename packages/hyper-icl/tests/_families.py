"""Tiny random models of the nine families and their inputs; weights times 4, or attention is too flat to test."""

from dataclasses import dataclass

import torch
import transformers as hf

IMAGE = 100
TEXT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
NAMES = (
    "idefics1",
    "idefics2",
    "idefics3",
    "smolvlm",
    "llava",
    "llava_interleave",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
)


def _idefics1():
    own = {k: v for k, v in TEXT.items() if k != "num_key_value_heads"}
    vision = {("embed_dim" if k == "hidden_size" else k): v for k, v in VISION.items()}
    config = hf.IdeficsConfig(
        **own,
        additional_vocab_size=0,
        cross_layer_interval=1,
        use_resampler=False,
        alpha_initializer="ones",
        vision_config=vision,
        freeze_text_layers=False,
        freeze_vision_layers=False,
    )
    return hf.IdeficsForVisionText2Text, config


def _idefics2():
    perceiver = {
        "hidden_size": 64,
        "resampler_n_latents": 4,
        "resampler_depth": 1,
        "resampler_n_heads": 4,
        "resampler_head_dim": 16,
        "num_key_value_heads": 2,
    }
    text = {"model_type": "mistral", "sliding_window": None, **TEXT}
    config = hf.Idefics2Config(
        text_config=text, vision_config=dict(VISION), perceiver_config=perceiver, image_token_id=IMAGE, pad_token_id=0
    )
    return hf.Idefics2ForConditionalGeneration, config


def _idefics3(kind="Idefics3"):
    text = {"model_type": "llama", **TEXT}
    config = getattr(hf, f"{kind}Config")(
        text_config=text, vision_config=dict(VISION), image_token_id=IMAGE, scale_factor=2, pad_token_id=0
    )
    return getattr(hf, f"{kind}ForConditionalGeneration"), config


def _llava(interleave=False):
    vision = {"model_type": "siglip_vision_model" if interleave else "clip_vision_model", **VISION}
    text = {"model_type": "qwen2" if interleave else "llama", **TEXT}
    config = hf.LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full" if interleave else "default",
        image_seq_length=16,
    )
    return hf.LlavaForConditionalGeneration, config


def _qwen(kind):
    special = dict(
        zip(("vision_start_token_id", "vision_end_token_id", "video_token_id"), (101, 102, 103), strict=True)
    )
    patches = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_heads": 4, "depth": 2}
    if kind == "Qwen2VL":
        vision = {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, **patches}
    else:
        vision = {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64, **patches}
    text = dict(TEXT)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    if kind == "Qwen2_5_VL":
        vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
    if kind == "Qwen3VL":
        vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
        text["head_dim"] = 16
        rope["mrope_interleaved"] = True
    config = getattr(hf, f"{kind}Config")(
        text_config={**text, "rope_parameters": rope}, vision_config=vision, image_token_id=IMAGE, **special
    )
    return getattr(hf, f"{kind}ForConditionalGeneration"), config


_MAKE = {
    "idefics1": _idefics1,
    "idefics2": _idefics2,
    "idefics3": _idefics3,
    "smolvlm": lambda: _idefics3("SmolVLM"),
    "llava": _llava,
    "llava_interleave": lambda: _llava(True),
    "qwen2_vl": lambda: _qwen("Qwen2VL"),
    "qwen2_5_vl": lambda: _qwen("Qwen2_5_VL"),
    "qwen3_vl": lambda: _qwen("Qwen3VL"),
}


def make_model(name):
    """A seeded model in evaluation mode."""
    return grown(*_MAKE[name]())


def grown(kind, config):
    """A seeded model of a class with larger weights; sinks, which transformers leaves empty, are drawn."""
    torch.manual_seed(0)
    model = kind(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
            if name.endswith("sinks"):
                parameter.normal_()
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = 2
    model.generation_config.bos_token_id = 1
    return model.eval()


@dataclass
class Prompt:
    """Inputs of a batch, and the counts that SegmentMap.from_lengths takes."""

    inputs: dict
    prefix: list
    demos: list
    query: list


def image_tokens(name):
    return {"idefics1": 1, "llava": 16, "llava_interleave": 16}.get(name, 4)


def make_prompt(name, batch=2, seed=0, pad=0, text=(5, 5, 4)):
    """bos, two times (image, 5 text tokens), image, 4 text tokens; `pad` more tokens on the left."""
    generator = torch.Generator().manual_seed(seed)
    num = image_tokens(name)
    image_id = IMAGE
    rows = []
    for _ in range(batch):
        row = [1]
        for length in text:
            row += [image_id] * num + torch.randint(3, 90, (length,), generator=generator).tolist()
        rows.append(row)
    ids = torch.tensor(rows)
    ids = torch.nn.functional.pad(ids, (pad, 0), value=0)
    mask = torch.ones_like(ids)
    mask[:, :pad] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    pictures = len(text)
    pixels = torch.randn(batch, pictures, 3, 32, 32, generator=generator)
    if name == "idefics1":
        # Every token looks at the latest image before it.
        latest = (ids == image_id).cumsum(-1)
        seen = torch.nn.functional.one_hot(latest, pictures + 1)[..., 1:]
        inputs |= {"pixel_values": pixels, "image_attention_mask": seen}
    elif name.startswith("qwen"):
        patches = torch.randn(16 * batch * pictures, 96, generator=generator)
        grid = torch.tensor([[1, 4, 4]]).repeat(batch * pictures, 1)
        inputs |= {
            "pixel_values": patches,
            "image_grid_thw": grid,
            "mm_token_type_ids": (ids == image_id).int(),
        }
    elif name.startswith("llava"):
        inputs["pixel_values"] = pixels.flatten(0, 1)
    else:
        inputs["pixel_values"] = pixels
    lengths = [num + length for length in text]
    return Prompt(inputs, [1 + pad] * batch, [lengths[:-1]] * batch, [lengths[-1]] * batch)


# Text models whose attention differs: fused or latent projections, windows, soft caps, sinks.
TEXT_MODELS = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 8}),
    "gemma2": ("Gemma2", {"sliding_window": 8, "head_dim": 16, "attn_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3", {"sliding_window": 8, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}),
    "cohere2": ("Cohere2", {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}),
    "gpt_oss": (
        "GptOss",
        {"sliding_window": 8, "head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1, "rope_parameters": {}},
    ),
    "phi3": ("Phi3", {}),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 2,
        },
    ),
    "opt": ("OPT", {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "persimmon": ("Persimmon", {}),
}


def make_text_model(name, **changed):
    """A seeded text model in evaluation mode; `changed` settings override the family's."""
    kind, own = TEXT_MODELS[name]
    settings = {**TEXT, **own, **changed}
    if settings.get("rope_parameters") == {}:
        settings["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    config = getattr(hf, f"{kind}{'Text' if kind == 'Gemma3' else ''}Config")(**settings)
    return grown(getattr(hf, f"{kind}ForCausalLM"), config)
