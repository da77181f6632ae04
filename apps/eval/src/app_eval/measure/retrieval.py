"""Scores of a small hyperbolic BLIP-2: retrieval on every level of the taxonomy, captions, and what its radius follows.

References: Li et al., "BLIP-2", ICML 2023, section 4.4 (retrieval with re-ranking); Mandica et al., arXiv:2408.05097 (a small
radius for simple or vague things).
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.nn import functional as F

from app_data.sets.captions import CaptionSet
from app_data.weights.blip2 import caption_ids
from app_data.weights.lite0_minilm import lite0_preprocess, to_uint8
from app_eval.measure.captions import after_prompt, cider_d, score_captions
from hier_losses import Taxonomy
from hyper_blip import HyperBlip2ForPretraining, kendall, radius_report, recall_at_k, spearman
from hyper_blip import retrieval_scores as pair_scores
from hyper_blip.retrieval import target_ranks

CROPS = (1.0, 0.8, 0.6, 0.4, 0.2)
BLURS = (0.0, 1.0, 2.0, 4.0, 8.0)


@torch.no_grad()
def feature_maps(model: torch.nn.Module, pixels: Tensor, batch_size: int = 64) -> Tensor:
    """Feature maps of the frozen encoder for uint8 pictures (n, 3, H, W), which the model takes in the place of pictures."""
    encoder = model.blip2.vision_model.module.eval()
    parts = [encoder.feature_map(lite0_preprocess(part.to(model.device))).cpu() for part in pixels.split(batch_size)]
    return torch.cat(parts)


def _level_ranks(scores: Tensor, image_nodes: np.ndarray, text_nodes: np.ndarray) -> dict[str, float]:
    """Share of queries whose best answer lies in the same node, in percent, in both directions."""
    same = torch.from_numpy(image_nodes[:, None] == text_nodes[None, :])
    t2i = same.mT[same.any(0)]
    return {
        "txt_r1": 100 * (target_ranks(scores, same) == 0).double().mean().item(),
        "img_r1": 100 * (target_ranks(scores.mT[same.any(0)], t2i) == 0).double().mean().item(),
    }


def retrieval(
    model: HyperBlip2ForPretraining, data: CaptionSet, maps: Tensor, *, k_test: int, max_tokens: int, first_only: bool
) -> dict[str, Any]:
    """Recall on a set of captioned pictures, by the matching head and by the contrastive similarity alone.

    Args:
        model: stage 1.
        data: pictures with captions; a taxonomy adds recall on each of its levels.
        maps: their feature maps.
        k_test: candidates that the matching head scores; 0 leaves that out.
        max_tokens: of a caption.
        first_only: use the first caption of each picture alone.

    Returns:
        Numbers for JSON. `hits` says of each picture whether its first answer was right, `max_softmax` is a control of the radius;
        `cosine` is recall by the cosine of the same features where another similarity was trained, `commonest_answer` the share of
        pictures whose first answer is the one text that most of them have; `matching` see `matching_share`.
    """
    chosen = [captions[:1] if first_only else captions for captions in data.captions]
    texts = [caption for captions in chosen for caption in captions]
    owner = np.repeat(np.arange(len(data)), [len(c) for c in chosen])
    own = [np.flatnonzero(owner == i).tolist() for i in range(len(data))]
    ids = caption_ids(texts, max_tokens)
    itc = pair_scores(model, maps, ids, max(1, k_test), "none").image_to_text
    found: dict[str, Any] = {
        "n_images": len(data),
        "n_texts": len(texts),
        "itc": recall_at_k(itc, owner.tolist(), own),
        "commonest_answer": int(itc.argmax(1).bincount().max()) / len(data),
    }
    if model.config.hyperbolic.eval_similarity != "cosine":
        cosine = pair_scores(model, maps, ids, 1, "none", mode="cosine").image_to_text
        found["cosine"] = recall_at_k(cosine, owner.tolist(), own)
    if k_test:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fewer texts than k_test in a trial
            i2t, t2i = pair_scores(model, maps, ids, k_test, "itm")
        share = matching_share(i2t, torch.from_numpy(owner))
        found["matching"] = None if np.isnan(share) else share
        if model.config.hyperbolic.eval_similarity == "cosine":  # as LAVIS re-ranks
            i2t, t2i = i2t + itc, t2i + itc
        found["itm"] = recall_at_k(i2t, owner.tolist(), own, scores_t2i=t2i)
    if data.taxonomy is not None:
        found["levels"] = levels(itc, data.targets, owner, data.taxonomy)
    right = torch.zeros(len(data), len(texts), dtype=torch.bool)
    right[torch.from_numpy(owner), torch.arange(len(texts))] = True
    found["hits"] = (target_ranks(itc, right) == 0).double().tolist()
    tau = model.temperature().item()
    found["max_softmax"] = (itc / tau).softmax(1).amax(1).tolist()
    return found


def matching_share(scores: Tensor, owner: Tensor) -> float:
    """How often the matching head puts a picture's own text above a wrong candidate: the area under its ROC curve.

    Args:
        scores: matching logits `(pictures texts)`, -inf where a text is no candidate.
        owner: the picture of each text.

    Returns:
        The mean over pictures with an own and a wrong candidate, ties counting half; 0.5 is chance, NaN if there is no such picture.

    >>> inf = torch.inf
    >>> matching_share(torch.tensor([[2.0, 1.0, 3.0], [4.0, -inf, 0.0]]), torch.arange(3))
    0.5
    """
    own = owner[None, :] == torch.arange(len(scores))[:, None]
    best = scores.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
    wrong = scores.isfinite() & ~own
    above = ((best > scores).double() + 0.5 * (best == scores).double()) * wrong
    kept = (best[:, 0] > -torch.inf) & wrong.any(1)
    return (above.sum(1) / wrong.sum(1))[kept].mean().item()


def answers(found: Mapping[str, Any]) -> dict[str, float]:
    """The recalls that count among those of `retrieval`: after re-ranking where there was any."""
    return found.get("itm", found["itc"])


def levels(itc: Tensor, targets: np.ndarray, owner: np.ndarray, tax: Taxonomy) -> dict[str, dict[str, float]]:
    """Recall at 1 where any answer of the same node on a level counts."""
    paths = tax.paths[torch.from_numpy(np.asarray(targets))].numpy()
    names = ["group", "subgroup", "leaf"] if tax.num_levels == 3 else [f"level {i + 1}" for i in range(tax.num_levels)]
    return {name: _level_ranks(itc, paths[:, i], paths[owner][:, i]) for i, name in enumerate(names)}


@torch.no_grad()
def image_radius(model: torch.nn.Module, maps: Tensor, batch_size: int = 128) -> Tensor:
    """Mean radius of the queries of each picture."""
    return torch.cat(
        [model.encode_image(part.to(model.device)).radius.mean(1).cpu() for part in maps.split(batch_size)]
    )


@torch.no_grad()
def text_radius(model: HyperBlip2ForPretraining, texts: Sequence[str], max_tokens: int) -> Tensor:
    """Radius of each text."""
    ids, mask = caption_ids(texts, max_tokens)
    parts = zip(ids.split(256), mask.split(256), strict=True)
    return torch.cat([model.encode_text(i.to(model.device), m.to(model.device)).radius.cpu() for i, m in parts])


def _changed(
    model: torch.nn.Module, pixels: Tensor, values: Sequence[float], change: Callable[[Tensor, float], Tensor]
) -> dict[str, Any]:
    """Radius of the pictures after a change of growing strength, and its rank correlation with the strength."""
    radii = [image_radius(model, feature_maps(model, change(pixels, value))) for value in values]
    strengths = [value for value in values for _ in range(len(pixels))]
    return {
        "values": list(values),
        "mean_radius": [float(r.mean()) for r in radii],
        **_correlations(torch.cat(radii), torch.tensor(strengths)),
    }


def _correlations(radius: Tensor, covariate: Tensor) -> dict[str, float]:

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {"spearman": spearman(radius, covariate), "kendall": kendall(radius, covariate)}


def crop(pixels: Tensor, fraction: float) -> Tensor:
    """The centred square of this share of the side, scaled back."""
    if fraction == 1:
        return pixels
    side = pixels.shape[-1]
    kept = max(8, round(side * fraction))
    start = (side - kept) // 2
    part = pixels[..., start : start + kept, start : start + kept].float()
    return F.interpolate(part, size=(side, side), mode="bilinear", antialias=True).round().clamp(0, 255).to(torch.uint8)


def blur(pixels: Tensor, sigma: float) -> Tensor:
    """A Gaussian blur of this many pixels."""
    if sigma == 0:
        return pixels
    pictures = (Image.fromarray(p).filter(ImageFilter.GaussianBlur(sigma)) for p in pixels.permute(0, 2, 3, 1).numpy())
    return to_uint8(np.stack([np.asarray(p) for p in pictures]))


def radii(
    model: HyperBlip2ForPretraining,
    data: CaptionSet,
    maps: Tensor,
    found: Mapping[str, Any],
    *,
    max_tokens: int,
    sample: int = 200,
) -> dict[str, Any]:
    """The radius report: against caption length, crop and blur, and as a predictor of errors beside its controls.

    Args:
        model: stage 1.
        data: test pictures.
        maps: their feature maps.
        found: what `retrieval` returned for them.
        max_tokens: of a caption.
        sample: pictures that are cropped and blurred.
    """
    rho = image_radius(model, maps)
    chains = [chain for i in range(len(data)) for chain in data.chain(i)]
    of_text = text_radius(model, chains, max_tokens)
    words = torch.tensor([float(len(text.split())) for text in chains])
    firsts = np.cumsum([0, *[len(data.chain(i)) for i in range(len(data) - 1)]])
    report = radius_report(
        rho,
        found["hits"],
        controls={"largest softmax": found["max_softmax"]},
        text_radius=of_text[torch.from_numpy(firsts)],
        c=model.curvature().item(),
    )
    report["caption_length"] = _correlations(of_text, words)
    specific = of_text[torch.from_numpy(firsts)]
    general = of_text[torch.from_numpy(np.append(firsts[1:], len(chains)) - 1)]
    report["group_word_below_caption"] = float((general < specific).double().mean())
    pixels = data.batch(np.linspace(0, len(data) - 1, min(sample, len(data))).round().astype(int))
    report["crop"] = _changed(model, pixels, CROPS, crop)
    report["blur"] = _changed(model, pixels, BLURS, blur)
    return report


def caption_scores(
    data: CaptionSet,
    captions: Sequence[str],
    rows: Sequence[int],
    *,
    prompt: str,
    controls: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """BLEU, ROUGE-L and CIDEr of what captions of the pictures `rows` say after the prompt, which every reference begins with.

    Args:
        data: the pictures and their captions.
        captions: one for each row, with or without the prompt.
        rows: which pictures.
        prompt: is given with a picture, so that it earns nothing.
        controls: further captions of the same pictures, by name, such as those of other pictures.

    Returns:
        The scores; "exact", the share that is one of the picture's captions; "distinct", different captions as a share of all;
        under "controls" the scores of these, and under "each" CIDEr of every picture, for intervals: "own" and the controls.
    """
    keys = [str(data.ids[i]) for i in rows]
    references = {key: [after_prompt(t, prompt) for t in data.captions[i]] for key, i in zip(keys, rows, strict=True)}
    said = {"own": captions, **(controls or {})}
    plain = {
        name: dict(zip(keys, (after_prompt(t, prompt) or "." for t in texts), strict=True))
        for name, texts in said.items()
    }
    scores = {name: score_captions(references, texts) for name, texts in plain.items()}
    each = {name: [round(x, 4) for x in cider_d(references, texts).values()] for name, texts in plain.items()}
    exact = [plain["own"][key] in references[key] for key in keys]
    return {
        **scores.pop("own"),
        "exact": float(np.mean(exact)),
        "distinct": len(set(plain["own"].values())) / len(captions),
        "controls": scores,
        "each": each,
    }
