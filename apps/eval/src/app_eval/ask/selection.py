"""Selection judged without a language model: whether chosen demonstrations carry the label of the query, and its path.

Features are frozen (EfficientNet-Lite0 for pictures, MiniLM for questions), so every row is cheap. What a language model
would do with the demonstrations is not measured here; the k-nearest-neighbour vote is what selection yields without one.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from app_data.read.pictures import StoredPictures
from app_data.sets.emoji import load_emoji
from app_data.sets.vqa import QuestionSet, load_easy_vqa
from app_data.store.atomic import write_json
from app_data.weights.dual_encoder import Lite0MiniLM, load
from app_eval.ask.pool import TrainLift
from app_eval.ask.settings import EvalSelection
from hyper_icl import (
    DemoSelection,
    HyperbolicDemoIndex,
    MmicesSelector,
    RandomSelector,
    TopKClipSelector,
    knn_vote,
)

__all__ = ["Study", "run_study", "score"]

FORMAT = 1
KS = (2, 4, 8)
MUS = (0.0, 0.3, 0.6, 0.9)
CURVATURES = (0.5, 1.0, 2.0)
SEEDS = (0, 1, 2)
# The distance of tangents at curvature c tends to the Euclidean one as c -> 0: one code for both.
EUCLIDEAN = 1e-6


@dataclass(frozen=True)
class Study:
    """A pool and queries with frozen features.

    Attributes:
        name: Name of the data.
        pool: Features that every selector sees, (n, d), and `images` of them, (n, e).
        query: The same of the queries.
        pool_images, query_images: Picture features.
        pool_texts, query_texts: Text features, or None.
        pool_paths, query_paths: Labels from coarse to fine, one tuple an item; the last is the answer.
        classes: Classes that train the lift.
    """

    name: str
    pool: Tensor
    query: Tensor
    pool_images: Tensor
    query_images: Tensor
    pool_texts: Tensor | None
    query_texts: Tensor | None
    pool_paths: tuple[tuple[str, ...], ...]
    query_paths: tuple[tuple[str, ...], ...]
    classes: Tensor


def score(selection: DemoSelection, study: Study) -> dict[str, float]:
    """Shares of demonstrations that agree with the query on each level, and accuracy of the vote.

    Returns:
        "level_1" (coarsest) ... "level_L" (the answer), "path" (all levels at once), "any" (some demonstration has the
        answer) and "vote", each in [0, 1].
    """
    ids = selection.ids.tolist()
    agree = np.array(
        [
            [[a == b for a, b in zip(study.pool_paths[i], truth, strict=True)] for i in row]
            for row, truth in zip(ids, study.query_paths, strict=True)
        ]
    )
    voted = knn_vote(selection, [path[-1] for path in study.pool_paths])
    right = [vote == truth[-1] for vote, truth in zip(voted, study.query_paths, strict=True)]
    levels = {f"level_{i + 1}": float(agree[:, :, i].mean()) for i in range(agree.shape[2])}
    return {
        **levels,
        "path": float(agree.all(-1).mean()),
        "any": float(agree[:, :, -1].any(-1).mean()),
        "vote": float(np.mean(right)),
    }


def _codes(labels: Sequence[object]) -> Tensor:
    known = {label: i for i, label in enumerate(sorted(set(labels), key=str))}
    return torch.tensor([known[label] for label in labels])


@torch.no_grad()
def picture_features(data: StoredPictures, encoder: Lite0MiniLM) -> Tensor:
    """Pooled features of the items' pictures, each picture encoded once."""
    rows, back = np.unique(data.rows, return_inverse=True)
    found = []
    for start in range(0, len(rows), 64):
        picked = torch.from_numpy(np.ascontiguousarray(data.store[rows[start : start + 64]])).permute(0, 3, 1, 2)
        pixels = encoder.preprocess(picked).contiguous(memory_format=torch.channels_last)
        found.append(encoder.vision(pixels))
    return torch.cat(found)[torch.from_numpy(back)].clone()


@torch.no_grad()
def text_features(texts: Sequence[str], encoder: Lite0MiniLM) -> Tensor:
    """Sentence embeddings, each text encoded once."""
    unique = sorted(set(texts))
    embedded = torch.cat([encoder.encode_text(unique[i : i + 64]) for i in range(0, len(unique), 64)])
    at = {text: i for i, text in enumerate(unique)}
    return embedded[torch.tensor([at[text] for text in texts])].clone()


def easy_vqa_study(encoder: Lite0MiniLM, num_pool: int, num_queries: int) -> Study:
    """Questions about drawn shapes; path: kind of answer, answer."""
    parts = load_easy_vqa()
    draw = np.random.default_rng(0)

    def take(data: QuestionSet, num: int) -> QuestionSet:
        return data.select(np.sort(draw.permutation(len(data))[:num]))

    pool, query = take(parts["train"], num_pool), take(parts["test"], num_queries)
    images = [picture_features(data, encoder) for data in (pool, query)]
    texts = [text_features(data.questions, encoder) for data in (pool, query)]
    image_mean, text_mean = images[0].mean(0), texts[0].mean(0)
    images = [F.normalize(x - image_mean, dim=-1) for x in images]
    texts = [F.normalize(x - text_mean, dim=-1) for x in texts]
    joint = [torch.cat(pair, dim=-1) / 2**0.5 for pair in zip(images, texts, strict=True)]
    paths = [
        tuple((kind, answers[0]) for kind, answers in zip(data.kinds, data.answers, strict=True))
        for data in (pool, query)
    ]
    return Study("easy-vqa", *joint, *images, *texts, *paths, _codes(paths[0]))  # type: ignore[call-arg]


def emoji_study(encoder: Lite0MiniLM, num_queries: int) -> Study:
    """Two artists' pictures for a third's; path: group, subgroup, leaf. The lift is trained on subgroups."""
    pool, query = load_emoji(size=96), load_emoji(("twemoji",), size=96)
    query = query.select(np.sort(np.random.default_rng(0).permutation(len(query))[:num_queries]))
    images = [picture_features(data, encoder) for data in (pool, query)]
    # Each artist shifts all pictures alike; the mean of a set takes that out.
    styles = np.array(pool.styles)
    for style in sorted(set(pool.styles)):
        rows = torch.from_numpy(np.flatnonzero(styles == style))
        images[0][rows] -= images[0][rows].mean(0)
    images[1] -= images[1].mean(0)
    images = [F.normalize(x, dim=-1) for x in images]
    paths = []
    for data in (pool, query):
        tree = data.taxonomy
        nodes = tree.paths[torch.from_numpy(data.targets)].tolist()
        paths.append(tuple(tuple(str(node) for node in path if node >= 0) for path in nodes))
    classes = _codes([path[:-1] for path in paths[0]])
    return Study("emoji", *images, *images, None, None, *paths, classes)  # type: ignore[call-arg]


def _lifted(study: Study, c: float, seed: int, train_lift: TrainLift) -> tuple[Tensor, Tensor]:
    lift = train_lift(study.pool, study.classes, c=c, seed=seed)
    with torch.no_grad():
        return lift(study.pool).clone(), lift(study.query).clone()


def study_rows(study: Study, seeds: Sequence[int], train_lift: TrainLift) -> list[dict]:
    """All rows of one data set: {"name", "k", "scores": mean over seeds, "spread": largest minus smallest}."""
    rows = []

    def add(name: str, choose: Callable[[int, int], DemoSelection], over: Sequence[int], **facts: object) -> None:
        for k in KS:
            found = [score(choose(seed, k), study) for seed in over]
            values = {key: [one[key] for one in found] for key in found[0]}
            rows.append(
                {
                    "name": name,
                    "k": k,
                    "seeds": len(over),
                    "scores": {key: round(float(np.mean(v)), 4) for key, v in values.items()},
                    "spread": {key: round(float(np.ptp(v)), 4) for key, v in values.items()},
                    **facts,
                }
            )

    add("random", lambda seed, k: RandomSelector(len(study.pool), seed).search(study.query, k), seeds)
    by_image = TopKClipSelector(study.pool_images)
    add("cosine of pictures (TopK-CLIP, RICES)", lambda _, k: by_image.search(study.query_images, k), [0])
    if study.pool_texts is not None:
        mmices = MmicesSelector(study.pool_images, study.pool_texts)
        add("MMICES", lambda _, k: mmices.search(study.query_images, k, text=study.query_texts), [0])
        both = TopKClipSelector(study.pool)
        add("cosine of picture and question", lambda _, k: both.search(study.query, k), [0])
    lifted = {(c, seed): _lifted(study, c, seed, train_lift) for c in (EUCLIDEAN, *CURVATURES) for seed in seeds}

    def anchors(name: str, c: float, mu: float) -> None:
        indexes, facts = {}, {"mu": mu, "c": c}
        for seed in seeds:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                indexes[seed] = HyperbolicDemoIndex(lifted[c, seed][0], c, mu)
            facts["warned"] = any("equivalent to TopK-CLIP" in str(w.message) for w in caught)
        add(name, lambda seed, k: indexes[seed].search(lifted[c, seed][1], k, order="descending"), seeds, **facts)

    anchors("anchors, Euclidean", EUCLIDEAN, 0.0)
    for mu in MUS:
        anchors(f"anchors, hyperbolic, mu {mu:g}", 1.0, mu)
    for c in CURVATURES:
        if c != 1.0:
            anchors(f"anchors, hyperbolic, mu 0.3, c {c:g}", c, 0.3)
    flat = {seed: [F.normalize(x, dim=-1) for x in lifted[1.0, seed]] for seed in seeds}

    def without_depth(seed: int, k: int) -> DemoSelection:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return HyperbolicDemoIndex(flat[seed][0], 1.0, 0.3).search(flat[seed][1], k, order="descending")

    add("anchors, directions alone (depth does not vary)", without_depth, seeds, mu=0.3, warned=True)
    return rows


def run_study(path: Path, train_lift: TrainLift, quick: bool = False) -> dict:
    """Run the study on easy-VQA and emoji, and write its JSON.

    Args:
        path: The file.
        train_lift: Trains a lift on features and classes.
        quick: Tiny sizes: does it run.
    """
    encoder = load("pip:lite0-minilm")
    seeds = SEEDS[:1] if quick else SEEDS
    steps = 5 if quick else 150
    train_lift = partial(train_lift, steps=steps)
    found = []
    for study in (
        easy_vqa_study(encoder, *((200, 20) if quick else (6000, 500))),
        emoji_study(encoder, 20 if quick else 853),
    ):
        found.append(
            {
                "name": study.name,
                "num_pool": len(study.pool),
                "num_queries": len(study.query),
                "levels": len(study.pool_paths[0]),
                "rows": study_rows(study, seeds, train_lift),
            }
        )
    result = {"format": FORMAT, "quick": quick, "seeds": list(seeds), "steps": steps, "studies": found}
    write_json(path, result)
    return result


def run(config: EvalSelection, train_lift: TrainLift) -> int:
    """The command `hier eval selection`."""
    run_study(config.out, train_lift, config.quick)
    return 0
