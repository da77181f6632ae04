"""Record what every recipe computes on miniature data, or check that it still computes the same.

    python tests/golden/record.py                    record all cases into tests/golden/<case>.json
    python tests/golden/record.py cub mat            record two of them
    python tests/golden/record.py --check            run, compare digit for digit, print the differences
    python tests/golden/record.py --into DIR cub     record into another folder; the test does this

A recording holds the columns of every `metrics.jsonl` (the first 20 steps) and the numbers of every result, with nine digits,
which tell any two float32 apart. Everything runs in one process with one thread and in a home folder of its own.
"""

import argparse
import contextlib
import io
import json
import math
import os
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
if str(HERE.parent) not in sys.path:  # run as a program
    sys.path.insert(0, str(HERE.parent))

from golden.recipes import RECIPES, Case  # noqa: E402

STEPS = 20
# Not results: costs, settings that the case itself gives, and the formats of files.
LEFT_OUT = {
    "format",
    "seed",
    "seconds",
    "seconds_of_last_start",
    "peak_memory_mib",
    "settings",
    "options",
    "loss",
    "model",
}
SCORE_ATOL = 0.02


def missing(case: Case) -> list[str]:
    """Modules that a case needs and that are not installed."""
    return [name for name in case.needs if find_spec(name) is None]


def run(name: str, folder: Path) -> dict:
    """Run a case through the command line, in this process, and collect its numbers."""

    from app_train.cli import main

    case = RECIPES[name]
    folder.mkdir(parents=True)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        commands = case.prepare(folder)
    for command in commands:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            status = main(command)
        if status:
            raise RuntimeError(f"{' '.join(command)} ended with {status}:\n{said.getvalue()[-2000:]}")
    return collect(folder / "run", case)


def collect(run_folder: Path, case: Case) -> dict:
    """The numbers of a run folder: columns of steps, and results as dotted names, by row, seed and stage."""
    found: dict[str, dict] = {"steps": {}, "scores": {}}
    for path in sorted(run_folder.rglob("*")):
        place = case.place(path.relative_to(run_folder))
        if place is None or not path.is_file() or any(part.startswith("checkpoint-") for part in path.parts):
            continue
        if path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            found["steps"][place] = {"count": len(lines), **columns(lines[:STEPS])}
        elif path.name in ("run.json", "facts.json") or (path.name.startswith("result") and path.suffix == ".json"):
            content = json.loads(path.read_text(encoding="utf-8"))
            found["scores"].setdefault(place, {}).update(leaves(content))
        elif path.name == "outcome.safetensors" and case.outcomes:
            found["scores"].setdefault(place, {}).update(means(path))
    return found


def columns(lines: list[dict]) -> dict[str, list]:
    """Numbers of all steps, column by column; None where a step lacks one."""
    names = sorted({key for line in lines for key, value in line.items() if isinstance(value, (int, float))})
    return {name: [number(line.get(name)) for line in lines] for name in names if name != "step"}


def leaves(content: object, prefix: str = "") -> dict[str, float | None]:
    """Numbers of a JSON value by dotted name; a string of zeros and ones counts as the share of its ones."""
    if isinstance(content, dict):
        pairs = [(str(key), value) for key, value in content.items() if key not in LEFT_OUT]
    elif isinstance(content, list):
        pairs = [(str(index), value) for index, value in enumerate(content)]
    elif isinstance(content, str) and len(content) > 1 and set(content) <= set("01"):
        return {prefix: number(content.count("1") / len(content))}
    elif isinstance(content, (int, float)) and not isinstance(content, bool):
        return {prefix: number(content)}
    else:
        return {}
    found = {}
    for key, value in pairs:
        found |= leaves(value, f"{prefix}.{key}" if prefix else key)
    return found


def means(path: Path) -> dict[str, float | None]:
    """The mean of every floating-point array of a file."""
    from safetensors.numpy import load_file

    arrays = load_file(path)
    return {
        f"mean.{name}": number(float(a.mean(dtype="f8"))) for name, a in sorted(arrays.items()) if a.dtype.kind == "f"
    }


def number(value: float | None) -> float | int | None:
    """With nine digits; None for what JSON cannot hold."""
    if value is None or not math.isfinite(value):
        return None
    return int(value) if isinstance(value, int) else float(f"{value:.9g}")


def differences(known: dict, found: dict, rtol: float = 2e-4, *, exact: bool = False) -> list[str]:
    """What differs between two recordings, one line each, the largest first; nothing if they agree.

    Args:
        known: the recording.
        found: what was computed now.
        rtol: how far columns may differ, relatively; scores may differ by `SCORE_ATOL` more.
        exact: compare digit for digit instead.
    """
    lines = []
    for part in ("steps", "scores"):
        old, new = (dict(flat(recording[part])) for recording in (known, found))
        # What is recorded beside the old numbers is no difference.
        for key in sorted(old.keys()):
            if key not in new:
                lines.append((math.inf, f"{part}: {key} is gone"))
                continue
            a, b = old[key], new[key]
            allowed = 0.0 if exact else rtol * abs(a or 0) + (SCORE_ATOL if part == "scores" else 1e-6)
            if (a is None) != (b is None) or (a is not None and abs(a - b) > allowed):
                gap = math.inf if a is None or b is None else abs(a - b) / max(abs(a), 1e-12)
                lines.append((gap, f"{part}: {key} was {a}, is {b} (relative {gap:.2g})"))
    return [text for _, text in sorted(lines, key=lambda line: (-line[0], line[1]))]


def flat(content: object, prefix: str = ""):
    """Pairs of path and number of a recording."""
    if isinstance(content, (dict, list)):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content, 1):
            yield from flat(value, f"{prefix}/{key}" if prefix else str(key))
    else:
        yield prefix, content


def text(recording: dict) -> str:
    """A recording as JSON with one line for each column and each row of results."""
    parts = []
    for part, places in recording.items():
        rows = []
        for place, values in places.items():
            cells = ",\n".join(f"   {json.dumps(key)}: {json.dumps(value)}" for key, value in values.items())
            rows.append(f"  {json.dumps(place)}: {{\n{cells}\n  }}")
        parts.append(f" {json.dumps(part)}: {{\n" + ",\n".join(rows) + "\n }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def settle(home: Path) -> None:
    """One thread, nothing from a network, a home folder of its own, and miniature packages of data and weights first."""
    import torch

    from helpers import releases, weights

    torch.set_num_threads(1)
    os.environ["HOME"] = str(home)
    releases.easy_vqa(home / "packages")
    if find_spec("gguf") is not None:
        weights.smollm2(home / "packages")
    sys.path.insert(0, str(home / "packages"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"cases, all if none is given: {', '.join(RECIPES)}")
    parser.add_argument("--check", action="store_true", help="compare digit for digit instead of recording")
    parser.add_argument("--into", type=Path, default=HERE, help="folder of the recordings")
    args = parser.parse_args()
    unknown = sorted(set(args.names) - set(RECIPES))
    if unknown:
        parser.error(f"no case {unknown[0]!r}; the cases are {', '.join(RECIPES)}")
    for key, value in {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "Agg"}.items():
        os.environ.setdefault(key, value)
    status = 0
    with tempfile.TemporaryDirectory() as home:
        settle(Path(home))
        for name in args.names or RECIPES:
            lacking = missing(RECIPES[name])
            if lacking:
                print(f"{name:<20} skipped: {', '.join(lacking)} not installed", flush=True)
                continue
            begun = time.process_time()
            found = run(name, Path(home) / "cases" / name)
            count = sum(place["count"] for place in found["steps"].values())
            line = f"{name:<20} {time.process_time() - begun:6.1f} CPU s, {count:4} steps"
            if args.check:
                known = json.loads((args.into / f"{name}.json").read_text(encoding="utf-8"))
                lines = differences(known, found, exact=True)
                print(f"{line}, {len(lines)} differences", *lines[:20], sep="\n  ", flush=True)
                status |= bool(lines)
            else:
                args.into.mkdir(parents=True, exist_ok=True)
                path = args.into / f"{name}.json"
                path.write_text(text(found), encoding="utf-8")
                print(f"{line}, {path.stat().st_size / 1000:.0f} kB", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
