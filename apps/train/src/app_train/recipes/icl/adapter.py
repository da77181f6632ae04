"""Trains the published Hyper-ICL adapter: a student that sees the query alone against a frozen teacher with demonstrations.

Reference: Alipour Talemi et al., ICML 2026, arXiv 2606.04434: L = L_H + lam CE, 1,000 instances, AdamW 5e-3, cosine with
10 % warm-up, rank 4, c 0.1, lam 0.5, best epoch. Batch 8, 10 epochs and no weight decay are ours; the paper gives none.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from app_data.sets.demonstration_tasks import IclTask
from app_data.store.errors import DataError
from app_train.core.config import Frozen
from app_train.core.errors import NonFiniteGradient
from hyper_icl import (
    LogitAdapter,
    LorentzAnchorLoss,
    RandomSelector,
    SegmentMap,
    align_suffix,
    attach,
    format_prompt,
    use_calibrated_attention,
)

__all__ = ["PRESETS", "AdapterConfig", "Example", "encode_task", "train_adapter"]


class AdapterConfig(Frozen):
    """How the adapter is trained; the defaults are the paper's where it gives them."""

    rank: int = Field(4, ge=1)
    c: float = Field(0.1, gt=0)
    """Curvature of the anchor loss; the paper tried .01, .1 and 1."""
    ce: float = Field(0.5, ge=0)
    """Weight of the cross-entropy (the paper's lambda)."""
    tangent_scale: Literal["none", "rsqrt_d"] = "none"
    normalize: Literal["none", "d"] = "none"
    """"d" divides the anchor loss by the width; unscaled it dwarfs the cross-entropy, as in the paper."""
    shots: int = Field(8, ge=1)
    """Demonstrations that the teacher sees."""
    num_instances: int = Field(1000, ge=2)
    held_out: float = Field(0.1, gt=0, lt=1)
    """Share of the instances that chooses the best epoch."""
    lr: float = Field(5e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    epochs: int = Field(10, ge=1)
    batch_size: int = Field(8, ge=1)
    warmup: float = Field(0.1, ge=0, lt=1)
    seed: int = 0


PRESETS = {
    "idefics-9b": AdapterConfig(shots=32),
    "idefics2-8b": AdapterConfig(shots=8),
}


@dataclass(frozen=True)
class Example:
    """One instance, without padding.

    Attributes:
        student: The model's inputs for the query alone, its answer at the end, batch 1.
        teacher: The same after the demonstrations.
        num_answer: Tokens of the answer.
    """

    student: dict[str, Tensor]
    teacher: dict[str, Tensor]
    num_answer: int


def encode_task(task: IclTask, processor: Callable[..., Any], config: AdapterConfig) -> Iterator[Example]:
    """Instances of a task with randomly drawn demonstrations, never of the query's own picture.

    Args:
        task: VQA or captioning.
        processor: A transformers processor, called with text and images.
        config: Shots, instances, seed.

    Raises:
        DataError: The task is of another kind, or too small.
    """
    kinds = {"vqa": ("vqa", "answer"), "cider": ("caption", "caption")}
    if task.score not in kinds or any(len(rows) != 1 for rows in task.rows):
        raise DataError(f"the adapter's prompts are for VQA and captioning with one picture, got {task.name}")
    kind, field = kinds[task.score]
    groups = torch.tensor(task.groups)
    drawn = np.random.default_rng(config.seed).permutation(len(task))[: config.num_instances]
    selector = RandomSelector(len(task), config.seed, groups)
    try:
        chosen = selector.search(len(drawn), config.shots, groups[torch.from_numpy(drawn)]).ids
    except ValueError as error:
        raise DataError(f"{task.name} is too small: {error}") from error

    def encode(demos: Sequence[int], query: int, answer: str) -> dict[str, Tensor]:
        items = [{"question": task.prompts[i], field: task.answers[i]} for i in demos]
        text = format_prompt(kind, items, {"question": task.prompts[query]}) + answer
        pictures = [task.pictures(i)[0] for i in (*demos, query)]
        return dict(processor(text=[text], images=[pictures], return_tensors="pt"))

    for row, query in enumerate(drawn.tolist()):
        answer = task.answers[query]
        alone, bare = encode((), query, answer), encode((), query, "")
        # The first token that the answer changes: a tokenizer may merge its beginning with the prompt's end.
        prompt = SegmentMap.from_prefixes([bare["input_ids"][0]], alone["input_ids"][0])
        num_answer = prompt.length - int(prompt.query_start[0])
        yield Example(alone, encode(chosen[row].tolist(), query, answer), num_answer)


def train_adapter(
    model: nn.Module,
    examples: Sequence[Example],
    config: AdapterConfig,
    log: Callable[[dict[str, float]], None] = lambda record: None,
) -> tuple[LogitAdapter, dict[str, float]]:
    """Train an adapter; the model stays frozen.

    Args:
        model: A vision-language model of transformers.
        examples: Instances; the last share of them chooses the epoch.
        config: Settings.
        log: Called with the mean losses of every epoch.

    Returns:
        The adapter of the best epoch, and its record.

    Raises:
        DataError: Fewer than two instances.
        NonFiniteGradient: The gradient is not finite; the adapter was not changed by it.
    """
    held = max(1, round(config.held_out * len(examples)))
    if len(examples) < 2:
        raise DataError(f"training needs at least two instances, got {len(examples)}")
    train, validation = examples[:-held], examples[-held:]
    use_calibrated_attention(model)
    model.requires_grad_(False).eval()
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        adapter = LogitAdapter.for_model(model, config.rank)
    anchor = LorentzAnchorLoss(config.c, config.tangent_scale, config.normalize)
    optimizer = torch.optim.AdamW(adapter.parameters(), config.lr, weight_decay=config.weight_decay)
    steps = config.epochs * math.ceil(len(train) / config.batch_size)
    warm = max(1, round(config.warmup * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * max(0, step - warm) / max(1, steps - warm)))),
    )
    best: tuple[float, dict[str, Tensor], dict[str, float]] | None = None
    for epoch in range(config.epochs):
        order = np.random.default_rng([config.seed, epoch]).permutation(len(train))
        sums = np.zeros(2)
        for start in range(0, len(order), config.batch_size):
            batch = [train[i] for i in order[start : start + config.batch_size]]
            optimizer.zero_grad()
            for example in batch:
                terms = _terms(model, adapter, anchor, example)
                ((terms[0] + config.ce * terms[1]) / len(batch)).backward()
                sums += [float(term.detach()) for term in terms]
            norm = torch.nn.utils.get_total_norm([p.grad for p in adapter.parameters()])
            if not torch.isfinite(norm):
                raise NonFiniteGradient(f"epoch {epoch}, instances {order[start : start + config.batch_size].tolist()}")
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            kept = np.mean([[float(t) for t in _terms(model, adapter, anchor, e)] for e in validation], axis=0)
        names = ("anchor", "ce", "held_out_anchor", "held_out_ce")
        record = {"epoch": epoch, **dict(zip(names, (*(sums / len(train)), *kept), strict=True))}
        log(record)
        loss = float(kept[0] + config.ce * kept[1])
        if best is None or loss < best[0]:
            best = loss, {name: value.detach().clone() for name, value in adapter.state_dict().items()}, record
    adapter.load_state_dict(best[1])
    return adapter, best[2]


def _terms(
    model: nn.Module, adapter: LogitAdapter, anchor: LorentzAnchorLoss, example: Example
) -> tuple[Tensor, Tensor]:
    """Anchor loss over all text layers and shared last tokens, and cross-entropy of the answer."""
    device = next(model.parameters()).device
    student, teacher = ({k: v.to(device) for k, v in part.items()} for part in (example.student, example.teacher))
    with torch.no_grad():
        taught = model(**teacher, output_hidden_states=True, use_cache=False).hidden_states[1:]
    with attach(model, adapter):
        found = model(**student, output_hidden_states=True, use_cache=False)
    shared = int(align_suffix(student["input_ids"], teacher["input_ids"])[0])
    own, given = ([h[:, -shared:] for h in states] for states in (found.hidden_states[1:], taught))
    num = example.num_answer
    ce = F.cross_entropy(found.logits[0, -num - 1 : -1].float(), student["input_ids"][0, -num:])
    return anchor(own, given), ce
