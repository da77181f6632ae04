"""The two data sets of the hier-lora study, with the features of the frozen picture tower kept on disk."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from app_data.read.labelled import Decoding
from app_data.read.pictures import PictureSet
from app_data.sets.cifar100 import load_cifar100_fewshot, take_shots
from app_data.sets.emoji import load_emoji, validation_split
from app_eval.measure.embed import tower_features
from app_train.recipes.lora.task import cuts_for
from hier_losses import Taxonomy
from hier_losses.treecuts import TreeCuts

EMOJI_SIZE, CIFAR_SIZE = 96, 64
ARTISTS, TEST_ARTIST = ("openmoji", "noto-300", "noto-700"), "twemoji"
# Pictures per class that the few-shot set keeps for choosing learning rates.
VALIDATION_SHOTS = 5


@dataclass(frozen=True)
class Split:
    """Pictures and frozen features of one part."""

    pictures: PictureSet
    features: Tensor

    def select(self, rows: np.ndarray) -> "Split":
        """The subset at these positions."""
        return Split(self.pictures.select(rows), self.features[torch.from_numpy(np.asarray(rows))])

    @property
    def targets(self) -> np.ndarray:
        """Node ids."""
        return self.pictures.targets


@dataclass(frozen=True)
class StudyData:
    """A data set of the study.

    Attributes:
        name: "emoji" or "cifar100".
        train, test: the parts.
        cuts: the tree cuts of MTA.
        centred: centre the test pictures on their own mean (an artist never seen).
        template: the prompt.
    """

    name: str
    train: Split
    test: Split
    cuts: TreeCuts
    centred: bool
    template: str

    @property
    def taxonomy(self) -> Taxonomy:
        """The tree."""
        return self.train.pictures.taxonomy

    def validation(self) -> "StudyData":
        """The same with a part of the training pictures in place of the test pictures.

        Emoji: all pictures of 15 % of the leaves, which stay candidate labels. CIFAR-100: five pictures of each class.
        """
        if self.name == "emoji":
            known, held_out = validation_split(self.train.pictures, seed=0)
        else:
            held_out, known = take_shots(self.train.pictures, VALIDATION_SHOTS, seed=0)
        return replace(self, train=self.train.select(known), test=self.train.select(held_out))


def load_study_data(name: str, base: nn.Module, data: Path | None, cache_dir: Path | None) -> StudyData:
    """Read the pictures and their features.

    Args:
        name: "emoji" or "cifar100".
        base: the dual encoder with a head apart from its tower.
        data: folder of the few-shot set.
        cache_dir: where decoded pictures and features are kept.
    """
    if name == "emoji":
        train = load_emoji(ARTISTS, size=EMOJI_SIZE, cache_dir=cache_dir)
        test = load_emoji((TEST_ARTIST,), size=EMOJI_SIZE, cache_dir=cache_dir)
        cuts, centred, template = cuts_for(train.taxonomy), True, "a picture of {}."
    else:
        train, test, cuts = load_cifar100_fewshot(data, decoding=Decoding(size=CIFAR_SIZE, cache_dir=cache_dir))
        centred, template = False, "a picture of {}."
    first, second = (Split(part, tower_features(base, part, "frozen features", cache_dir)) for part in (train, test))
    return StudyData(name, first, second, cuts, centred, template)
