"""`hier predict RUN PATH...`: the path of each picture through the tree, from a finished run."""

import csv
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from app_data.read.names import match_labels
from app_data.read.pictures import SUFFIXES, allow_megapixels, load_picture
from app_data.store.errors import DataError, MissingAssetError
from app_data.store.sealed import check_sealed
from app_eval.ask.frozen import BACKBONE, FrozenClassifier
from app_eval.ask.settings import Predict
from app_eval.measure.class_tables import safe_cell, write_class_tables
from app_eval.measure.embed import BATCH
from hier_lora import HierLoraCLIP, Prediction, predict_paths, predict_top
from hier_losses import Taxonomy

HOPELESS = -1e6  # a score so low that no temperature brings it back


def find_model(run: Path) -> Path:
    """The saved model of a run: the folder itself, the row that the run chose, the product, or the only trained row below it.

    Raises:
        DataError: If there is none, or more than one.
    """
    if (run / BACKBONE).exists():
        return run
    # A folder that lacks a file is damaged; another model would give another answer.
    named = (*_chosen(run), run / "seed-0" / "product" / "model")
    return next((folder for folder in named if folder.is_dir()), None) or find_adapter(run)


def _chosen(run: Path) -> list[Path]:
    """Where the model of the row lies that a finished run chose; empty if it chose none."""
    try:
        row = json.loads((run / "result.json").read_text(encoding="utf-8"))["chosen"]["row"]
        return [run / "seed-0" / row / name for name in ("model", "adapter")]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def find_adapter(run: Path) -> Path:
    """The saved adapter of a run: the folder itself, or the only one below it.

    Raises:
        DataError: If there is none, or more than one.
    """
    if (run / "hier_lora.json").exists():
        return run
    known = sorted({p.parent for p in run.glob("**/adapter/hier_lora.json")})
    if not known:
        raise DataError(f"{run} holds no trained model: give the folder of a finished run")
    if len(known) > 1:
        listed = ", ".join(str(p.parent) for p in known[:6])
        raise DataError(f"{run} holds {len(known)} trained models: name one of {listed}")
    return known[0]


@dataclass(frozen=True)
class Asked:
    """A finished model, ready to be asked.

    Attributes:
        model: gives scores of all nodes for pictures.
        folder: where it came from.
        size: height and width of the pictures.
        tax: the taxonomy.
        decoder: by name.
        shown: the temperatures of the probabilities that are shown.
    """

    model: FrozenClassifier | HierLoraCLIP
    folder: Path
    size: int
    tax: Taxonomy
    decoder: str
    shown: Tensor | None

    @classmethod
    def load(cls, run: Path, decoder: str | None = None, top: bool = False) -> "Asked":
        """The model of a run.

        Raises:
            DataError: there is none, it is damaged, or it names several labels a picture.
            MissingAssetError: its pretrained weights are missing.
        """
        folder = find_model(run)
        check_sealed(folder)
        try:
            if (folder / BACKBONE).exists():
                frozen = FrozenClassifier.load(folder)
                decoder = decoder or frozen.product.settings.decoder
                shown = frozen.product.shown("joint_path" if top else decoder)
                return cls(frozen, folder, frozen.size, frozen.product.tax.to("cpu"), decoder, shown)
            model = HierLoraCLIP.from_pretrained(folder)
        except DataError:
            raise
        except ImportError as error:
            raise MissingAssetError(str(error)) from error
        except ValueError as error:
            raise DataError(str(error)) from error
        if not isinstance(model.tax, Taxonomy):
            raise DataError(
                f"{folder} names several labels a picture, over a graph: ask it with predict_labels from Python"
            )
        tax = model.tax.to("cpu")
        return cls(model, folder, model.picture_size or 224, tax, decoder or "joint_path", model.temperature)


def run(config: Predict) -> int:
    """Write one line a path; pictures that cannot be read are named, and make the exit status 1."""
    if config.tau is not None and (config.decoder != "threshold" or not 0 < config.tau <= 1):
        raise DataError(f"--tau must lie in (0, 1] and goes with --decoder threshold, got {config.tau}")
    if config.top is not None and (config.top < 1 or config.decoder is not None):
        raise DataError(f"--top must be at least 1 and goes without --decoder, got {config.top}")
    if not config.pictures and config.export is None:
        raise DataError("there is nothing to do: name pictures or folders of them, or a file after --export")
    allow_megapixels(config.max_megapixels)
    files = _files(config.pictures)
    paths = list(files)
    asked = Asked.load(config.run, config.decoder, config.top is not None)
    tax = asked.tax
    out_of_reach = _outside(tax, config.within) if config.within else None
    truth = _truth(files, tax) if config.tables else {}
    options = {} if config.tau is None else {"tau": config.tau}
    answers: dict[Path, int] = {}
    unread = 0
    with open(config.out, "w", encoding="utf-8", newline="") if config.out else nullcontext(sys.stdout) as out:
        write = _writer(config.format, out, tax.num_levels)
        for start in range(0, len(paths), BATCH):
            named, pixels = [], []
            for path in paths[start : start + BATCH]:
                try:
                    pixels.append(load_picture(path, asked.size))
                    named.append(path)
                except DataError as error:
                    unread += 1
                    print(f"error: {path}: {error}", file=sys.stderr)  # noqa: T201
            logits = asked.model.logits(pixels).cpu()
            if not torch.isfinite(logits).all():
                raise DataError(f"the model in {asked.folder} gives no finite scores: its weights are damaged")
            if out_of_reach is not None:
                logits = logits.masked_fill(out_of_reach, HOPELESS)
            if config.top:
                found = predict_top(logits, tax, config.top, asked.shown)
            else:
                found = [[path] for path in predict_paths(logits, tax, asked.decoder, asked.shown, **options)]
            for path, ranked in zip(named, found, strict=True):
                answers[path] = ranked[0].nodes[-1] if ranked[0].nodes else -1
                for rank, prediction in enumerate(ranked, start=1):
                    # Fewer than --top leaves lie within the node.
                    if out_of_reach is None or not any(out_of_reach[node] for node in prediction.nodes):
                        write(path, rank, prediction)
    if config.tables:
        scored = [path for path in answers if path in truth]
        write_class_tables(config.tables, [answers[p] for p in scored], [truth[p] for p in scored], tax)
    if config.export is not None:
        from app_eval.ask.export import export

        export(asked.model, asked.size, config.export)
    return 1 if unread else 0


def _truth(files: Mapping[Path, tuple[str, ...]], tax: Taxonomy) -> dict[Path, int]:
    """The class of each picture by the folders that hold it; pictures of inner classes are left out."""
    examples: dict[tuple[str, ...], str] = {}
    for path, label in files.items():
        examples.setdefault(label, str(path))
    matches = match_labels(examples, tax, "the folders")
    if matches.problems:
        raise DataError(f"--tables takes the folder of a picture for its class: {'; '.join(matches.problems[:3])}")
    nodes = {path: matches.nodes[label] for path, label in files.items()}
    return {path: node for path, node in nodes.items() if tax.leaf_index[node] >= 0}


def _files(paths: Sequence[Path]) -> dict[Path, tuple[str, ...]]:
    """The pictures, with those below folders, in name order, and the folders that hold each."""
    files: dict[Path, tuple[str, ...]] = {}
    for path in paths:
        if not path.is_dir():
            files.setdefault(path, path.absolute().parent.parts[-1:])
            continue
        inner = sorted(p for p in path.rglob("*") if p.name.lower().endswith(SUFFIXES))
        if not inner:
            raise DataError(f"{path} holds no pictures ({', '.join(SUFFIXES)})")
        for picture in inner:
            files.setdefault(picture, picture.relative_to(path).parent.parts or (path.absolute().name,))
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
            cell
            for pair in zip(found.names, found.probabilities, strict=True)
            for cell in (safe_cell(pair[0]), pair[1])
        ]
        empty = [""] * (2 * (levels - len(found.names)))
        table.writerow([safe_cell(str(path)), rank, safe_cell("/".join(found.names)), *cells, *empty])

    return row
