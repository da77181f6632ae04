"""What `icl-study` asks: queries and a pool, as the language model and the selectors see them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from app_data.sets.emoji import load_emoji
from app_data.sets.episodes import IclItems, easy_vqa_items, emoji_items, eye_features, held_out_pictures
from app_data.sets.vqa import load_easy_vqa
from app_data.store.errors import DataError
from app_data.weights.lite0_minilm import MiniLM
from app_data.weights.llava import IclMini
from app_data.weights.towers import LITE0_WIDTHS
from app_eval.ask.pool import TrainLift, codes
from app_eval.measure.answers import AnswerReader, ExactReader
from hyper_icl import (
    DemoSelection,
    HyperbolicDemoIndex,
    HyperbolicLift,
    MmicesSelector,
    RandomSelector,
    RicesSelector,
    TopKClipSelector,
    hierarchy_bias,
)

__all__ = [
    "BLIND", "COSINE", "CURVATURES", "MU", "OURS", "POOL_ARTISTS", "SELECTORS", "UNSEEDED", "WITH", "WITHOUT", "ZERO", "Task", "centred",
    "easy_vqa_tasks", "emoji_task",
]  # fmt: skip

# The distance of tangents at curvature c tends to the Euclidean one as c -> 0: one code for both.
CURVATURES = {"lorentz": 1.0, "euclidean": 1e-6}
MU = 0.3
ZERO, BLIND, OURS = "no demonstrations", "no demonstrations, no picture", "anchors, hyperbolic"
COSINE = "cosine of picture and question"
WITH, WITHOUT = "one right demonstration", "no right demonstration"
# Nothing in these depends on a seed; the others choose by chance, or by a lift that was trained.
UNSEEDED = (ZERO, BLIND, WITH, WITHOUT, "RICES", "MMICES", "TopK-CLIP", COSINE)
SELECTORS = ("random", OURS, "anchors, Euclidean", "RICES", "MMICES", "TopK-CLIP")
POOL_ARTISTS = ("openmoji", "noto-300", "noto-700")


@dataclass(frozen=True)
class Task:
    """Queries and a pool, as the model and the selectors see them.

    Attributes:
        name: Of the data.
        pool, query: Items.
        answers: The closed set.
        pool_images, query_images: Centred picture features, for the selectors.
        pool_texts, query_texts: Centred embeddings of the questions; None where all questions are one.
        train_lift: Trains a lift; only what needs one calls it.
        lifts: Those that are trained.
    """

    name: str
    pool: IclItems
    query: IclItems
    answers: tuple[str, ...]
    pool_images: Tensor
    query_images: Tensor
    pool_texts: Tensor | None = None
    query_texts: Tensor | None = None
    train_lift: TrainLift | None = None
    lifts: dict[tuple, HyperbolicLift] = field(default_factory=dict, repr=False)

    @cached_property
    def joint(self) -> tuple[Tensor, Tensor]:
        """What the lift sees of pool and queries: picture and question."""
        sides = ((self.pool_images, self.pool_texts), (self.query_images, self.query_texts))
        return tuple(F.normalize(torch.cat([x for x in side if x is not None], dim=-1), dim=-1) for side in sides)

    def reader(self, model: IclMini) -> AnswerReader | ExactReader:
        """What judges answers."""
        return AnswerReader(model, self.answers)

    def lifted(self, c: float, seed: int) -> tuple[Tensor, Tensor]:
        """Tangents of pool and queries under a lift that is trained on the pool's answers."""
        return self._lifted((c, seed), codes(self.pool.answers))

    def _lifted(self, key: tuple, classes: Tensor) -> tuple[Tensor, Tensor]:
        """What the lift of this curvature, seed and so on makes of pool and queries; it is trained when first asked for."""
        pool, query = self.joint
        if key not in self.lifts:
            self.lifts[key] = self.train_lift(pool, classes, c=key[0], seed=key[1])
        with torch.no_grad():
            return self.lifts[key](pool).clone(), self.lifts[key](query).clone()

    def selectors(self) -> tuple[str, ...]:
        """The names that apply here."""
        return tuple(name for name in SELECTORS if name != "MMICES" or self.pool_texts is not None)

    def choose(self, name: str, k: int, seed: int) -> DemoSelection:
        """The demonstrations of every query, in prompt order.

        Raises:
            DataError: K is larger than the pool.
        """
        if k > len(self.pool):
            raise DataError(f"k must be at most {len(self.pool)}, the pool of {self.name}, got {k}")
        if name == "random":
            return RandomSelector(len(self.pool), seed).search(len(self.query), k)
        if name in ("TopK-CLIP", "RICES"):
            kind = TopKClipSelector if name == "TopK-CLIP" else RicesSelector
            return kind(self.pool_images).search(self.query_images, k)
        if name == "MMICES":
            return MmicesSelector(self.pool_images, self.pool_texts).search(self.query_images, k, text=self.query_texts)
        c, mu = (CURVATURES["lorentz"], MU) if name == OURS else (CURVATURES["euclidean"], 0.0)
        pool, query = self.lifted(c, seed)
        return HyperbolicDemoIndex(pool, c, mu).search(query, k)

    def bias(self, kind: str, found: DemoSelection, seed: int, lam: float) -> Tensor:
        """Calibration of every demonstration, from distances of this curvature."""
        pool, query = self.lifted(CURVATURES[kind], seed)
        return hierarchy_bias(query, pool[found.ids], CURVATURES[kind], lam=lam)


@torch.no_grad()
def easy_vqa_tasks(
    size: int,
    cache_dir: Path | None,
    num_pool: int,
    num_queries: int,
    train_lift: TrainLift,
    num_training: int = 0,
) -> tuple[Task, Task]:
    """Test questions, and training questions outside the pool; the pool is the same for both."""
    data = load_easy_vqa()
    train, test = (easy_vqa_items(data[p], eye_features(data[p], size, cache_dir)) for p in ("train", "test"))
    draw = np.random.default_rng(0)
    order = draw.permutation(np.flatnonzero(~held_out_pictures(train)))
    pool, rest = train.select(np.sort(order[:num_pool])), train.select(order[num_pool : num_pool + num_training])
    query = test.select(np.sort(draw.permutation(len(test))[:num_queries]))
    parts = (pool, query, rest)
    unique = sorted({q for items in parts for q in items.questions})
    embedded = MiniLM()(unique)
    at = {question: row for row, question in enumerate(unique)}
    texts = [embedded[[at[q] for q in items.questions]] for items in parts]
    # The network's own pooled features stand in for CLIP's.
    images = [items.item_features[:, -LITE0_WIDTHS[-1] :] for items in parts]
    images, texts = ([F.normalize(x - group[0].mean(0), dim=-1) for x in group] for group in (images, texts))
    answers = tuple(sorted({a for items in (train, test) for a in items.answers}))
    return tuple(
        Task("easy-vqa", pool, items, answers, images[0], images[i], texts[0], texts[i], train_lift)
        for i, items in enumerate(parts)
        if i
    )


def emoji_task(model: IclMini, size: int, cache_dir: Path | None, num_queries: int, train_lift: TrainLift) -> Task:
    """Names that never trained: two artists' pictures for a third's."""
    found, answers = [], tuple(model.card["emoji_answers_held_out"])
    for artists in (POOL_ARTISTS, ("twemoji",)):
        data = load_emoji(artists, size=size, cache_dir=cache_dir)
        items = emoji_items(data, eye_features(data, size, cache_dir), answers)
        found.append((items, centred(items, data.styles)))
    (pool, pool_images), (query, query_images) = found
    rows = np.sort(np.random.default_rng(0).permutation(len(query))[:num_queries])
    return Task("emoji", pool, query.select(rows), answers, pool_images, query_images[rows], train_lift=train_lift)


def centred(items: IclItems, styles: Sequence[str]) -> Tensor:
    """Picture features for the selectors: each artist shifts all pictures alike, and the mean of a set takes that out.

    Args:
        items: Questions about pictures.
        styles: The artist of each picture, by the row of its features.
    """
    drawn = np.array(styles)[items.rows]
    # The network's own pooled features stand in for CLIP's.
    images = items.item_features[:, -LITE0_WIDTHS[-1] :].clone()
    for style in sorted(set(drawn)):
        rows = torch.from_numpy(np.flatnonzero(drawn == style))
        images[rows] -= images[rows].mean(0)
    return F.normalize(images, dim=-1)
