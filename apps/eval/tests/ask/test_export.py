"""Merged weights carry the names of the plain model of their own library."""

import torch
from safetensors.torch import load_file
from transformers import CLIPModel

from app_eval.ask.export import export
from helpers import weights
from hier_lora import HierLoraCLIP, load_dual_encoder, lora_config
from hier_losses import Taxonomy


def test_merged_weights_load_into_transformers(tmp_path):
    locator = weights.clip(tmp_path / "clip")
    tax = Taxonomy.from_paths([("a", "x"), ("a", "y"), ("b",)])
    base = load_dual_encoder(locator)
    model = HierLoraCLIP(base, tax, lora_config(base, towers="vision", r=2))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.01)
    export(model, 32, tmp_path / "merged.safetensors")
    plain = CLIPModel.from_pretrained(tmp_path / "clip")
    before = plain.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    plain.load_state_dict(load_file(tmp_path / "merged.safetensors"))
    changed = [name for name, value in plain.state_dict().items() if not torch.equal(value, before[name])]
    assert changed
    assert all(name.startswith("vision_model") for name in changed)
