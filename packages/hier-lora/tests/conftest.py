"""A tiny dual encoder with random weights: it proves plumbing, never results."""

import json
import zlib

import numpy as np
import pytest
import torch
from torch import nn

from hier_lora import load_dual_encoder, register_locator
from hier_losses import Taxonomy


class TinyDualEncoder(nn.Module):
    """Two linear towers; words are hashed into a small vocabulary."""

    def __init__(self, dim: int = 8):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.vision = nn.Sequential(
                nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
            )
            self.projection = nn.Linear(6, dim)
            self.text = nn.ModuleDict({"words": nn.Embedding(64, 6), "head": nn.Linear(6, dim)})
            self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.locator = "tiny:8"
        self.lora_targets = {"vision": r"vision\.0", "text": r"text\.head"}
        self.tower_modules = {"vision": ["vision."], "text": ["text."]}
        self.modules_to_save = ["projection"]
        self.eval()

    def encode_image(self, pixels):
        return self.projection(self.vision(pixels))

    def encode_text(self, texts):
        rows = []
        for text in texts:
            ids = torch.tensor([zlib.crc32(word.encode()) % 64 for word in text.split()])
            rows.append(self.text["words"](ids).mean(0))
        return self.text["head"](torch.stack(rows))

    def preprocess(self, picture):
        return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 255


@pytest.fixture
def tiny():
    register_locator("tiny", lambda name: TinyDualEncoder(int(name)))
    return TinyDualEncoder()


@pytest.fixture
def tax():
    return Taxonomy.from_paths([("animal", "cat"), ("animal", "dog"), ("plant", "oak"), ("plant", "fern"), ("rock",)])


@pytest.fixture
def pixels():
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(c) for c in range(33, 127)]
    vocabulary = [*letters, *[f"{c}</w>" for c in letters], "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    end = vocabulary.index("<|endoftext|>")
    text = {**size, "vocab_size": len(vocabulary), "eos_token_id": end, "bos_token_id": end - 1, "pad_token_id": end}
    config = CLIPConfig(text_config=text, vision_config={**size, "image_size": 32, "patch_size": 16}, projection_dim=8)
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    picture = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(picture, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_clip(clip_folder):
    """Return a function that loads a new tiny CLIP of random weights in the real format."""
    return lambda: load_dual_encoder(f"hf:{clip_folder}")
