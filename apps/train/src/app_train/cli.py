"""The command line: `python apps/train RECIPE [--config FILE] [--key value ...]`."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import tyro
from pydantic import ValidationError

from app_data.store.errors import DataError, MissingAssetError
from app_data.store.memory import keep_freed_memory
from app_train.core.config import Frozen, explain, read_yaml
from app_train.core.errors import Interrupted, RunError


@dataclass(frozen=True)
class Recipe:
    """A recipe: what it does, and where its settings and the function that runs it are.

    Attributes:
        help: one line for `--help`.
        module: below `app_train.recipes`, imported only when the recipe is chosen.
        settings: name of the settings class there.
        function: name of the function there that runs them.
    """

    help: str
    module: str
    settings: str
    function: str = "run"

    def load(self) -> tuple[type[Frozen], Callable[[Frozen], dict]]:
        """Import the settings and the function."""
        module = import_module(f"app_train.recipes.{self.module}")
        return getattr(module, self.settings), getattr(module, self.function)


RECIPES = {
    "emoji": Recipe(
        "compare losses on emoji: trained on two artists, tested on a third (the default of `nox -s train`)",
        "lora.emoji",
        "EmojiConfig",
    ),
    "lora": Recipe("fine-tune on your own folder of pictures with your own taxonomy", "lora.folder", "LoraConfig"),
    "cifar100-fewshot": Recipe(
        "compare losses on few-shot CIFAR-100 under a WordNet tree", "lora.cifar100", "CifarConfig"
    ),
    "cub": Recipe("CUB-200-2011 with CLIP", "lora.papers", "CubConfig", "run_cub"),
    "aircraft": Recipe("FGVC-Aircraft with CLIP", "lora.papers", "AircraftConfig", "run_aircraft"),
    "butterfly": Recipe("Butterfly-200 with CLIP", "lora.papers", "ButterflyConfig", "run_butterfly"),
    "inaturalist": Recipe(
        "iNaturalist 2021 with CLIP, 16,343 nodes", "lora.papers", "InaturalistConfig", "run_inaturalist"
    ),
    "chest": Recipe("ChestX-ray14 with CLIP, several findings a picture", "lora.chest", "ChestConfig"),
    "lora-study": Recipe("the experiments of docs/results/hier-lora.md", "lora.study", "StudyConfig"),
    "mat": Recipe(
        "Modality Alignment across Trees on cached features: its variants and open questions",
        "mat.variants",
        "MATConfig",
    ),
    "mat-clip": Recipe(
        "Modality Alignment across Trees on CLIP weights: the sixteen published configurations",
        "mat.clip",
        "MATClipConfig",
    ),
    "mini-clip": Recipe(
        "a small open_clip model distilled on emoji, for the recipe mat-mini", "mat.mini_clip", "MiniClipConfig"
    ),
    "mat-mini": Recipe(
        "Modality Alignment across Trees by prompts on the small CLIP of the recipe mini-clip",
        "mat.mini",
        "MATMiniConfig",
    ),
    "blip-mini": Recipe(
        "a small hyperbolic BLIP-2 on emoji: retrieval, captions, radii", "blip.mini", "BlipMiniConfig"
    ),
    "blip2-opt-2.7b": Recipe(
        "hyperbolic BLIP-2 with ViT-g and OPT-2.7B on COCO, several cards", "blip.opt", "Blip2OptConfig"
    ),
    "icl-mini": Recipe("a small LLaVA that reads demonstrations: easy-VQA and emoji", "icl.mini", "IclMiniConfig"),
    "icl-distill": Recipe(
        "calibrated attention distilled into LoRA weights of a finished icl-mini", "icl.distill", "IclDistillConfig"
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a recipe; user errors end in one sentence on standard error and exit status 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python apps/train RECIPE [--config FILE] [options]   (RECIPE --help lists them)\n")  # noqa: T201
        for name, recipe in RECIPES.items():
            print(f"  {name:<18}{recipe.help}")  # noqa: T201
        return 0 if argv else 2
    if argv[0] not in RECIPES:
        return _fail(f"unknown recipe {argv[0]!r}; the recipes are {', '.join(RECIPES)}")
    keep_freed_memory()
    try:
        kind, run = RECIPES[argv[0]].load()
        run(parse(argv[0], kind, argv[1:]))
    except Interrupted as stop:
        print("stopped; the same command goes on from here", file=sys.stderr)  # noqa: T201
        return int(stop.code)
    except (DataError, MissingAssetError, RunError) as error:
        return _fail(str(error))
    return 0


def parse(name: str, kind: type[Frozen], argv: Sequence[str]) -> Frozen:
    """Settings from the defaults, then a YAML file, then the command line.

    Raises:
        RunError: for a wrong key or value.
    """
    argv = list(argv)
    default = None
    if "--config" in argv:
        at = argv.index("--config")
        if at + 1 == len(argv):
            raise RunError("--config needs a file")
        default = read_yaml(Path(argv[at + 1]), kind)
        del argv[at : at + 2]
    try:
        return tyro.cli(kind, args=argv, default=default, prog=f"python apps/train {name}")
    except ValidationError as error:
        raise RunError(explain(error, kind)) from error


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)  # noqa: T201
    return 2
