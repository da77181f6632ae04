"""Questions about pictures whose features are known: what a small LLaVA is shown in context."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from app_data.read.pictures import PictureSet, StoredPictures
from app_data.sets.vqa import QuestionSet
from app_data.store.features import cached_features
from app_data.weights.lite0_minilm import lite0, lite0_preprocess
from app_data.weights.llava import Shown, text_ids
from app_data.weights.towers import lite0_stages

EMOJI_QUESTION = "what is this?"
HELD_OUT_EVERY = 10


@dataclass(frozen=True)
class IclItems:
    """Questions with one answer each about pictures whose features are known.

    Attributes:
        name: Of the data.
        features: One row a picture.
        rows: Row of each question's picture, int64 (n,).
        questions, answers, kinds: Of each question.
    """

    name: str
    features: Float[Tensor, "pictures width"]
    rows: np.ndarray
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    kinds: tuple[str, ...]

    def __len__(self) -> int:
        """Number of questions."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Shown:
        """The question at `index`, with its answer."""
        return Shown(self.features[self.rows[index]], self.questions[index], self.answers[index])

    def select(self, chosen: Sequence[int] | np.ndarray) -> "IclItems":
        """Some of the questions; pictures stay."""
        texts = ([values[i] for i in chosen] for values in (self.questions, self.answers, self.kinds))
        return IclItems(self.name, self.features, self.rows[np.asarray(chosen)], *(tuple(t) for t in texts))

    @cached_property
    def item_features(self) -> Float[Tensor, "questions width"]:
        """The features of every question's picture."""
        return self.features[torch.from_numpy(self.rows)]


@torch.no_grad()
def eye_features(
    data: StoredPictures, size: int, cache_dir: str | Path | None = None
) -> Float[Tensor, "pictures width"]:
    """What the eye sees of every stored picture, from the cache if it was computed before.

    Args:
        data: Pictures.
        size: Height and width to which they are enlarged.
        cache_dir: Where features are kept; the user's cache folder if None.
    """

    def compute(first: int, end: int) -> Tensor:
        trunk, found = lite0(0), []
        for start in range(first, end, 64):
            pixels = torch.from_numpy(np.array(data.store[start : min(start + 64, end)])).permute(0, 3, 1, 2)
            ready = F.interpolate(lite0_preprocess(pixels), size=(size, size), mode="bilinear", antialias=True)
            found.append(lite0_stages(trunk, ready))
        return torch.cat(found)

    key = f"icl-mini-1-{data.fingerprint}-{len(data.store)}-{size}"
    return cached_features(key, compute, len(data.store), cache_dir)


def easy_vqa_items(data: QuestionSet, features: Float[Tensor, "pictures width"]) -> IclItems:
    """The questions of one part of easy-VQA."""
    answers = tuple(answers[0] for answers in data.answers)
    return IclItems("easy-vqa", features, np.asarray(data.rows), data.questions, answers, data.kinds)


def held_out_pictures(items: IclItems) -> np.ndarray:
    """Which questions are about every tenth picture: those never train, so that settings can be chosen on them."""
    return items.rows % HELD_OUT_EVERY == 0


def emoji_names(names: Sequence[str], tokenizer: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names that are one token, in two halves: those that train, and those that never do.

    Args:
        names: Of all emoji.
        tokenizer: Of the language model.
    """
    single = sorted({name for name in names if len(text_ids(tokenizer, f" {name}")) == 1})
    return tuple(single[::2]), tuple(single[1::2])


def emoji_items(data: PictureSet, features: Float[Tensor, "pictures width"], names: Sequence[str]) -> IclItems:
    """Naming the emoji that have one of these names."""
    known = set(names)
    chosen = [i for i, name in enumerate(data.names) if name in known]
    rows, answers = np.asarray(data.rows)[chosen], tuple(data.names[i] for i in chosen)
    return IclItems("emoji", features, rows, (EMOJI_QUESTION,) * len(rows), answers, ("name",) * len(rows))
