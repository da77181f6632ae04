"""Answers of a small LLaVA by likelihood over a closed set, with the attention to its demonstrations calibrated or not.

The demonstrations run once and stay in the cache; each way of weighing them costs only the query's own tokens. That is exact,
as calibration changes the query's rows alone.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache

from app_data.store.errors import DataError
from app_data.weights.llava import IGNORED, IclMini, Shown
from hyper_icl import CalibrationPlan, SegmentMap, calibrate, use_calibrated_attention


class AnswerReader:
    """Log-likelihoods of every answer of a closed set.

    Args:
        model: A trained model.
        answers: The set; an answer may have several tokens.

    Raises:
        DataError: Fewer than two answers, or two with the same tokens.
    """

    def __init__(self, model: IclMini, answers: Sequence[str]) -> None:
        self.model, self.answers = model, tuple(answers)
        self.ids = [tuple(model.answer_ids(answer)) for answer in answers]
        if len(set(self.ids)) != len(self.ids) or len(self.ids) < 2:
            raise DataError(f"answers must be at least two different ones, got {len(self.ids)}")
        begun = {ids[:-1] for ids in self.ids}
        # One pass serves all answers whose beginning it contains: the longest beginnings suffice.
        self.beginnings = [one for one in sorted(begun) if not any(one != b and b[: len(one)] == one for b in begun)]
        use_calibrated_attention(model.llava)

    @torch.no_grad()
    def read(
        self,
        demos: Sequence[Sequence[Shown]],
        queries: Sequence[Shown],
        biases: Mapping[str, Float[Tensor, "batch k"] | None],
    ) -> dict[str, Float[Tensor, "batch answers"]]:
        """Log-likelihoods of the answers after the demonstrations.

        Args:
            demos: Of every query, in prompt order, the same number for each.
            queries: What is asked.
            biases: By name, what is added to the attention to each demonstration (`hierarchy_bias`); None for nothing.

        Returns:
            For each name (batch, answers).
        """
        model, num = self.model, len(demos[0])
        rows = [[*model.start, *(t for shown in row for t in model.demo_ids(shown))] for row in demos]
        length, pad = max(map(len, rows)), model.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        cache = DynamicCache(config=model.llava.config.get_text_config())
        pictures = [shown.features for row in demos for shown in row]
        model.llava.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp_min(0),
            pixel_values=torch.stack(pictures) if pictures else None,
            past_key_values=cache,
            use_cache=True,
        )
        # The query is not part of the map: what follows the prompt counts as query.
        segments = SegmentMap(self._segments(demos, length), torch.full((len(rows),), length), num)
        found = {}
        for name, bias in biases.items():
            plan = None if bias is None or num == 0 else CalibrationPlan(bias, segments)
            with nullcontext() if plan is None else calibrate(model.llava, plan):
                found[name] = self._score(queries, mask, cache)
        return found

    def right(
        self,
        demos: Sequence[Sequence[Shown]],
        queries: Sequence[Shown],
        biases: Mapping[str, Float[Tensor, "batch k"] | None],
    ) -> dict[str, list[bool]]:
        """Whether the likeliest answer is that of each query; see `read`."""
        found = {name: scores.argmax(-1).tolist() for name, scores in self.read(demos, queries, biases).items()}
        return {
            name: [self.answers[i] == query.answer for i, query in zip(best, queries, strict=True)]
            for name, best in found.items()
        }

    def _segments(self, demos: Sequence[Sequence[Shown]], length: int) -> Tensor:
        rows = []
        for row in demos:
            lengths = [len(self.model.demo_ids(shown)) for shown in row]
            ids = [-1] * (length - sum(lengths))
            rows.append(torch.tensor([*ids, *(i for i, n in enumerate(lengths) for _ in range(n))]))
        return torch.stack(rows)

    def _score(self, queries: Sequence[Shown], before: Tensor, cache: DynamicCache) -> Tensor:
        """Run the queries after what the cache holds, and leave the cache as it was."""
        model, found = self.model, torch.full((len(queries), len(self.answers)), -torch.inf)
        asked = [model.question_ids(shown) for shown in queries]
        first = torch.tensor([len(row) - 1 for row in asked])
        for beginning in self.beginnings:
            rows = [[*row, *beginning] for row in asked]
            length = max(map(len, rows))
            ids = torch.tensor([row + [model.tokenizer.pad_token_id] * (length - len(row)) for row in rows])
            mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
            whole = torch.cat((before, mask), dim=1)
            states = model.llava.model(
                input_ids=ids,
                attention_mask=whole,
                position_ids=(whole.cumsum(-1) - 1).clamp_min(0)[:, before.shape[1] :],
                pixel_values=torch.stack([shown.features for shown in queries]),
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            cache.crop(-length)
            at = first.unsqueeze(-1) + torch.arange(len(beginning) + 1)
            states = states[torch.arange(len(rows)).unsqueeze(-1), at]
            log_p = model.llava.lm_head(states).float().log_softmax(-1)
            for column, ids_of in enumerate(self.ids):
                if ids_of[:-1] == beginning[: len(ids_of) - 1]:
                    parts = [log_p[:, place, token] for place, token in enumerate(ids_of)]
                    found[:, column] = torch.stack(parts).sum(0)
        return found


class ExactReader:
    """Greedy answers without a closed set: one pass says whether every token of the answer is the likeliest.

    Args:
        model: A trained model.
    """

    def __init__(self, model: IclMini) -> None:
        self.model = model

    @torch.no_grad()
    def right(
        self,
        demos: Sequence[Sequence[Shown]],
        queries: Sequence[Shown],
        biases: Mapping[str, Float[Tensor, "batch k"] | None],
    ) -> dict[str, list[bool]]:
        """Whether the model would answer each query rightly, its line ending there.

        Args:
            demos: Of every query, in prompt order.
            queries: What is asked, with answers.
            biases: Names; nothing is calibrated here.

        Raises:
            ValueError: A bias is given.
        """
        if any(bias is not None for bias in biases.values()):
            raise ValueError(f"biases must be None, as exact answers are not calibrated, got {sorted(biases)}")
        model = self.model
        batch = model.episode_batch(
            [[*(replace(d, asked=False) for d in row), q] for row, q in zip(demos, queries, strict=True)]
        )
        ids, targets = batch["input_ids"], batch["targets"]
        states = model.llava.model(
            input_ids=ids, attention_mask=batch["attention_mask"], pixel_values=batch["features"], use_cache=False
        ).last_hidden_state
        known = targets != IGNORED
        # The token behind the answer is the line break.
        known[:, 1:] |= known[:, :-1].clone()
        rows, places = known.nonzero(as_tuple=True)
        said = model.llava.lm_head(states[rows, places - 1]).argmax(-1) == ids[rows, places]
        right = torch.ones(len(queries), dtype=torch.bool).scatter_reduce(0, rows, said, "amin")
        return {name: right.tolist() for name in biases}
