"""The command line: `python apps/eval predict RUN PICTURE...`, `page RUN PAGE` and `lora-page STUDY PAGE`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from app_data.errors import DataError, MissingAssetError
from app_data.pictures import load_picture
from app_eval.mat_page import collect, write_mat_page
from app_eval import select_demos, selection_study
from app_eval.page import write_first_light
from app_eval.study_page import write_study_page
from hier_lora import DECODERS, HierLoraCLIP


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; user errors end in one sentence on standard error and exit status 2."""
    parser = argparse.ArgumentParser(prog="python apps/eval", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    predict = commands.add_parser("predict", help="print the path of each picture, level by level, with probabilities")
    predict.add_argument("run", type=Path, help="a run folder, or a saved adapter")
    predict.add_argument("pictures", type=Path, nargs="+", metavar="PICTURE")
    predict.add_argument("--decoder", choices=DECODERS, default="joint_path")
    page = commands.add_parser("page", help="write a results page from the stored JSON of a run")
    page.add_argument("run", type=Path, help="the run folder of `nox -s train -- --seeds 3`")
    page.add_argument("page", type=Path, help="the Markdown file to write")
    study = commands.add_parser("lora-page", help="write the hier-lora results page from a study, or from its JSON")
    study.add_argument("source", type=Path, help="the folder of `python apps/train lora-study`, or the page's JSON")
    study.add_argument("page", type=Path, help="the Markdown file to write")
    mat = commands.add_parser("mat-page", help="write the page of the recipe `mat` from its stored results")
    mat.add_argument("json", type=Path, help="the JSON file that keeps the results")
    mat.add_argument("page", type=Path, help="the Markdown file to write")
    mat.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="run folders whose results the file takes up")
    select_demos.add_arguments(commands)
    selection_study.add_arguments(commands)
    args = parser.parse_args(argv)
    try:
        if hasattr(args, "run_command"):
            return args.run_command(args)
        if args.command == "predict":
            return print_predictions(args.run, args.pictures, args.decoder)
        if args.command == "lora-page":
            write_study_page(args.source, args.page)
        if args.command == "mat-page":
            if args.runs:
                collect(args.runs, args.json)
            write_mat_page(args.json, args.page)
            return 0
        write_first_light(args.run, args.page)
    except (DataError, MissingAssetError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


def find_adapter(run: Path) -> Path:
    """The saved model of a run: the folder itself, or the only or last trained row below it.

    Raises:
        DataError: if there is none.
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
