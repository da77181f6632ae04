"""The pool with a real taxonomy: emoji by three artists asked about at three levels, and a fourth artist's as queries.

Only subgroups that `icl-mini --data taxonomy` never trained on take part. Anchors train on the pool's own answers and its tree.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from app_data.sets.emoji import load_emoji
from app_data.sets.episodes import IclItems, eye_features
from app_data.sets.levels import QUESTIONS, held_out_subgroups, level_items, picture_paths, shuffled_paths
from app_data.store.errors import DataError
from app_data.weights.lite0_minilm import MiniLM
from app_data.weights.llava import IclMini
from app_eval.ask.demonstration_task import (
    COSINE,
    CURVATURES,
    MU,
    OURS,
    POOL_ARTISTS,
    UNSEEDED,
    WITH,
    WITHOUT,
    Task,
    centred,
)
from app_eval.ask.pool import TrainLift, codes
from app_eval.measure.answers import ExactReader
from hyper_icl import DemoSelection, HyperbolicDemoIndex, RicesSelector, knn_vote

__all__ = ["ANCHORS", "CURVED", "EUCLIDEAN", "SHUFFLED", "LevelTask", "level_codes", "level_task"]

CURVED, EUCLIDEAN, SHUFFLED = f"{OURS}, c 0.1", "anchors, Euclidean", "anchors, hyperbolic, shuffled tree"
# Curvature, weight of the depth, and whether the tree is the pool's own.
ANCHORS = {
    EUCLIDEAN: (CURVATURES["euclidean"], 0.0, True),
    f"{OURS}, mu 0": (1.0, 0.0, True),
    OURS: (1.0, MU, True),
    CURVED: (0.1, MU, True),
    SHUFFLED: (1.0, MU, False),
}


@dataclass(frozen=True)
class LevelTask(Task):
    """A task whose answers lie in a tree.

    Attributes:
        pool_paths, query_paths: Group, subgroup and leaf of each item's picture.
    """

    pool_paths: tuple[tuple[str, str, str], ...] = ()
    query_paths: tuple[tuple[str, str, str], ...] = ()

    def selectors(self) -> tuple[str, ...]:
        """What the model reads: controls, then selectors. A second curvature is judged without it alone."""
        return WITH, WITHOUT, "random", "RICES", COSINE, *(name for name in ANCHORS if name != CURVED)

    def reader(self, model: IclMini) -> ExactReader:
        """Answers are the model's own words."""
        return ExactReader(model)

    def first(self, num: int) -> "LevelTask":
        """The same pool and lifts with the first queries, those of whole pictures."""
        rows = range(max(1, min(num, len(self.query)) // len(QUESTIONS)) * len(QUESTIONS))
        return replace(
            self,
            query=self.query.select(rows),
            query_images=self.query_images[: len(rows)],
            query_texts=self.query_texts[: len(rows)],
            query_paths=self.query_paths[: len(rows)],
        )

    @cached_property
    def hits(self) -> Tensor:
        """Whether a demonstration answers a query: same question, same answer, bool (queries, pool)."""
        keys = [
            [f"{kind}: {answer}" for kind, answer in zip(items.kinds, items.answers, strict=True)]
            for items in (self.query, self.pool)
        ]
        both = codes([*keys[0], *keys[1]])
        return both[: len(keys[0]), None] == both[len(keys[0]) :]

    def lifted(self, c: float, seed: int, own_tree: bool = True) -> tuple[Tensor, Tensor]:
        """Tangents of pool and queries under a lift that is trained on all levels of the tree, the pool's own or a shuffled one."""
        paths = self.pool_paths if own_tree else shuffled_paths(self.pool_paths, seed)
        return self._lifted((c, seed, own_tree), level_codes(self.pool.kinds, paths))

    def choose(self, name: str, k: int, seed: int) -> DemoSelection:
        """See `Task.choose`."""
        if name in (WITH, WITHOUT):
            return self._by_answer(k, right=name == WITH)
        if name == COSINE:
            pool, query = self.joint
            return RicesSelector(pool).search(query, k)
        if name not in ANCHORS:
            return super().choose(name, k, seed)
        c, mu, own_tree = ANCHORS[name]
        pool, query = self.lifted(c, seed, own_tree)
        if name == EUCLIDEAN:
            # The index would score the whole pool in fp64, as its bounds are void for so small a curvature.
            ids = torch.cdist(query.double(), pool.double()).topk(k, largest=False).indices
            return _chosen(ids.flip(-1))
        return HyperbolicDemoIndex(pool, c, mu).search(query, k)

    def _by_answer(self, k: int, right: bool) -> DemoSelection:
        """K demonstrations that ask what the query asks; one of them, at a random place, has its answer, or none."""
        draw, rows = np.random.default_rng(3), []
        asked = np.array(self.pool.questions)
        for question, hit in zip(self.query.questions, self.hits.numpy(), strict=True):
            others = np.flatnonzero((asked == question) & ~hit)
            if k > len(others):
                raise DataError(
                    f"k must be at most {len(others)}, the wrong answers to {question!r} in the pool, got {k}"
                )
            row = draw.choice(others, k, replace=False)
            if right:
                row[draw.integers(k)] = draw.choice(np.flatnonzero(hit))
            rows.append(row)
        return _chosen(torch.from_numpy(np.array(rows)))

    def judged(self, seeds: Sequence[int], k: int) -> dict:
        """What selectors find without a model: of each seed a digit a query, its right demonstrations, and whether the vote is right."""
        found = []
        for name in ("random", "RICES", COSINE, *ANCHORS):
            for seed in seeds[:1] if name in UNSEEDED else seeds:
                chosen = self.choose(name, k, seed)
                hits = self.hits.gather(1, chosen.ids).sum(-1)
                voted = knn_vote(chosen, self.pool.answers)
                right = [str(int(v == a)) for v, a in zip(voted, self.query.answers, strict=True)]
                found.append(
                    {
                        "selector": name,
                        "seed": seed,
                        "k": k,
                        "hits": "".join(map(str, hits.tolist())),
                        "vote": "".join(right),
                    }
                )
        return {"num_queries": len(self.query), "kinds": list(self.query.kinds), "cells": found}


def _chosen(ids: Tensor) -> DemoSelection:
    """Demonstrations that no index has scored."""
    nothing = torch.zeros(ids.shape, dtype=torch.float64)
    each = torch.zeros(len(ids), dtype=torch.int64)
    return DemoSelection(ids, nothing, nothing, each.bool(), each, "ascending")


def level_codes(kinds: Sequence[str], paths: Sequence[tuple[str, str, str]]) -> Tensor:
    """Classes that train a lift, a column for each level of the tree: what asks at this level, by the node that answers it.

    Args:
        kinds: The level of each item's question.
        paths: Of each item's picture.

    Returns:
        int64 (n, 3); what asks at another level has a class of its own there.
    """
    return torch.stack(
        [
            codes(["/".join(p[: depth + 1]) if kind == level else "" for kind, p in zip(kinds, paths, strict=True)])
            for depth, level in enumerate(QUESTIONS)
        ],
        dim=1,
    )


@torch.no_grad()
def level_task(size: int, cache_dir: Path | None, train_lift: TrainLift) -> LevelTask:
    """All leaves of the held-out subgroups; the queries stand in an order drawn once, picture by picture."""
    texts = MiniLM()(list(QUESTIONS.values()))
    texts = F.normalize(texts - texts.mean(0), dim=-1)
    levels, found = list(QUESTIONS), []
    for artists in (POOL_ARTISTS, ("twemoji",)):
        data = load_emoji(artists, size=size, cache_dir=cache_dir)
        paths = picture_paths(data)
        items = level_items(paths, eye_features(data, size, cache_dir), held_out_subgroups(paths))
        if artists != POOL_ARTISTS:
            items = _drawn(items)
        images = centred(items, data.styles)
        asked = texts[[levels.index(kind) for kind in items.kinds]]
        found.append((items, images, asked, tuple(paths[row] for row in items.rows.tolist())))
    (pool, *pool_side), (query, *query_side) = found
    answers = tuple(sorted(set(pool.answers) | set(query.answers)))
    (images, asked, paths), (query_images, query_asked, query_paths) = pool_side, query_side
    return LevelTask(
        "taxonomy",
        pool,
        query,
        answers,
        images,
        query_images,
        asked,
        query_asked,
        train_lift,
        pool_paths=paths,
        query_paths=query_paths,
    )


def _drawn(items: IclItems) -> IclItems:
    """The items in the order of a draw of their pictures."""
    order = np.random.default_rng(0).permutation(np.unique(items.rows))
    place = {row: at for at, row in enumerate(order.tolist())}
    return items.select(sorted(range(len(items)), key=lambda i: (place[int(items.rows[i])], i)))
