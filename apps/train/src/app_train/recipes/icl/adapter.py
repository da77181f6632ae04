"""Recipe `icl-adapter`, the published Hyper-ICL: a student that sees the question alone, and a frozen teacher with demonstrations.

    hier train icl-adapter --model HuggingFaceM4/idefics2-8b-base --data vqav2/ --task vqav2
    hier eval icl HuggingFaceM4/idefics2-8b-base --preset published -k 8 --data DIR --adapter runs/icl-adapter --out runs/published

Reference: Alipour Talemi et al., ICML 2026, arXiv 2606.04434: L = L_H + lam CE, 1,000 instances, AdamW 5e-3, cosine with
10 % warm-up, rank 4, c 0.1, lam 0.5, best epoch. Batch 8, 10 epochs and no weight decay are ours; the paper gives none.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from app_data.read.labelled import Decoding
from app_data.sets.demonstration_tasks import IclTask
from app_data.sets.six_tasks import TASKS
from app_data.store.atomic import new_folder
from app_data.store.errors import DataError
from app_data.store.features import weights_digest
from app_eval.ask.models import LocalModel
from app_train.core.checkpoint import remove_checkpoints
from app_train.core.config import StageConfig
from app_train.core.fit import fit
from app_train.core.interrupt import StopFlag
from app_train.core.run_folder import Run
from app_train.core.schedule import Stage, Step, shuffled
from app_train.recipes.icl.settings import IclAdapterConfig
from hyper_icl import (
    LogitAdapter,
    LorentzAnchorLoss,
    RandomSelector,
    SegmentMap,
    align_suffix,
    attach,
    insert_demos,
    use_calibrated_attention,
)

_RECORD = ("epoch", "anchor", "ce", "held_out_anchor", "held_out_ce")


def run(config: IclAdapterConfig) -> dict:
    """Run the recipe; returns the content of its `result.json`."""
    if config.data is None:
        raise DataError(f"--data is missing: name the folder of the task, which is to hold {TASKS[config.task].files}")
    if not config.data.is_dir():
        raise DataError(f"the folder {config.data} does not exist; it is to hold {TASKS[config.task].files}")
    with Run("icl-adapter", config, ("data",), processes=False) as run:
        model = LocalModel(config.model, plain=True)
        task = TASKS[config.task].load(
            config.data, "train", Decoding(model.picture_size, cache_dir=config.cache_dir), None
        )
        run.claim(f"{task.fingerprint}-{weights_digest(model.model)}")
        if (known := run.result()) is not None:
            return _show(known, config)
        begun = time.monotonic()
        examples = Instances(task, model, config)
        adapter, best = train_adapter(model.model, examples, config, config.out / "train", run.stop)
        with new_folder(config.out / "adapter") as target:
            adapter.save_pretrained(target)
        result = run.finish(
            {
                **run.facts("adapter", config.seed),
                "task": config.task,
                "num_instances": len(examples),
                "trained_parameters": sum(p.numel() for p in adapter.parameters()),
                "best": best.record,
                "epochs": best.history,
                "seconds_of_last_start": round(time.monotonic() - begun),
            }
        )
        remove_checkpoints(config.out / "train")
        run.seal()
    return _show(result, config)


def _show(result: dict, config: IclAdapterConfig) -> dict:
    best = result["best"]
    print(  # noqa: T201
        f"best epoch {best['epoch']:g}: held-out anchor loss {best['held_out_anchor']:.4g}, cross-entropy {best['held_out_ce']:.4g}\n"
        f"scores: hier eval icl {config.model} --adapter {config.out} --data {config.task}:{config.data} --tasks {config.task}"
    )
    return result


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


class Instances(Sequence[Example]):
    """Instances of a task, encoded when they are asked for, with randomly drawn demonstrations, never of the query's own picture.

    Args:
        task: Its training part.
        model: Whose chat template makes the prompts.
        config: Shots, instances, seed.

    Raises:
        DataError: The task is too small.
    """

    def __init__(self, task: IclTask, model: LocalModel, config: IclAdapterConfig) -> None:
        self.task, self.model = task, model
        groups = torch.tensor(task.groups)
        self.drawn = np.random.default_rng(config.seed).permutation(len(task))[: config.num_instances]
        selector = RandomSelector(len(task), config.seed, groups)
        try:
            chosen = selector.search(len(self.drawn), config.shots, groups[torch.from_numpy(self.drawn)])
        except ValueError as error:
            raise DataError(f"{task.name} is too small: {error}") from error
        self.chosen = chosen.ids.tolist()

    def __len__(self) -> int:
        """Number of instances."""
        return len(self.drawn)

    def __getitem__(self, index: Any) -> Any:
        """The instance at an index."""
        query = int(self.drawn[index])
        asked, answer = self.task.demo(query)
        chat = [{"role": "user", "content": asked}]
        said = [{"role": "assistant", "content": answer}]

        def encode(demos: Sequence[int], *more: dict[str, Any]) -> dict[str, Tensor]:
            shown = insert_demos(chat, [self.task.demo(i) for i in demos])
            return dict(self.model.inputs([[*shown, *more]], ask=not more))

        alone, bare = encode((), *said), encode(())
        # The first token that the answer changes: a tokenizer may merge its beginning with the prompt's end.
        prompt = SegmentMap.from_prefixes([bare["input_ids"][0]], alone["input_ids"][0])
        return Example(alone, encode(self.chosen[index], *said), prompt.length - int(prompt.query_start[0]))


def train_adapter(
    model: nn.Module,
    examples: Sequence[Example],
    config: IclAdapterConfig,
    folder: Path | None = None,
    stop: StopFlag | None = None,
) -> tuple[LogitAdapter, "BestEpoch"]:
    """Train an adapter; the model stays frozen.

    Args:
        model: A vision-language model of transformers.
        examples: Instances; the last share of them chooses the epoch.
        config: Settings.
        folder: Receives checkpoints and `metrics.jsonl`; nothing is written if None.
        stop: Read after every step.

    Returns:
        The adapter of the best epoch, and the epochs.

    Raises:
        DataError: Fewer than two instances.
        NonFiniteGradient: The gradient is not finite; the adapter was not changed by it.
    """
    held = max(1, round(config.held_out * len(examples)))
    if len(examples) < 2:
        raise DataError(f"training needs at least two instances, got {len(examples)}")
    num = len(examples) - held
    use_calibrated_attention(model)
    model.requires_grad_(False).eval()
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        adapter = LogitAdapter.for_model(model, config.rank)
    anchor = LorentzAnchorLoss(config.c, config.tangent_scale, config.normalize)
    best = BestEpoch(adapter, config.ce)

    def forward(wrapped: nn.Module, step: Step, rows: np.ndarray):
        (row,) = rows.tolist()
        terms = dict(zip(("anchor", "ce"), _terms(model, wrapped, anchor, examples[row]), strict=True))
        best.sums += torch.tensor([float(term.detach()) for term in terms.values()], dtype=torch.float64)
        return terms["anchor"] + config.ce * terms["ce"], terms

    @torch.no_grad()
    def validate(step: Step) -> None:
        held_out = [_terms(model, adapter, anchor, examples[i]) for i in range(num, len(examples))]
        kept = np.mean([[float(term) for term in terms] for terms in held_out], axis=0)
        best.offer(step.epoch, num, kept)

    settings = StageConfig(
        epochs=config.epochs, lr=config.lr, batch_size=config.batch_size, weight_decay=config.weight_decay,
        warmup=config.warmup,
    )  # fmt: skip
    stage = Stage(
        "adapter", settings, num, forward, order=shuffled(num, config.seed), clip_grad=None,
        micro_batches=config.batch_size, after_epoch=validate, keeper=best, save_every=config.save_every,
    )  # fmt: skip
    fit(
        adapter, [stage], folder, seed=config.seed, label="adapter" if folder else "", stop=stop,
        tensorboard=folder is not None and config.tensorboard,
    )  # fmt: skip
    adapter.load_state_dict(best.state)
    return adapter, best


class BestEpoch:
    """The weights of the epoch with the lowest held-out loss, and what every epoch came to; kept with the checkpoints."""

    def __init__(self, adapter: LogitAdapter, ce: float) -> None:
        self.adapter, self.ce = adapter, ce
        self.state: dict[str, Tensor] = {}
        self.rows = torch.zeros(0, len(_RECORD), dtype=torch.float64)
        self.sums = torch.zeros(2, dtype=torch.float64)  # of the losses of this epoch so far

    @property
    def history(self) -> list[dict[str, float]]:
        """The mean losses of every epoch."""
        return [dict(zip(_RECORD, row, strict=True)) for row in self.rows.tolist()]

    @property
    def losses(self) -> list[float]:
        """The held-out loss of every epoch."""
        return [row["held_out_anchor"] + self.ce * row["held_out_ce"] for row in self.history]

    @property
    def record(self) -> dict[str, float]:
        """The best epoch."""
        return self.history[int(np.argmin(self.losses))]

    def offer(self, epoch: int, num: int, held_out: np.ndarray) -> None:
        """End an epoch of `num` instances; keep the weights as they are if the loss is lower than before."""
        row = torch.tensor([[epoch, *(self.sums / num).tolist(), *held_out]], dtype=torch.float64)
        self.rows, self.sums = torch.cat([self.rows, row]), torch.zeros_like(self.sums)
        if int(np.argmin(self.losses)) == len(self.rows) - 1:
            self.state = {name: value.detach().clone() for name, value in self.adapter.state_dict().items()}

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {"rows": self.rows, "sums": self.sums, **{f"best.{name}": value for name, value in self.state.items()}}

    def restore(self, tensors: Mapping[str, Tensor], index: int) -> None:
        """Take it back."""
        device = next(self.adapter.parameters()).device
        self.rows, self.sums = tensors["rows"], tensors["sums"]
        best = {name.removeprefix("best."): value for name, value in tensors.items() if name.startswith("best.")}
        self.state = {name: value.to(device) for name, value in best.items()}


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
