"""Try faults on the recipes and tell how they end.

python tests/faults                              all faults of all families; two processes at a time
python tests/faults --families mat --kinds killed "disk full"
python tests/faults --write             also write docs/reliability.json and the table of docs/reliability.md
python tests/faults --together          one process against two, for each recipe; with --write into docs/reliability.md
python tests/faults --mutate            break the safeguards one by one in a copy: each must be noticed
"""

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from faults import children, families, matrix, mutations, report, together

MODULES = ("torch", "app_train.cli", "accelerate", "transformers", "peft", "sklearn.linear_model")
# How many moments of a recipe are tried: fewer of the slow ones.
DENSITY = {"emoji": 0.25, "folder": 0.5, "blip-mini": 0.5}
_KNOWN: dict[str, families.Family] = {}
_TRIED: list[tuple[str, matrix.Fault]] = []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=families.NAMES, choices=families.NAMES)
    parser.add_argument("--kinds", nargs="+", default=list(matrix.KINDS), choices=list(matrix.KINDS))
    parser.add_argument("--density", type=float, default=1.0, help="how many moments are tried, as a multiple")
    parser.add_argument("--first", action="store_true", help="stop at the first fault that ends badly")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--write", action="store_true", help="write docs/reliability.json and the table of docs/reliability.md"
    )
    parser.add_argument(
        "--together", nargs="*", metavar="RECIPE", help="run recipes in one process and in two, and compare"
    )
    parser.add_argument(
        "--mutate", nargs="?", const="", metavar="PART", help="break the safeguards, or those whose name has this part"
    )
    args = parser.parse_args()
    if args.mutate is not None:
        return int(bool(mutations.mutate(args.mutate)))
    if args.together is not None:
        return _together(args.together, args.write)
    if os.environ.get("FAULTS_MOUNTS") is None:
        _with_mounts()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as root:
        ends = attempt(args, Path(root))
    wrong = [end for end in ends if end["wrong"]]
    for end in wrong:
        print(f"{end['family']}: {end['kind']}: {end['label']}\n    {end['wrong']}")
    minutes = (time.monotonic() - begun) / 60
    print(f"{len(ends)} faults, {len(wrong)} ended badly, {minutes:.1f} minutes")
    if args.write:
        report.write(ends)
    return int(bool(wrong))


def _together(names: list[str], write: bool) -> int:
    found = []
    with tempfile.TemporaryDirectory(prefix="together-") as root:
        families.settle(Path(root) / "settled")
        children.warm(MODULES)
        for name in names or together.NAMES:
            found.append(together.compare(name, Path(root) / name))
            print(json.dumps(found[-1]), flush=True)
    if write:
        report.write_together(found)
    return int(any(one["says"] not in ("", "refused") for one in found))


def attempt(args: argparse.Namespace, root: Path) -> list[dict]:
    """Try the chosen faults."""
    families.settle(root / "settled")
    context = multiprocessing.get_context("fork")
    children.warm(MODULES)
    with context.Pool(args.jobs) as pool:
        found = pool.starmap(families.prepare, [(name, root / name) for name in args.families], chunksize=1)
    children.warm(sorted({module for family in found for module in family.modules}))
    for family in found:
        _KNOWN[family.name] = family
        density = args.density * DENSITY.get(family.name, 1.0)
        _TRIED.extend((family.name, f) for f in matrix.faults(family, density) if f.kind in args.kinds)
    with context.Pool(args.jobs) as pool:
        ends = []
        for end in pool.imap_unordered(_try, range(len(_TRIED)), chunksize=1):
            ends.append(end)
            if end["wrong"] and args.first:
                break
        return ends


def _try(number: int) -> dict:
    name, fault = _TRIED[number]
    family, begun = _KNOWN[name], time.monotonic()
    folder = family.trial(f"{number:04d}", cold=fault.cold)
    try:
        wrong = fault.attempt(family, folder)
    except Exception as error:
        wrong = f"{type(error).__name__}: {error}"
    for path in folder.parent.glob(f"{folder.name}*"):
        shutil.rmtree(path, ignore_errors=True)
    seconds = round(time.monotonic() - begun, 1)
    if wrong:
        print(f"! {name}: {fault.kind}: {fault.label}: {wrong[:300]}", file=sys.stderr, flush=True)
    return {"family": name, "kind": fault.kind, "label": fault.label, "wrong": wrong, "seconds": seconds}


def _with_mounts() -> None:
    """Begin again where this process may mount small disks that nobody else sees, if the machine has such a place."""
    flags = "-m" if os.getuid() == 0 else "-rm"
    with suppress(OSError):
        if subprocess.run(["unshare", flags, "true"], capture_output=True, check=False).returncode == 0:
            os.environ["FAULTS_MOUNTS"] = "own"
            os.execvp("unshare", ["unshare", flags, sys.executable, *sys.argv])
    os.environ["FAULTS_MOUNTS"] = "none"


if __name__ == "__main__":
    sys.exit(main())
