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


def _blip_mini() -> tuple[type[Frozen], Callable]:
    from app_train.recipes import blip_mini

    return blip_mini.BlipMiniConfig, blip_mini.run


def _blip2_opt() -> tuple[type[Frozen], Callable]:
    from app_train.recipes import blip2_opt

    return blip2_opt.Blip2OptConfig, blip2_opt.run


RECIPES = {
    "emoji": Recipe(
        "compare losses on emoji: trained on two artists, tested on a third (the default of `nox -s train`)", _emoji
    ),
    "lora": Recipe("fine-tune on your own folder of pictures with your own taxonomy", _lora),
    "blip-mini": Recipe("a small hyperbolic BLIP-2 on emoji: retrieval, captions, radii", _blip_mini),
    "blip2-opt-2.7b": Recipe("hyperbolic BLIP-2 with ViT-g and OPT-2.7B on COCO, several cards", _blip2_opt),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a recipe; user errors end in one sentence on standard error and exit status 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python apps/train RECIPE [--config FILE] [options]   (RECIPE --help lists them)\n")  # noqa: T201
        for name, recipe in RECIPES.items():
            print(f"  {name:<16}{recipe.help}")  # noqa: T201
        return 0 if argv else 2
    if argv[0] not in RECIPES:
        return _fail(f"unknown recipe {argv[0]!r}; the recipes are {', '.join(RECIPES)}")
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
