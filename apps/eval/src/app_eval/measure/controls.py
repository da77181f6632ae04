"""What a small BLIP-2 must beat: answers and captions from the same frozen features without it.

References: Cover and Hart, "Nearest neighbor pattern classification", 1967; Hoerl and Kennard, "Ridge regression", 1970.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from app_data.sets.captions import CaptionSet
from app_eval.measure.captions import after_prompt, ptb_like_tokenize
from app_eval.measure.retrieval import levels
from hyper_blip import recall_at_k

# Of the mean variance of a feature; 0.1 and 1 find as many texts of OpenMoji when it is left out, within one in a hundred.
RIDGE = 0.3


def mean_patches(maps: Float[Tensor, "pictures channels rows columns"]) -> Float[Tensor, "pictures channels"]:
    """The mean of each feature map over its places, in double precision."""
    return maps.double().mean((2, 3))


def _owners(captions: Sequence[Sequence[str]], texts: Sequence[str]) -> Tensor:
    """Which picture has which text among its captions, `(pictures texts)`."""
    column: dict[str, list[int]] = {}
    for number, text in enumerate(texts):
        column.setdefault(text, []).append(number)
    found = torch.zeros(len(captions), len(texts), dtype=torch.bool)
    for row, own in enumerate(captions):
        for text in own:
            found[row, column.get(text, [])] = True
    return found


def neighbour_scores(
    pictures: Float[Tensor, "pictures channels"],
    known: Float[Tensor, "known channels"],
    captions: Sequence[Sequence[str]],
    texts: Sequence[str],
) -> Float[Tensor, "pictures texts"]:
    """The largest cosine of a picture to a known one that has the text, both centred on the known ones.

    Args:
        pictures: features of what is asked about.
        known: features of training pictures.
        captions: what describes each of these.
        texts: the candidates.

    Returns:
        In [-1, 1]; -inf for a text that no known picture has.

    >>> eye = torch.eye(3, dtype=torch.float64)
    >>> neighbour_scores(eye[:1], eye, [["a cat"], ["a dog"], ["a cat"]], ["a cat", "a car"]).round(decimals=6)
    tensor([[1., -inf]], dtype=torch.float64)
    """
    mean = known.mean(0)
    cosine = F.normalize(pictures - mean, dim=1) @ F.normalize(known - mean, dim=1).mT
    owners = _owners(captions, texts)
    columns = [
        cosine[:, own].amax(1) if own.any() else cosine.new_full((len(cosine),), -torch.inf) for own in owners.mT
    ]
    return torch.stack(columns, 1)


def ridge_scores(
    pictures: Float[Tensor, "pictures channels"],
    known: Float[Tensor, "known channels"],
    captions: Sequence[Sequence[str]],
    texts: Sequence[str],
    ridge: float = RIDGE,
) -> Float[Tensor, "pictures texts"]:
    """Ridge regression of the known pictures on their captions as classes: it reads no words.

    Args:
        pictures: features of what is asked about.
        known: features of training pictures, not all equal.
        captions: what describes each of these.
        texts: the candidates.
        ridge: penalty in units of the mean variance of a feature, > 0.

    Returns:
        Predicted memberships; -inf for a text that no known picture has.
    """
    owners = _owners(captions, texts)
    mean, aim = known.mean(0), owners.double().mean(0)
    centred = known - mean
    gram = centred.mT @ centred
    penalty = ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weight = torch.linalg.solve(gram + penalty, centred.mT @ (owners.double() - aim))
    return ((pictures - mean) @ weight + aim).masked_fill(~owners.any(0), -torch.inf)


def retrieval_controls(
    test: CaptionSet, maps: Tensor, train: CaptionSet, views: Sequence[Tensor]
) -> dict[str, dict[str, dict]]:
    """Recall of both controls where each test picture has its first caption, as a BLIP-2 is asked.

    Args:
        test: the test pictures.
        maps: their feature maps.
        train: the training pictures.
        views: their feature maps, one tensor for each view; the nearest picture is looked for in all of them.

    Returns:
        For "neighbour" and "ridge" the recalls under "itc", as `retrieval` names them, and "levels" where there is a taxonomy.
    """
    texts = [captions[0] for captions in test.captions]
    known, captions = torch.cat([mean_patches(view) for view in views]), [*train.captions] * len(views)
    own = list(range(len(test)))
    asked = (mean_patches(maps), known, captions, texts)
    scores = {"neighbour": neighbour_scores(*asked), "ridge": ridge_scores(*asked)}
    found: dict[str, dict[str, dict]] = {n: {"itc": recall_at_k(x, own, [[i] for i in own])} for n, x in scores.items()}
    if test.taxonomy is not None:
        for name, x in scores.items():
            found[name]["levels"] = levels(x, test.targets, np.asarray(own), test.taxonomy)
    return found


def caption_controls(
    train: CaptionSet, train_maps: Tensor, maps: Tensor, said: Sequence[str], prompt: str
) -> dict[str, list[str]]:
    """Captions that a picture's own caption must beat.

    Args:
        train: the training pictures.
        train_maps: their feature maps.
        maps: those of the captioned pictures.
        said: the captions that a model gave them.
        prompt: what every caption begins with.

    Returns:
        "other", the caption said of the picture half a list away; "constant", the training caption whose words are the commonest, for
        all; "neighbour", the first caption of the nearest training picture.
    """
    words = [set(ptb_like_tokenize(after_prompt(captions[0], prompt))) for captions in train.captions]
    number = Counter(word for row in words for word in row)
    common = [np.mean([number[word] for word in row]) if row else 0.0 for row in words]
    known = mean_patches(train_maps)
    centred = [F.normalize(x - known.mean(0), dim=1) for x in (mean_patches(maps), known)]
    nearest = (centred[0] @ centred[1].mT).argmax(1).tolist()
    half = len(said) // 2
    return {
        "other": [*said[half:], *said[:half]],
        "constant": [train.captions[int(np.argmax(common))][0]] * len(said),
        "neighbour": [train.captions[row][0] for row in nearest],
    }
