"""Batches for stage 2 and captions from a trained model.

Reference: Li et al., "BLIP-2", ICML 2023, section 4.3 (prompt "a photo of", beam search of width 5). The scores of captions
live in the evaluation app of this repository.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hyper_blip.losses import IGNORED

PROMPT = "a photo of "
STOP = "\n"


def caption_batch(
    captions: Sequence[str],
    tokenizer: Any,
    *,
    num_queries: int,
    image_token_id: int,
    prompt: str = PROMPT,
    max_tokens: int = 32,
    encoder_decoder: bool = False,
) -> dict[str, Tensor]:
    """Inputs and labels of stage 2: image tokens, prompt, caption, line break.

    Args:
        captions: one sentence for each picture.
        tokenizer: of the language model.
        num_queries: Q.
        image_token_id: id that marks the places of the queries.
        prompt: put before every caption, without a loss.
        max_tokens: of a caption, its line break not counted.
        encoder_decoder: the language model reads queries and prompt, and its decoder writes the caption (T5).

    Returns:
        `input_ids`, `attention_mask` and `labels`, padded on the right; labels are -100 but at caption and line break (for an
        encoder-decoder: at caption and end of sentence, and there is nothing else in them).

    Raises:
        ValueError: no caption, or an empty one.
    """
    if not captions:
        raise ValueError("captions must not be empty")
    start = prompt_ids(tokenizer, num_queries, image_token_id, prompt)
    stop = [tokenizer.eos_token_id] if encoder_decoder else tokenizer(STOP, add_special_tokens=False)["input_ids"]
    space = " " if prompt.strip() else ""
    rows = []
    for position, caption in enumerate(captions):
        if not caption.strip():
            raise ValueError(f"captions must not be empty, got {caption!r} at position {position}")
        words = tokenizer(space + caption.strip(), add_special_tokens=False)["input_ids"][:max_tokens]
        rows.append(words + stop)
    if encoder_decoder:
        ids = torch.tensor(start).repeat(len(rows), 1)
        labels = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, IGNORED)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    width = len(start) + max(len(row) for row in rows)
    ids = torch.full((len(rows), width), _pad_id(tokenizer), dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for number, row in enumerate(rows):
        end = len(start) + len(row)
        ids[number, :end] = torch.tensor(start + row)
        mask[number, :end] = 1
        labels[number, len(start) : end] = torch.tensor(row)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def prompt_ids(tokenizer: Any, num_queries: int, image_token_id: int, prompt: str = PROMPT) -> list[int]:
    """Image tokens, what the tokenizer puts before a text, and the prompt without its last space."""
    return [image_token_id] * num_queries + list(tokenizer(prompt.rstrip())["input_ids"])


def _pad_id(tokenizer: Any) -> int:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


@torch.no_grad()
def generate_captions(
    model: torch.nn.Module,
    pixel_values: Tensor,
    tokenizer: Any,
    *,
    prompt: str | None = None,
    num_beams: int = 5,
    min_new_tokens: int = 8,
    max_new_tokens: int = 30,
    batch_size: int = 16,
    **options: Any,
) -> list[str]:
    """Describe pictures.

    Args:
        model: a `HyperBlip2ForConditionalGeneration`, put into evaluation mode.
        pixel_values: pictures `(n 3 H W)`.
        tokenizer: of the language model.
        prompt: what each caption begins with, not returned; that of the model's configuration if None.
        num_beams: width of the beam search.
        min_new_tokens: least length of a caption.
        max_new_tokens: largest length. (A maximum of the whole length would count the Q queries.)
        batch_size: pictures at a time.
        options: further options of `generate`.

    Returns:
        One caption for each picture, cut at the first line break.

    Raises:
        ValueError: batch_size or max_new_tokens below 1.
    """
    for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    model.eval()
    prompt = model.config.prompt if prompt is None else prompt
    start = prompt_ids(tokenizer, model.num_queries, model.config.blip2.image_token_index, prompt)
    # A tokenizer may have no line break.
    ends = {*tokenizer(STOP, add_special_tokens=False)["input_ids"][-1:], tokenizer.eos_token_id} - {None}
    skipped = 0 if model.config.blip2.is_encoder_decoder else len(start)
    found: list[str] = []
    for pixels in pixel_values.split(batch_size):
        ids = torch.tensor([start], device=model.device).expand(len(pixels), -1)
        out = model.generate(
            pixels.to(model.device),
            ids,
            num_beams=num_beams,
            min_new_tokens=min(min_new_tokens, max_new_tokens),
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(ends),
            pad_token_id=_pad_id(tokenizer),
            do_sample=False,
            **options,
        )
        texts = tokenizer.batch_decode(out[:, skipped:], skip_special_tokens=True)
        found += [text.strip().split(STOP)[0].strip() for text in texts]
    return found
