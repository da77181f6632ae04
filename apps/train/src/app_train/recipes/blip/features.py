"""What `blip-mini` reads again and again: frozen features of a few views of each picture, and which caption a picture has when."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from app_data.sets.captions import CaptionSet
from app_data.store.features import cached_features, weights_digest
from app_eval.measure.controls import retrieval_controls
from app_eval.measure.retrieval import crop, feature_maps
from app_train.core.run_folder import Run
from app_train.recipes.blip.settings import BlipMiniConfig

# Share of the side that the cropped view keeps.
CROP = 0.85


def limited(data: CaptionSet, limit: int | None) -> CaptionSet:
    """The pictures of this many leaves, spread over the taxonomy."""
    if limit is None:
        return data
    leaves = data.taxonomy.leaf.numpy()
    kept = leaves[np.linspace(0, len(leaves) - 1, min(limit, len(leaves))).round().astype(int)]
    return data.select(np.isin(data.targets, kept))


def caption_of(data: CaptionSet, row: int, seed: int, epoch: int) -> str:
    """One of a picture's captions, by chance: a pure function of the arguments."""
    captions = data.captions[row]
    return captions[int(np.random.default_rng([seed, epoch, row]).integers(len(captions)))]


def views_of(rows: Sequence[int] | np.ndarray, num: int, seed: int, epoch: int) -> list[int]:
    """Which of `num` views of each picture an epoch shows, by chance: a pure function of the arguments."""
    return [int(np.random.default_rng([seed, epoch, int(row), num]).integers(num)) for row in rows]


def view(pixels: Tensor, number: int) -> Tensor:
    """A view of uint8 pictures (n, 3, H, W): as they are, mirrored, or cropped."""
    return (pixels, pixels.flip(-1), crop(pixels, CROP) if number == 2 else pixels)[number]


@dataclass(frozen=True)
class Features:
    """Both sets with their frozen features, computed once for all rows and seeds; half precision halves their memory."""

    train: CaptionSet
    test: CaptionSet
    config: BlipMiniConfig
    run: Run
    _found: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def maps(self, name: str, model: nn.Module, number: int = 0) -> Tensor:
        """Feature maps of a view of the set `name`, "train" or "test"."""
        if (name, number) not in self._found:
            data = getattr(self, name)
            model.to(self.run.device)

            def compute(start: int, end: int) -> Tensor:
                return feature_maps(model, view(data.batch(range(start, end)), number)).half()

            key = f"{weights_digest(model.blip2.vision_model.module)} {model.config.vision_locator} {data.fingerprint} {len(data)}"
            self._found[name, number] = cached_features(
                f"blip {key} view {number} {CROP}", compute, len(data), self.config.cache_dir
            )
        return self._found[name, number]

    def views(self, model: nn.Module) -> list[Tensor]:
        """Feature maps of all views of the training pictures."""
        return [self.maps("train", model, number) for number in range(self.config.views)]

    def controls(self, make: Callable[[], nn.Module]) -> dict[str, dict[str, dict]]:
        """Recall without a BLIP-2 from the same features.

        Args:
            make: gives a model with the vision tower, where rows of an earlier start have computed the features.
        """
        numbers = range(self.config.views)
        if not self._found.keys() >= {("test", 0), *(("train", number) for number in numbers)}:
            model = make()
            self.maps("test", model)
            self.views(model)
        views = [self._found["train", number] for number in numbers]
        return retrieval_controls(self.test, self._found["test", 0], self.train, views)

    def batch(self, views: Sequence[Tensor], rows: np.ndarray, seed: int, epoch: int) -> Tensor:
        """Feature maps of some training pictures as an epoch sees them."""
        if len(views) == 1:
            return views[0][rows]
        chosen = views_of(rows, len(views), seed, epoch)
        return torch.stack([views[number][row] for number, row in zip(chosen, rows, strict=True)])
