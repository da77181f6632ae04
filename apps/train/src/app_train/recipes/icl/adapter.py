"""Trains the published Hyper-ICL adapter: a student that sees the query alone against a frozen teacher with demonstrations.

Reference: Alipour Talemi et al., ICML 2026, arXiv 2606.04434: L = L_H + lam CE, 1,000 instances, AdamW 5e-3, cosine with
10 % warm-up, rank 4, c 0.1, lam 0.5, best epoch. Batch 8, 10 epochs and no weight decay are ours; the paper gives none.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from app_data.sets.demonstration_tasks import IclTask
from app_data.store.errors import DataError
from app_train.core.config import StageConfig
from app_train.core.fit import fit
from app_train.core.schedule import Stage, Step, shuffled
from app_train.recipes.icl.settings import AdapterConfig
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

__all__ = ["Example", "encode_task", "train_adapter"]


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
    sums = {"anchor": 0.0, "ce": 0.0}
    best = BestEpoch(adapter)

    def forward(wrapped: LogitAdapter, step: Step, rows: np.ndarray):
        (row,) = rows.tolist()
        terms = dict(zip(sums, _terms(model, wrapped, anchor, train[row]), strict=True))
        for name, term in terms.items():
            sums[name] += float(term.detach())
        return terms["anchor"] + config.ce * terms["ce"], terms

    @torch.no_grad()
    def validate(step: Step) -> None:
        kept = np.mean([[float(t) for t in _terms(model, adapter, anchor, e)] for e in validation], axis=0)
        record = {"epoch": step.epoch, **{name: value / len(train) for name, value in sums.items()}}
        record |= dict(zip(("held_out_anchor", "held_out_ce"), kept.tolist(), strict=True))
        sums.update(anchor=0.0, ce=0.0)
        log(record)
        best.offer(float(kept[0] + config.ce * kept[1]), record)

    settings = StageConfig(
        epochs=config.epochs, lr=config.lr, batch_size=config.batch_size, weight_decay=config.weight_decay,
        warmup=config.warmup,
    )  # fmt: skip
    stage = Stage(
        "adapter", settings, len(train), forward, order=shuffled(len(train), config.seed), clip_grad=None,
        micro_batches=config.batch_size, after_epoch=validate,
    )  # fmt: skip
    fit(adapter, [stage], seed=config.seed)
    adapter.load_state_dict(best.state)
    return adapter, best.record


class BestEpoch:
    """The weights of the epoch with the lowest held-out loss."""

    def __init__(self, adapter: LogitAdapter) -> None:
        self.adapter, self.loss = adapter, math.inf
        self.state: dict[str, Tensor] = {}
        self.record: dict[str, float] = {}

    def offer(self, loss: float, record: dict[str, float]) -> None:
        """Keep the weights as they are if the loss is lower than before."""
        if loss < self.loss or not self.state:
            self.loss, self.record = loss, record
            self.state = {name: value.detach().clone() for name, value in self.adapter.state_dict().items()}


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
