"""The command line: `python apps/train RECIPE [--config FILE] [--key value ...]`."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from pydantic import ValidationError

from app_data.errors import DataError, MissingAssetError
from app_train.config import Frozen, explain, read_yaml
from app_train.errors import Interrupted, RunError
from app_train.memory import keep_freed_memory


@dataclass(frozen=True)
class Recipe:
    """A recipe: its settings and the function that runs it, imported only when chosen."""

    help: str
    load: Callable[[], tuple[type[Frozen], Callable[[Frozen], dict]]]


def _emoji() -> tuple[type[Frozen], Callable]:
    from app_train.recipes import emoji

    return emoji.EmojiConfig, emoji.run


def _lora() -> tuple[type[Frozen], Callable]:
    from app_train.recipes import lora

    return lora.LoraConfig, lora.run


def _cifar100_fewshot() -> tuple[type[Frozen], Callable]:
    from app_train.recipes import cifar100_fewshot

    return cifar100_fewshot.CifarConfig, cifar100_fewshot.run


def _cub() -> tuple[type[Frozen], Callable]:
    from app_train.recipes import papers

    return papers.CubConfig, papers.run_cub


def _aircraft() -> tuple[type[Frozen], Callable]:
    from app_train.recipes import papers

    return papers.AircraftConfig, papers.run_aircraft


def _butterfly() -> tuple[type[Frozen], Callable]:
    from app_train.recipes import papers

    return papers.ButterflyConfig, papers.run_butterfly


def _inaturalist() -> tuple[type[Frozen], Callable]:
    from app_train.recipes import papers

    return papers.InaturalistConfig, papers.run_inaturalist


def _chest() -> tuple[type[Frozen], Callable]:
    from app_train.recipes import chest

    return chest.ChestConfig, chest.run


def _lora_study() -> tuple[type[Frozen], Callable]:
    from app_train.recipes import lora_study

    return lora_study.StudyConfig, lora_study.run
def _mat() -> tuple[type[Frozen], Callable]:
    from app_train.recipes import mat

    return mat.MATConfig, mat.run


def _mat_clip() -> tuple[type[Frozen], Callable]:
    from app_train.recipes import mat_clip

    return mat_clip.MATClipConfig, mat_clip.run


RECIPES = {
    "emoji": Recipe(
        "compare losses on emoji: trained on two artists, tested on a third (the default of `nox -s train`)", _emoji
    ),
    "lora": Recipe("fine-tune on your own folder of pictures with your own taxonomy", _lora),
    "cifar100-fewshot": Recipe("compare losses on few-shot CIFAR-100 under a WordNet tree", _cifar100_fewshot),
    "cub": Recipe("CUB-200-2011 with CLIP", _cub),
    "aircraft": Recipe("FGVC-Aircraft with CLIP", _aircraft),
    "butterfly": Recipe("Butterfly-200 with CLIP", _butterfly),
    "inaturalist": Recipe("iNaturalist 2021 with CLIP, 16,343 nodes", _inaturalist),
    "chest": Recipe("ChestX-ray14 with CLIP, several findings a picture", _chest),
    "lora-study": Recipe("the experiments of docs/results/hier-lora.md", _lora_study),
    "mat": Recipe("Modality Alignment across Trees on cached features: its variants and open questions", _mat),
    "mat-clip": Recipe(
        "Modality Alignment across Trees on CLIP weights: the sixteen published configurations", _mat_clip
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
