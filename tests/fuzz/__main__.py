"""Public functions and command lines with any arguments, damaged files, and random trees against brute force.

python tests/fuzz         300 calls of each function, 2,000 command lines, 10,000 trees, 200 files of each form, 50 of each finished run
python tests/fuzz --calls 50 --trees 100 --commands 20 --files 5 --seed 7
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.commands import fuzz_commands
from fuzz.functions import fuzz, public_functions
from fuzz.readers import Reader, fuzz_readers, readers
from fuzz.runs import runs
from fuzz.trees import fuzz_tree
from golden import record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=300, help="of each function")
    parser.add_argument("--trees", type=int, default=10_000)
    parser.add_argument("--commands", type=int, default=2_000)
    parser.add_argument("--files", type=int, default=200, help="damages of each form")
    parser.add_argument(
        "--runs", type=int, default=50, help="damages of a finished run, for each command that takes one"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    wrong = _functions(args.calls, args.seed) + _trees(args.trees, args.seed) + _commands(args.commands, args.seed)
    wrong += _files("forms", readers(), args.files, args.seed)
    return int(bool(wrong + _runs(args.runs, args.seed)))


def _functions(calls: int, seed: int) -> int:
    begun, skipped, wrong, total, values = time.monotonic(), [], 0, 0, 0
    known = public_functions()
    for name, function in known.items():
        found = fuzz(function, calls, seed)
        if found is None:
            skipped.append(name)
            continue
        total, values, wrong = total + found.calls, values + found.values, wrong + len(found.wrong)
        for kind, where in found.wrong.items():
            print(f"{name}: {kind}\n    {where}", flush=True)
    seconds = time.monotonic() - begun
    print(
        f"{total} calls of {len(known) - len(skipped)} of {len(known)} functions: {values} values, {total - values} refused, "
        f"{wrong} kinds of faults, {seconds:.0f} s"
    )
    print(f"not called, since an argument is an object of the library or a model: {', '.join(skipped)}")
    return wrong


def _trees(count: int, seed: int) -> int:
    begun = time.monotonic()
    wrong = [said for number in range(count) if (said := fuzz_tree(seed * count + number))]
    for said in wrong[:20]:
        print(said)
    print(f"{count} trees, {len(wrong)} faults, {time.monotonic() - begun:.0f} s")
    return len(wrong)


def _commands(count: int, seed: int) -> int:
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        wrong = fuzz_commands(count, seed, Path(folder))
    for said in wrong[:20]:
        print(said)
    print(f"{count} command lines, {len(wrong)} faults, {time.monotonic() - begun:.0f} s")
    return len(wrong)


def _runs(count: int, seed: int) -> int:
    if not count:
        return 0
    with tempfile.TemporaryDirectory(prefix="fuzz-") as home:
        record.settle(Path(home))
        return _files("commands on finished runs", runs(), count, seed)


def _files(what: str, known: dict[str, Reader], count: int, seed: int) -> int:
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        values, wrong = fuzz_readers(known, count, seed, Path(folder))
    for said in wrong[:20]:
        print(said)
    total = count * len(known)
    print(
        f"{total} damaged files of {len(known)} {what}: {values} values, {total - values - len(wrong)} refused, {len(wrong)} faults, "
        f"{time.monotonic() - begun:.0f} s"
    )
    return len(wrong)


if __name__ == "__main__":
    sys.exit(main())
