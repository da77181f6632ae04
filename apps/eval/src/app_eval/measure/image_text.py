"""Scores of any BLIP-2 on captioned pictures, from tables with a row for each picture: so two models can be compared.

References: Karpathy and Fei-Fei, CVPR 2015 (recall at 1, 5 and 10 in both directions); Chen et al., 2015 (the COCO caption
evaluation); Mandica et al., arXiv:2408.05097 (a small radius as a sign of uncertainty).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from app_eval.measure.captions import bleu_counts, bleu_of, cider_d, rouge_l_each
from app_eval.measure.interval import Pair, Score, ratio
from hyper_blip import radius_report
from hyper_blip.retrieval import RetrievalScores, target_ranks

KS = (1, 5, 10)
Table = Mapping[str, np.ndarray]
# What might tell errors as well as the radius does, by column: higher is surer, as far as anything is known.
CONTROLS = {
    "max_softmax": "the largest softmax probability",
    "state_norm": "the norm of the Euclidean query states",
    "brightness": "the mean brightness",
    "entropy": "the entropy of the grey values",
    "words": "the mean caption length",
}


def rank_table(scores: RetrievalScores, owner: np.ndarray, suffix: str = "") -> dict[str, Tensor]:
    """How many wrong items score at least as high as the best right one, for each picture and for each text.

    Args:
        scores: of all pairs.
        owner: the picture of each text.
        suffix: of the columns' names.
    """
    right = torch.from_numpy(owner[None, :] == np.arange(len(scores.image_to_text))[:, None])
    return {
        f"text_rank{suffix}": target_ranks(scores.image_to_text, right),
        f"image_rank{suffix}": target_ranks(scores.text_to_image.mT, right.mT),
    }


def recall_scores(table: Table) -> dict[str, Score]:
    """Recall in percent, and the mean of all six, by the contrastive similarity and (if it was run) re-ranked.

    TR: a picture asks for texts. IR: a text asks for pictures; texts of one picture are drawn together.
    """
    owner, num = table["owner"], len(table["text_rank"])
    texts = np.bincount(owner, minlength=num).astype(float)
    found: dict[str, Score] = {}
    for suffix, words in (("", ""), ("_itm", ", re-ranked")):
        if f"text_rank{suffix}" not in table:
            continue
        pairs: dict[str, Pair] = {}
        for k in KS:
            pairs[f"TR@{k}"] = (100.0 * (table[f"text_rank{suffix}"] < k), np.ones(num))
        for k in KS:
            pairs[f"IR@{k}"] = (np.bincount(owner, 100.0 * (table[f"image_rank{suffix}"] < k), num), texts)
        each = {name: ratio(pair) for name, pair in pairs.items()}
        all_six = list(each.values())
        found |= {f"{name}{words}": score for name, score in each.items()}
        found[f"mean recall{words}"] = lambda drawn, all_six=all_six: np.mean([s(drawn) for s in all_six], axis=0)
    return found


def caption_table(references: Sequence[Sequence[str]], captions: Sequence[str]) -> dict[str, Tensor]:
    """What BLEU adds up, ROUGE-L and CIDEr-D of each picture."""
    refs, said = dict(enumerate(references)), dict(enumerate(captions))
    found = {"bleu": np.array(list(bleu_counts(refs, said).values()))}
    found |= {
        name: np.array(list(f(refs, said).values())) for name, f in (("rouge_l", rouge_l_each), ("cider", cider_d))
    }
    return {name: torch.from_numpy(value) for name, value in found.items()}


def caption_scores(table: Table, styles: Sequence[str]) -> dict[str, Score]:
    """BLEU-1 to BLEU-4, ROUGE-L and CIDEr times 100, as papers print them, and CIDEr of each domain where there are several.

    The weights of CIDEr's words come from all pictures, also for a domain and in every resample.
    """
    ones = np.ones(len(table["cider"]))
    found: dict[str, Score] = {
        f"BLEU-{n + 1}": lambda drawn, n=n: 100 * bleu_of(drawn @ table["bleu"])[:, n]
        for n in range(table["bleu"].shape[1] // 2 - 1)
    }
    found["ROUGE-L"] = ratio((100 * table["rouge_l"], ones))
    found["CIDEr"] = ratio((100 * table["cider"], ones))
    domains = [style for style in dict.fromkeys(styles) if style]
    for domain in domains if len(domains) > 1 else []:
        own = np.array([style == domain for style in styles], dtype=float)
        found[f"CIDEr, {domain}"] = ratio((100 * table["cider"] * own, own))
    return found


def auroc(confidence: np.ndarray, wrong: np.ndarray) -> Score:
    """Probability that a wrong item is less sure than a right one, ties counting one half; 0.5 for noise."""
    order = np.argsort(confidence, kind="stable")
    _, starts = np.unique(confidence[order], return_index=True)
    bad = wrong[order].astype(float)

    def score(drawn: np.ndarray) -> np.ndarray:
        drawn = drawn[:, order]
        low, good = (np.add.reduceat(drawn * part, starts, axis=1) for part in (bad, 1 - bad))
        above = good[:, ::-1].cumsum(1)[:, ::-1] - good / 2
        pairs = low.sum(1) * good.sum(1)
        return np.divide((low * above).sum(1), pairs, out=np.full(len(drawn), np.nan), where=pairs > 0)

    return score


def radius_controls(table: Table) -> dict[str, Score]:
    """How well each control tells the pictures whose first text is wrong, by its name."""
    wrong = table["text_rank"] > 0
    return {title: auroc(table[column], wrong) for column, title in CONTROLS.items()}


def radius_scores(table: Table) -> dict[str, Score]:
    """How well the radius tells them."""
    return {"AUROC of errors by the radius": auroc(table["radius"], table["text_rank"] > 0)}


def full_radius_report(table: Table, c: float) -> dict[str, Any]:
    """The report of `hyper_blip.radius_report`, with caption length, brightness and entropy as what the radius may follow."""
    of = {name: torch.from_numpy(column) for name, column in table.items()}
    return radius_report(
        of["radius"],
        of["text_rank"] == 0,
        {CONTROLS[name]: of[name] for name in ("brightness", "entropy", "words")},
        {title: of[column] for column, title in CONTROLS.items()},
        text_radius=of["text_radius"],
        paired_image_radius=of["radius"][of["owner"]],
        c=c,
    )
