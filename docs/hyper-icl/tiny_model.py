"""A tiny random image-text model and a pool of coloured pictures, to try `hier answer` on; its answers mean nothing.

    python docs/hyper-icl/tiny_model.py FOLDER

writes FOLDER/model as `save_pretrained` does (a LLaVA over bytes, with a chat template), FOLDER/pool.jsonl with nine pictures
in FOLDER/pictures/COLOUR/, and FOLDER/COLOUR.png to ask about.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (30, 60, 220)}
SPECIALS = ("<pad>", "<s>", "</s>", "<image>")
TEMPLATE = (
    "{{ bos_token }}Be brief.{% for m in messages %}{{ m['role'][0] }}:{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
SIDE, PATCH = 16, 8


def make_processor(template: str | None = TEMPLATE) -> LlavaProcessor:
    """One token for each byte and four for each picture."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate((*SPECIALS, *letters))}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIALS])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    pictures = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return LlavaProcessor(pictures, tokenizer, PATCH, "default", template, num_additional_image_tokens=1)


def make_model() -> LlavaForConditionalGeneration:
    """Random weights, times 4, or attention is too flat to see a demonstration."""
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"model_type": "llama", "vocab_size": 260, "max_position_embeddings": 1024, **small}
    vision = {"model_type": "clip_vision_model", "image_size": SIDE, "patch_size": PATCH, **small}
    config = LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=3, vision_feature_layer=-1, image_seq_length=4
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim > 1:
                value.mul_(4)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return model.eval()


def save_pool(folder: Path) -> None:
    """Noisy pictures of three colours: three of each in the pool, and one to ask about."""
    draw, lines = np.random.default_rng(0), []
    for name, colour in COLOURS.items():
        (folder / "pictures" / name).mkdir(parents=True, exist_ok=True)
        for i in range(4):
            file = f"{name}.png" if i == 3 else f"pictures/{name}/{i}.png"
            pixels = np.clip(np.array(colour) + draw.normal(0, 25, (24, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / file)
            if i < 3:
                lines.append({"image": file, "question": f"Color {i}?", "answer": name})
    (folder / "pool.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")


def main(folder: Path) -> None:
    save_pool(folder)
    make_model().save_pretrained(folder / "model")
    make_processor().save_pretrained(folder / "model")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
