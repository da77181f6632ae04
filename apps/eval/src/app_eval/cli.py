"""The command line: `python apps/eval COMMAND`; `--help` lists the commands."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from app_data.read.pictures import load_picture
from app_data.store.errors import DataError, MissingAssetError
from app_data.store.memory import keep_freed_memory
from app_eval.ask import select as select_demos
from app_eval.measure import demonstration_study as icl_study
from app_eval.measure import selection_study
from app_eval.show.commands import STORIES, write_page
from hier_lora import DECODERS, HierLoraCLIP


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; user errors end in one sentence on standard error and exit status 2."""
    parser = argparse.ArgumentParser(prog="python apps/eval", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    predict = commands.add_parser("predict", help="print the path of each picture, level by level, with probabilities")
    predict.add_argument("run", type=Path, help="a run folder, or a saved adapter")
    predict.add_argument("pictures", type=Path, nargs="+", metavar="PICTURE")
    predict.add_argument("--decoder", choices=DECODERS, default="joint_path")
    predict.set_defaults(run_command=lambda args: print_predictions(args.run, args.pictures, args.decoder))
    page = commands.add_parser("page", help="write a results page from run folders, or from the JSON beside it")
    page.add_argument("story", choices=STORIES)
    page.add_argument(
        "sources", type=Path, nargs="+", metavar="SOURCE", help="run folders, or JSON files of earlier pages"
    )
    page.add_argument("page", type=Path, metavar="PAGE.md", help="the Markdown file to write")
    page.add_argument("--model", type=Path, metavar="JSON", help="icl: the JSON of icl-study")
    page.add_argument(
        "--distilled", type=Path, metavar="JSON", help="icl: the result.json of icl-distill on that model"
    )
    page.set_defaults(run_command=_page)
    caption = commands.add_parser("caption", help="describe pictures with a trained blip-mini")
    caption.add_argument("run", type=Path, help="a run folder, or a saved model of stage 2")
    caption.add_argument("pictures", type=Path, nargs="+", metavar="PICTURE")
    caption.set_defaults(run_command=_caption)
    search = commands.add_parser("search", help="find the pictures of a folder that fit a text best")
    search.add_argument("run", type=Path, help="a run folder, or a saved model of stage 1")
    search.add_argument("text")
    search.add_argument("--images", type=Path, required=True, metavar="DIR")
    search.add_argument("--top", type=int, default=5)
    search.set_defaults(run_command=_search)
    select_demos.add_arguments(commands)
    selection_study.add_arguments(commands)
    icl_study.add_arguments(commands)
    args = parser.parse_args(argv)
    keep_freed_memory()
    try:
        return args.run_command(args)
    except (DataError, MissingAssetError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2


def _page(args: argparse.Namespace) -> int:
    write_page(args.story, [*args.sources, *filter(None, (args.model, args.distilled))], args.page)
    return 0


def _caption(args: argparse.Namespace) -> int:
    from app_eval.ask.describe import print_captions

    return print_captions(args.run, args.pictures)


def _search(args: argparse.Namespace) -> int:
    from app_eval.ask.describe import print_search

    return print_search(args.run, args.text, args.images, args.top)


def find_adapter(run: Path) -> Path:
    """The saved model of a run: the folder itself, or the only trained row below it.

    Raises:
        DataError: if there is none, or more than one.
    """
    found = sorted({p.parent for p in [*run.glob("hier_lora.json"), *run.glob("**/adapter/hier_lora.json")]})
    if not found:
        raise DataError(f"{run} holds no trained model: give the folder of a finished run")
    if len(found) > 1:
        listed = ", ".join(str(p.parent) for p in found[:6])
        raise DataError(f"{run} holds {len(found)} trained models: name one of {listed}")
    return found[0]


def print_predictions(run: Path, pictures: Sequence[Path], decoder: str) -> int:
    """Print one line a picture; pictures that cannot be read are named, and make the exit status 1."""
    try:
        model = HierLoraCLIP.from_pretrained(find_adapter(run))
    except ImportError as error:
        raise MissingAssetError(str(error)) from error
    except DataError:
        raise
    except ValueError as error:
        raise DataError(str(error)) from error
    size = model.picture_size or 224
    unread = 0
    for path in pictures:
        try:
            pixels = load_picture(path, size)
        except DataError as error:
            unread += 1
            print(f"error: {path}: {error}", file=sys.stderr)  # noqa: T201
            continue
        print(f"{path}: {model.predict([pixels], decoder)[0]}")  # noqa: T201
    return 1 if unread else 0
