"""What an import costs: peft comes with the first adapter, transformers with the first Hugging Face model."""

import subprocess
import sys

PROGRAM = """
import sys
import torch
import hier_lora

heavy = {"peft", "transformers"}
assert not (heavy | {"huggingface_hub"}) & set(sys.modules), sorted(heavy & set(sys.modules))

from hier_losses import Taxonomy


class Own(torch.nn.Module):
    locator, lora_targets, tower_modules, modules_to_save = "own:1", {}, {}, []

    def __init__(self):
        super().__init__()
        self.logit_scale = torch.nn.Parameter(torch.tensor(1.0))

    def encode_image(self, pixels):
        return pixels.flatten(1)[:, :3]

    def encode_text(self, texts):
        return torch.tensor([[float(len(text)), 1.0, 2.0] for text in texts])

    def preprocess(self, picture):
        return torch.from_numpy(picture.copy()).float()


import numpy as np

model = hier_lora.HierLoraCLIP(Own(), Taxonomy.from_paths([("a", "x"), ("b", "yy")]))
assert len(model.predict([np.ones((2, 2, 3), np.uint8)])) == 1
model.save_pretrained(sys.argv[1])
with model.disable_adapter():
    model.merge_and_unload()
hier_lora.HierLoraCLIP.from_pretrained(sys.argv[1], Own()).predict([np.ones((2, 2, 3), np.uint8)])
assert not heavy & set(sys.modules), sorted(heavy & set(sys.modules))
"""


def test_a_frozen_model_needs_neither_peft_nor_transformers(tmp_path):
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
