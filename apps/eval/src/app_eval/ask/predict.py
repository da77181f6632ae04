"""`hier predict RUN PATH...`: the path of each picture through the tree, from a finished run."""

import csv
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from difflib import get_close_matches
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from app_data.read.pictures import SUFFIXES, load_picture
from app_data.store.errors import DataError, MissingAssetError
from app_eval.ask.frozen import BACKBONE, FrozenClassifier
from app_eval.ask.settings import Predict
from app_eval.measure.embed import BATCH
from hier_lora import HierLoraCLIP, Prediction, predict_paths, predict_top
from hier_losses import Taxonomy

HOPELESS = -1e6  # a score so low that no temperature brings it back


def find_model(run: Path) -> Path:
    """The saved model of a run: the folder itself, the product on frozen features, or the only trained row below it.

    Raises:
        DataError: If there is none, or more than one.
    """
    for folder in (run, run / "seed-0" / "product" / "model"):
        if (folder / BACKBONE).exists() or (folder / "hier_lora.json").exists():
            return folder
    known = sorted({p.parent for p in run.glob("**/adapter/hier_lora.json")})
    if not known:
        raise DataError(f"{run} holds no trained model: give the folder of a finished run")
    if len(known) > 1:
        listed = ", ".join(str(p.parent) for p in known[:6])
        raise DataError(f"{run} holds {len(known)} trained models: name one of {listed}")
    return known[0]


def run(config: Predict) -> int:
    """Write one line a path; pictures that cannot be read are named, and make the exit status 1."""
    if config.tau is not None and (config.decoder != "threshold" or not 0 <= config.tau <= 1):
        raise DataError(f"--tau must lie in [0, 1] and goes with --decoder threshold, got {config.tau}")
    if config.top is not None and (config.top < 1 or config.decoder is not None):
        raise DataError(f"--top must be at least 1 and goes without --decoder, got {config.top}")
    files = _files(config.pictures)
    folder = find_model(config.run)
    try:
        model = FrozenClassifier.load(folder) if (folder / BACKBONE).exists() else HierLoraCLIP.from_pretrained(folder)
    except DataError:
        raise
    except ImportError as error:
        raise MissingAssetError(str(error)) from error
    except ValueError as error:
        raise DataError(str(error)) from error
    if isinstance(model, FrozenClassifier):
        size, tax, decoder = model.size, model.product.tax, config.decoder or model.product.settings.decoder
        shown = model.product.shown("joint_path" if config.top else decoder)
    else:
        size, tax, decoder, shown = (
            model.picture_size or 224,
            model.tax,
            config.decoder or "joint_path",
            model.temperature,
        )
    if not isinstance(tax, Taxonomy):
        raise DataError(
            f"{folder} names several labels a picture, over a graph: ask it with predict_labels from Python"
        )
    tax = tax.to("cpu")
    out_of_reach = _outside(tax, config.within) if config.within else None
    options = {} if config.tau is None else {"tau": config.tau}
    unread = 0
    with open(config.out, "w", encoding="utf-8", newline="") if config.out else nullcontext(sys.stdout) as out:
        write = _writer(config.format, out, tax.num_levels)
        for start in range(0, len(files), BATCH):
            named, pixels = [], []
            for path in files[start : start + BATCH]:
                try:
                    pixels.append(load_picture(path, size))
                    named.append(path)
                except DataError as error:
                    unread += 1
                    print(f"error: {path}: {error}", file=sys.stderr)  # noqa: T201
            logits = model.logits(pixels).cpu()
            if not torch.isfinite(logits).all():
                raise DataError(f"the model in {folder} gives no finite scores: its weights are damaged")
            if out_of_reach is not None:
                logits = logits.masked_fill(out_of_reach, HOPELESS)
            if config.top:
                found = predict_top(logits, tax, config.top, shown)
            else:
                found = [[path] for path in predict_paths(logits, tax, decoder, shown, **options)]
            for path, ranked in zip(named, found, strict=True):
                for rank, prediction in enumerate(ranked, start=1):
                    # Fewer than --top leaves lie within the node.
                    if out_of_reach is None or not any(out_of_reach[node] for node in prediction.nodes):
                        write(path, rank, prediction)
    return 1 if unread else 0


def _files(paths: Sequence[Path]) -> list[Path]:
    """The pictures, with those below folders, in name order."""
    files: list[Path] = []
    for path in paths:
        inner = sorted(p for p in path.rglob("*") if p.name.lower().endswith(SUFFIXES)) if path.is_dir() else [path]
        if not inner:
            raise DataError(f"{path} holds no pictures ({', '.join(SUFFIXES)})")
        files += inner
    return files


def _outside(tax: Taxonomy, within: str) -> Tensor:
    """Which nodes lie neither below nor above the node of this name or path, bool (N,)."""
    paths = [tax.path_of(node) for node in range(tax.num_nodes)]
    found = [path for path in paths if within in ("/".join(path), path[-1])]
    exact = [path for path in found if "/".join(path) == within]
    if len(exact or found) != 1:
        close = ["/".join(path) for path in found] or get_close_matches(within, list(tax.names), cutoff=0.5)
        hint = f": {' or '.join(close)}?" if close else ""
        raise DataError(f"--within must name one node of the taxonomy, got {within!r}{hint}")
    (node,) = exact or found
    return torch.tensor([path[: len(node)] != node[: len(path)] for path in paths])


def _writer(form: str, out: TextIO, levels: int) -> Callable[[Path, int, Prediction], None]:
    if form == "text":
        return lambda path, rank, found: print(f"{path}: {found}", file=out)
    if form == "jsonl":

        def line(path: Path, rank: int, found: Prediction) -> None:
            entry = {"file": str(path), "rank": rank, "names": found.names, "probabilities": found.probabilities}
            print(json.dumps(entry), file=out)

        return line
    table = csv.writer(out)
    by_level = [f"{name}_{level + 1}" for level in range(levels) for name in ("level", "probability")]
    table.writerow(["file", "rank", "path", *by_level])

    def row(path: Path, rank: int, found: Prediction) -> None:
        cells = [
            cell for pair in zip(found.names, found.probabilities, strict=True) for cell in (_safe(pair[0]), pair[1])
        ]
        empty = [""] * (2 * (levels - len(found.names)))
        table.writerow([_safe(str(path)), rank, _safe("/".join(found.names)), *cells, *empty])

    return row


def _safe(cell: str) -> str:
    """A cell that no spreadsheet program takes for a formula."""
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell
