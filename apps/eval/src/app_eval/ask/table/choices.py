"""Which demonstrations the rows of `hier eval icl` show, and how they are weighed.

Selectors are those of `hier select`. Anchors see picture and question; so does the control "cosine", without anchors.
"""

import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from app_data.sets.demonstration_tasks import IclTask
from app_data.sets.six_tasks import Parts
from app_data.store.errors import DataError
from app_data.store.features import cached_features, weights_digest
from app_data.weights.lite0_minilm import MiniLM, lite0, lite0_preprocess
from app_eval.ask.pool import SIZE, DemoPool, PoolItem, TrainLift
from app_eval.ask.select import Request, selected
from app_eval.ask.table.rows import Row
from hyper_icl import DemoSelection, hierarchy_bias

_BATCH = 64


@dataclass(frozen=True)
class Choices:
    """The choices of one task.

    Attributes:
        parts: Pool and questions.
        train_lift: Trains a lift on features and classes.
        cache_dir: Where features are kept; the user's cache folder if None.
    """

    parts: Parts
    train_lift: TrainLift
    cache_dir: Path | None = None

    @cached_property
    def _pictures(self) -> list[Tensor]:
        """Features of pool and questions; of an item with two pictures their mean."""
        encoder, found = lite0(0), []
        for task in (self.parts.pool, self.parts.queries):
            store = task.store

            def compute(first: int, end: int, store: np.ndarray = store) -> Tensor:
                rows = []
                for start in range(first, end, _BATCH):
                    pixels = torch.from_numpy(np.array(store[start : min(start + _BATCH, end)])).permute(0, 3, 1, 2)
                    ready = F.interpolate(lite0_preprocess(pixels), (SIZE, SIZE), mode="bilinear", antialias=True)
                    with torch.no_grad():
                        rows.append(encoder(ready.contiguous(memory_format=torch.channels_last)))
                return torch.cat(rows)

            key = f"icl-table-1 {SIZE} {weights_digest(encoder)} {task.fingerprint}"
            features = cached_features(key, compute, len(store), self.cache_dir)
            found.append(torch.stack([features[list(rows)].mean(0) for rows in task.rows]))
        return found

    @cached_property
    def _joint(self) -> list[Tensor]:
        """Picture and question, each centred on the pool and of length 1; one question for all tells nothing, and is 0."""
        tasks = (self.parts.pool, self.parts.queries)
        unique = sorted({prompt for task in tasks for prompt in task.prompts})
        with torch.no_grad():
            embedded = MiniLM()(unique)
        at = {prompt: row for row, prompt in enumerate(unique)}
        texts = [embedded[[at[prompt] for prompt in task.prompts]] for task in tasks]
        sides = [[F.normalize(x - group[0].mean(0), dim=-1) for x in group] for group in (self._pictures, texts)]
        if len(set(self.parts.pool.prompts)) == 1:
            sides[1] = [torch.zeros_like(x) for x in sides[1]]
        return [torch.cat(pair, dim=-1) for pair in zip(*sides, strict=True)]

    @cached_property
    def _requests(self) -> dict[tuple, Request]:
        return {}

    def _request(self, joint: bool, seed: int, c: float, mu: float) -> Request:
        # Kept, as each trains its lift once, for all numbers of demonstrations.
        key = (joint, seed, c, mu)
        if key not in self._requests:
            pool, queries = self._joint if joint else self._pictures
            task, shared = self.parts.pool, self.parts.shared
            items = tuple(
                PoolItem(Path(str(i)), q, a) for i, q, a in zip(task.ids, task.prompts, task.answers, strict=True)
            )
            groups = torch.tensor(task.groups) if shared else torch.arange(len(task))
            asked = self.parts.queries
            exclude = torch.tensor(asked.groups) if shared else torch.full((len(asked),), -1)
            self._requests[key] = Request(
                DemoPool(items, pool, groups, ()), queries, exclude, 1, mu, 0.0, seed, asked.prompts, self.train_lift, c
            )
        return self._requests[key]

    def choose(self, row: Row, k: int, seed: int) -> DemoSelection:
        """The demonstrations of every question, in prompt order.

        Raises:
            DataError: The pool is too small.
        """
        if not row.select:  # two answers show the form, as OpenFlamingo's prompt without demonstrations does
            row, k = Row("", "random"), 2
        anchors = row.select == "hyperbolic"
        # What a row without anchors chooses knows no curvature.
        own = self._request(
            anchors or row.select == "cosine", seed, row.curvature if anchors else 1.0, row.mu if anchors else 0.0
        )
        request = replace(own, k=k)
        if anchors:
            # The copy would train its lift again.
            request.__dict__["lifted"] = own.lifted
        available = len(own.pool.items) - max(int((own.pool.groups == group).sum()) for group in own.exclude.unique())
        if k > available:
            less = " without the question's own picture" if self.parts.shared else ""
            raise DataError(f"k must be at most {available}, the pool of {self.parts.pool.name}{less}, got {k}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            # As anchors are shown, the most similar last.
            return selected("rices" if row.select == "cosine" else row.select, request)[0]

    def bias(self, row: Row, found: DemoSelection, seed: int, strength: float) -> Tensor:
        """How the demonstrations are weighed: by their distance from the question's point, at the row's curvature."""
        bank, query, _ = self._request(True, seed, row.curvature, row.mu).lifted
        return hierarchy_bias(query, bank.tangent[found.ids], bank.c, lam=strength)

    def demos(self, ids: list[int], bare: bool) -> list[tuple[list[dict], list[dict]]]:
        """Demonstrations as contents of messages; `bare` leaves their pictures out."""
        pool: IclTask = self.parts.pool
        shown = [pool.demo(i) for i in ids]
        if bare:
            shown = [([part for part in asked if part["type"] != "image"], answer) for asked, answer in shown]
        return shown
