"""Options of a base model, what an adapter remembers of them, and the way to the hub and back; nothing is sent anywhere."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hier_lora import HierLoraCLIP, load_dual_encoder, lora_config


def test_options_reach_from_pretrained(clip_folder, monkeypatch):
    """An 8-bit base needs a GPU and bitsandbytes; that its settings arrive does not."""
    from transformers import AutoConfig, AutoModel, AutoProcessor, BitsAndBytesConfig

    kinds, calls = (AutoConfig, AutoModel, AutoProcessor), []
    found = {kind: kind.from_pretrained(clip_folder) for kind in kinds}
    found[AutoModel] = found[AutoModel], {"missing_keys": []}
    for kind in kinds:
        monkeypatch.setattr(
            kind, "from_pretrained", lambda name, kind=kind, **kw: calls.append((kind, name, kw)) or found[kind]
        )
    told = {"output_loading_info": True}
    eight = BitsAndBytesConfig(load_in_8bit=True)
    options = {"dtype": torch.bfloat16, "device_map": "auto", "quantization_config": eight}
    base = load_dual_encoder("hf:openai/clip-vit-base-patch32", revision="abc", **options)
    assert [(kind, name) for kind, name, _ in calls] == [(kind, "openai/clip-vit-base-patch32") for kind in kinds]
    assert [kw for *_, kw in calls] == [
        {"revision": "abc"},
        {"revision": "abc", **options, **told},
        {"revision": "abc"},
    ]
    assert base.options == {"revision": "abc", "dtype": "bfloat16"}
    calls.clear()
    assert load_dual_encoder("hf:openai/clip-vit-base-patch32").options == {}
    assert [kw for *_, kw in calls] == [{}, told, {}]


def test_an_adapter_remembers_type_and_revision(clip_folder, tax, tmp_path):
    base = load_dual_encoder(f"hf:{clip_folder}", dtype=torch.bfloat16, device_map="cpu", revision="main")
    assert base.logit_scale.dtype == torch.bfloat16
    model = HierLoraCLIP(base, tax, lora_config(base, towers="vision", r=2)).eval()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "hier_lora.json").read_text())["options"] == {"revision": "main", "dtype": "bfloat16"}
    again = HierLoraCLIP.from_pretrained(tmp_path)
    assert again.dual_encoder.logit_scale.dtype == torch.bfloat16
    assert again.dual_encoder.options == {"revision": "main", "dtype": "bfloat16"}
    pixels = torch.rand(2, 3, 32, 32)
    assert torch.equal(again(pixels), model(pixels))
    assert len(again.predict([np.zeros((40, 50, 3), np.uint8)])) == 1


def test_unknown_options_are_named(tiny, clip_folder):
    with pytest.raises(ValueError, match=r"options must be what 'tiny' takes, got \['dtype'\]: .*'dtype'"):
        load_dual_encoder("tiny:8", dtype="float32")
    with pytest.raises(ValueError, match=r"options must be what 'hf' takes, got \['trust_remote_code'\]"):
        load_dual_encoder(f"hf:{clip_folder}", trust_remote_code=False)


class Hub:
    """The two calls of `huggingface_hub.HfApi` that an upload needs."""

    def __init__(self, folder):
        self.folder, self.calls = folder, []

    def create_repo(self, repo_id, **options):
        self.calls.append(("create_repo", repo_id, options))

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        self.calls.append(("upload_folder", repo_id, commit_message))
        self.folder.mkdir()
        for file in Path(folder_path).iterdir():
            (self.folder / file.name).write_bytes(file.read_bytes())
        return SimpleNamespace(commit_url=f"somewhere/{repo_id}/commit/1")


def test_to_the_hub_and_back(tiny_clip, tax, tmp_path, monkeypatch):
    import huggingface_hub

    hub, tokens = Hub(tmp_path / "hub"), []
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token=None: tokens.append(token) or hub)
    base = tiny_clip()
    model = HierLoraCLIP(base, tax, lora_config(base, towers="vision", r=2)).eval()
    assert model.push_to_hub("me/birds", private=True, token="secret") == "somewhere/me/birds/commit/1"
    assert hub.calls[0] == ("create_repo", "me/birds", {"private": True, "exist_ok": True})
    assert hub.calls[1][:2] == ("upload_folder", "me/birds")
    assert tokens == ["secret"]
    model.save_pretrained(tmp_path / "here")
    assert {p.name: p.read_bytes() for p in hub.folder.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "here").iterdir()
    }
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name: asked.append(name) or str(hub.folder))
    again = HierLoraCLIP.from_pretrained("hf:me/birds")
    assert asked == ["me/birds"]
    pixels = torch.rand(2, 3, 32, 32)
    assert torch.equal(again(pixels), model(pixels))
    model.merge_and_unload()
    with pytest.raises(ValueError, match="save before merge_and_unload, or save_merged"):
        model.push_to_hub("me/birds")
    assert len(hub.calls) == 2, "nothing is sent that cannot be written"


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(tiny_clip, tax, reentrant):
    found = []
    for saving in (False, True):
        base = tiny_clip()
        torch.manual_seed(0)
        model = HierLoraCLIP(base, tax, lora_config(base, r=2), "live").train()
        if saving:
            base.plain_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        passes = []
        for layer in base.plain_model.vision_model.encoder.layers:
            layer.mlp.register_forward_pre_hook(lambda module, args, passes=passes: passes.append(module))
        pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        model(pixels)[:, tax.index("oak")].sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if "lora_B" in name})
        assert len(passes) == (4 if saving else 2), "two layers, computed again in the backward pass"
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
