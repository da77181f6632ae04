"""Image-text retrieval: scores, re-ranking by the matching head, recall.

Reference: Li et al., "BLIP-2", ICML 2023, section 4.4 (the k nearest by the contrastive score are re-ranked by the matching
head). LAVIS adds the matching logit and the cosine; a distance has another range, so it is not added unless standardised.
"""

import warnings
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hyper_blip.config import check_choice
from hyper_blip.projection import HyperbolicFeatures
from hyper_blip.qformer import image_keys, joint_states

RERANK = ("itm+itc", "itm", "itm+zitc", "none")


class RetrievalScores(NamedTuple):
    """Scores of all pairs; -inf where a pair was no candidate.

    Attributes:
        image_to_text: ranks texts for each picture, `(images texts)`.
        text_to_image: ranks pictures for each text, `(images texts)`.
    """

    image_to_text: Tensor
    text_to_image: Tensor


@torch.no_grad()
def retrieval_scores(
    model: torch.nn.Module,
    images: Tensor | Iterable[Tensor],
    texts: tuple[Tensor, Tensor],
    k_test: int = 128,
    rerank: str | None = None,
    *,
    query_agg: str | None = None,
    mode: str | None = None,
    batch_size: int = 64,
) -> RetrievalScores:
    """Score all pictures against all texts.

    The contrastive similarity chooses `k_test` candidates for each picture and each text; the matching head scores them,
    with the keys and values of each picture computed once.

    Args:
        model: a `HyperBlip2ForPretraining`, put into evaluation mode.
        images: pictures `(images 3 H W)`, or batches of them.
        texts: token ids and attention mask `(texts tokens)`.
        k_test: candidates in each direction.
        rerank: "itm+itc" (sum of matching logit and cosine), "itm", "itm+zitc" (the similarity standardised over all pairs),
            "none"; None is "itm+itc" for the cosine and "itm" otherwise.
        query_agg: see `HyperBlip2ForPretraining.similarity`.
        mode: the contrastive similarity, see there; `rerank` follows it.
        batch_size: pictures, texts and pairs in one pass.

    Returns:
        Scores on the CPU.

    Raises:
        ValueError: k_test or batch_size below 1, an unknown `rerank`, or "itm+itc" without the cosine.
    """
    if k_test < 1:
        raise ValueError(f"k_test must be >= 1, got {k_test}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    cosine = (mode or model.config.hyperbolic.eval_similarity) == "cosine"
    rerank = ("itm+itc" if cosine else "itm") if rerank is None else rerank
    check_choice("rerank", rerank, RERANK)
    if rerank == "itm+itc" and not cosine:
        raise ValueError(
            f"rerank 'itm+itc' needs similarity 'cosine', got {mode or model.config.hyperbolic.similarity!r}: take 'itm+zitc'"
        )
    model.eval()
    ids, mask = texts
    text = _concatenate(
        model.encode_text(ids[i : i + batch_size].to(model.device), mask[i : i + batch_size].to(model.device))
        for i in range(0, len(ids), batch_size)
    )
    batches = images.split(batch_size) if isinstance(images, Tensor) else images
    rows, visual = [], []
    for pixels in batches:
        features = model.vision_features(pixels.to(model.device))
        lifted = model.project_queries(joint_states(model.blip2, features)[0])
        rows.append(model.similarity(lifted, text, query_agg, mode).float().cpu())
        # Kept on the CPU: 5,000 pictures of 257 x 1,408 are 7 GB.
        visual.append(features.cpu())
    itc = torch.cat(rows)
    if rerank == "none":
        return RetrievalScores(itc, itc)
    counts = {"texts": itc.shape[1], "pictures": itc.shape[0]}
    if k_test > min(counts.values()):
        warnings.warn(
            f"k_test {k_test} is larger than the number of {min(counts, key=counts.get)} {min(counts.values())}",
            stacklevel=2,
        )
    chosen = candidates(itc, k_test)
    itm = matching_logits(model, torch.cat(visual), (ids, mask), chosen[0] | chosen[1], batch_size)
    return reranked(itc, itm, chosen, rerank)


def candidates(
    similarity: Float[Tensor, "images texts"], k: int
) -> tuple[Bool[Tensor, "images texts"], Bool[Tensor, "images texts"]]:
    """Pairs that are re-ranked: each picture with its k most similar texts, and each text with its k most similar pictures."""
    found = []
    for scores in (similarity, similarity.mT):
        chosen = scores.topk(min(k, scores.shape[1]), dim=1).indices
        found.append(torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen, True))
    return found[0], found[1].mT


def reranked(
    itc: Float[Tensor, "images texts"],
    itm: Float[Tensor, "images texts"],
    chosen: tuple[Bool[Tensor, "images texts"], Bool[Tensor, "images texts"]],
    rerank: str,
) -> RetrievalScores:
    """Scores of the candidates, -inf elsewhere.

    Args:
        itc: contrastive similarities.
        itm: matching logits.
        chosen: the candidates, see `candidates`.
        rerank: "itm", "itm+itc" or "itm+zitc", see `retrieval_scores`.
    """
    if rerank == "itm+itc":
        itm = itm + itc
    elif rerank == "itm+zitc":
        itm = itm + (itc - itc.mean()) / itc.std().clamp(min=1e-12)
    return RetrievalScores(*(torch.where(pairs, itm, -torch.inf) for pairs in chosen))


def _concatenate(parts: Iterable[HyperbolicFeatures]) -> HyperbolicFeatures:
    return HyperbolicFeatures(*(torch.cat(part) for part in zip(*parts, strict=True)))


@torch.no_grad()
def matching_logits(
    model: torch.nn.Module,
    visual: Float[Tensor, "images patches channels"],
    texts: tuple[Tensor, Tensor],
    pairs: Bool[Tensor, "images texts"],
    batch_size: int = 64,
) -> Float[Tensor, "images texts"]:
    """Matching logits of the chosen pairs, 0 elsewhere; each picture's keys and values are computed once.

    Args:
        model: a `HyperBlip2ForPretraining` in evaluation mode.
        visual: what its `vision_features` gave.
        texts: token ids and attention mask.
        pairs: which pairs are wanted.
        batch_size: texts in one pass.
    """
    ids, mask = texts
    found = torch.zeros(pairs.shape)
    for row, chosen in enumerate(pairs):
        numbers = chosen.nonzero()[:, 0]
        if not len(numbers):
            continue
        keys = image_keys(model.blip2.qformer, visual[row : row + 1].to(model.device))
        for part in numbers.split(batch_size):
            logits = model.match(keys, ids[part].to(model.device), mask[part].to(model.device))
            found[row, part] = logits[:, 1].cpu()
    return found


def recall_at_k(
    scores: Float[Tensor, "images texts"],
    txt2img: Sequence[int],
    img2txt: Sequence[Sequence[int]],
    ks: Sequence[int] = (1, 5, 10),
    *,
    scores_t2i: Float[Tensor, "images texts"] | None = None,
) -> dict[str, float]:
    """Recall in both directions, in percent.

    A query counts at k if fewer than k wrong items score at least as high as its best right one: ties count against it.

    Args:
        scores: of pictures for texts.
        txt2img: the picture of each text.
        img2txt: the texts of each picture, at least one.
        ks: cutoffs.
        scores_t2i: scores that rank pictures for texts, where they differ from `scores`.

    Returns:
        `txt_r{k}` (text retrieval: pictures ask), `img_r{k}` (image retrieval: texts ask), their means `txt_r_mean`,
        `img_r_mean`, the mean of these `r_mean`, `agg_metrics` (= `txt_r_mean`), and the aliases
        `text_retrieval_recall@{k}` and `image_retrieval_recall@{k}`.

    Raises:
        ValueError: NaN, shapes that do not fit, a picture without a text, or a cutoff below 1.
    """
    images, texts = scores.shape
    t2i = scores if scores_t2i is None else scores_t2i
    if len(txt2img) != texts or len(img2txt) != images or t2i.shape != scores.shape:
        raise ValueError(
            f"scores {tuple(scores.shape)} need {images} entries of img2txt and {texts} of txt2img, got {len(img2txt)} and {len(txt2img)}"
        )
    if scores.isnan().any() or t2i.isnan().any():
        raise ValueError("scores must not be NaN")
    if min(ks) < 1:
        raise ValueError(f"ks must be >= 1, got {tuple(ks)}")
    right = torch.zeros(images, texts, dtype=torch.bool)
    for row, own in enumerate(img2txt):
        if not len(own):
            raise ValueError(f"img2txt must name at least one text for every picture, got none for picture {row}")
        right[row, list(own)] = True
    partner = torch.zeros(images, texts, dtype=torch.bool)
    partner[torch.tensor(list(txt2img)), torch.arange(texts)] = True
    ranks = {"txt": target_ranks(scores.cpu(), right), "img": target_ranks(t2i.cpu().mT, partner.mT)}
    found: dict[str, float] = {}
    for side, rank in ranks.items():
        values = [100 * (rank < k).double().mean().item() for k in ks]
        found |= {f"{side}_r{k}": value for k, value in zip(ks, values, strict=True)}
        found[f"{side}_r_mean"] = sum(values) / len(values)
        word = {"txt": "text", "img": "image"}[side]
        found |= {f"{word}_retrieval_recall@{k}": value for k, value in zip(ks, values, strict=True)}
    found["r_mean"] = (found["txt_r_mean"] + found["img_r_mean"]) / 2
    found["agg_metrics"] = found["txt_r_mean"]
    return found


def target_ranks(scores: Tensor, right: Tensor) -> Tensor:
    """How many wrong items of each row score at least as high as its best right one, `(rows)`."""
    best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    return ((scores >= best) & ~right).sum(1)
