"""Everything that wants a graphics card, in one command of under eight minutes: `python tools/gpu_check.py --out DIR`.

Tests marked `gpu`; the CUDA rows of the benchmarks; one short training of each recipe family on generated data with random weights,
in bfloat16, stopped by a signal and gone on with. Everything lands in DIR: `gpu_check.json`, the benchmark rows, the log of each step.
A step that cannot run says why. `--dry` runs no step and marks each: it shows on any machine what a card would be asked.
`python tools/gpu_check.py --take DIR` puts the measured rows into docs/benchmarks.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
BENCHMARKS = (
    ("hyper-geom", "info_nce"),  # the fused loss in Triton against two matmuls, N = M = 16384
    ("hyper-geom", "pairwise"),
    ("hier-losses", "losses"),  # TP-KL + HiSCE
    ("hier-losses", "cross_entropy"),
    ("hyper-icl", "attention"),  # calibration at T 8192
    ("mat-align", "logits"),
    ("hyper-blip", "stage1"),
)
# One recipe of each family, in its smallest setting: see tests/golden/recipes.py.
RECIPES = ("cub", "mat-clip", "blip2-opt-2.7b", "icl-mini")
# Options that make a recipe compute in bfloat16; blip2-opt-2.7b does so by itself.
PRECISION = {"cub": ["--fit.mixed-precision", "bf16"]}


@dataclass
class Row:
    """One step: what it is, how it ended, and the command that repeats it."""

    kind: str
    name: str
    command: str
    status: str = "not run"
    why: str = ""
    seconds: float = 0.0
    facts: dict = field(default_factory=dict)


class Check:
    """Runs the steps one by one within a budget of time, and writes the result after each."""

    def __init__(self, out: Path, minutes: float, dry: bool) -> None:
        self.out, self.dry, self.rows = out, dry, []
        self.end = time.monotonic() + 60 * minutes
        out.mkdir(parents=True, exist_ok=True)
        self.missing = "" if dry else no_card()

    def step(self, kind: str, name: str, command: list[str], work: Callable[[Row, float], None]) -> None:
        """One step; `work` fills the row and has the seconds that are left."""
        row = Row(kind, name, " ".join(command))
        start, left = time.monotonic(), self.end - time.monotonic()
        if self.dry or self.missing:
            row.why = "needs a CUDA device" if self.dry else self.missing
        elif left < 20:
            row.why = "the time was used up"
        else:
            try:
                work(row, left)
            except subprocess.TimeoutExpired:
                row.status, row.why = "failed", f"took longer than the {left:.0f} s that were left"
            except (OSError, ValueError, KeyError, RuntimeError) as error:
                row.status, row.why = "failed", f"{type(error).__name__}: {error}"
        row.seconds = round(time.monotonic() - start, 1)
        self.rows.append(row)
        print(f"{row.status:8s} {row.kind:10s} {row.name:24s} {row.seconds:7.1f} s  {row.why}", flush=True)
        self.write()

    def write(self) -> None:
        """The JSON file that pages take up."""
        content = {"format": 1, "machine": machine(), "dry": self.dry, "rows": [asdict(row) for row in self.rows]}
        (self.out / "gpu_check.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def run(self, command: list[str], log: str, left: float, **variables: str) -> int:
        """Run a command to its end, with its output in a log file."""
        with open(self.out / f"{log}.log", "w", encoding="utf-8") as file:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=environment(**variables),
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=left,
                check=False,
            )
        return done.returncode

    def tests(self) -> None:
        """The tests that only a card can run."""
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "gpu",
            "-p",
            "no:cacheprovider",
            "packages",
            "apps",
            "tests",
        ]

        def work(row: Row, left: float) -> None:
            code = self.run(command, "tests", min(left, 150))
            tail = (self.out / "tests.log").read_text(encoding="utf-8").strip().splitlines()[-1:]
            row.status, row.why = ("passed", "") if code == 0 else ("failed", f"exit status {code}: see tests.log")
            row.facts = {"summary": tail[0] if tail else ""}

        self.step("tests", "gpu", command, work)

    def benchmark(self, package: str, name: str) -> None:
        """The CUDA rows of a benchmark."""
        script, rows = f"packages/{package}/benchmarks/bench_{name}.py", self.out / f"{package}-{name}.json"
        command = [sys.executable, "tools/bench.py", script, "--cuda-only", "--json", str(rows)]

        def work(row: Row, left: float) -> None:
            code = self.run(command, f"{package}-{name}", min(left, 90))
            found = json.loads(rows.read_text(encoding="utf-8")) if rows.exists() else []
            measured = [each for each in found if each["device"] == "cuda" and each["status"] != "not measured"]
            row.status = "passed" if code == 0 and measured else "failed"
            row.why = (
                "" if row.status == "passed" else f"exit status {code}, {len(measured)} rows: see {package}-{name}.log"
            )
            row.facts = {"rows": len(measured)}

        self.step("benchmark", f"{package} {name}", command, work)

    def recipe(self, name: str) -> None:
        """A short training: stopped by a signal after its first steps, gone on with, finite to the end."""
        sys.path[:0] = [str(ROOT / "tests")]
        from golden.recipes import RECIPES as CASES

        case, folder = CASES[name], self.out / "recipes" / name
        absent = [need for need in case.needs if find_spec(need) is None]
        command = [sys.executable, "apps/train", name, *PRECISION.get(name, [])]

        def work(row: Row, left: float) -> None:
            if absent:
                row.why = f"needs {', '.join(absent)}"
                return
            folder.mkdir(parents=True, exist_ok=True)
            commands = [[*each, *PRECISION.get(name, [])] for each in case.prepare(folder)]
            for number, arguments in enumerate(commands):
                last = number == len(commands) - 1
                stopped = last and self.interrupt(arguments, f"{name}-first", left)
                code = self.run([sys.executable, "apps/train", *arguments], name, left)
                if code:
                    row.status, row.why = "failed", f"exit status {code}: see {name}.log"
                    return
            losses = [
                json.loads(line)["loss"]
                for path in sorted(folder.rglob("metrics.jsonl"))
                for line in path.read_text(encoding="utf-8").splitlines()
            ]
            finite = bool(losses) and all(abs(loss) < float("inf") for loss in losses)
            row.status = "passed" if finite else "failed"
            row.why = "" if finite else "a loss is not finite, or none was recorded"
            row.facts = {
                "steps": len(losses),
                "stopped_and_gone_on_with": stopped,
                "last_loss": losses[-1] if losses else None,
            }

        self.step("recipe", name, command, work)

    def interrupt(self, arguments: list[str], log: str, left: float) -> bool:
        """Start a training and ask it to stop once it has recorded a step; whether it did before it was finished."""
        out = Path(arguments[arguments.index("--out") + 1])
        with open(self.out / f"{log}.log", "w", encoding="utf-8") as file:
            process = subprocess.Popen(
                [sys.executable, "apps/train", *arguments],
                cwd=ROOT,
                env=environment(),
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            end = time.monotonic() + left
            while process.poll() is None and time.monotonic() < end:
                if any(path.stat().st_size for path in out.rglob("metrics.jsonl")):
                    process.send_signal(signal.SIGTERM)
                    break
                time.sleep(0.05)
            try:
                return process.wait(timeout=max(1, end - time.monotonic())) != 0
            except subprocess.TimeoutExpired:
                process.kill()
                raise


def no_card() -> str:
    """Why nothing can run here; empty if there is a card."""
    if find_spec("torch") is None:
        return "torch is not installed"
    import torch

    return "" if torch.cuda.is_available() else "no CUDA device"


def environment(**variables: str) -> dict[str, str]:
    """This checkout's sources first; no hub, one thread."""
    sources = [str(path) for path in sorted(ROOT.glob("*/*/src"))]
    path = os.pathsep.join([*sources, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {
        **os.environ,
        "PYTHONPATH": path,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "MPLBACKEND": "Agg",
        **variables,
    }


def machine() -> dict:
    """What the numbers belong to."""
    found = {"python": platform.python_version(), "system": platform.platform()}
    if find_spec("torch") is not None:
        import torch

        found["torch"] = torch.__version__
        if torch.cuda.is_available():
            found |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found


def take(folder: Path) -> int:
    """Put the measured CUDA rows of a check into docs/benchmarks in place of those that were not measured."""
    check = json.loads((folder / "gpu_check.json").read_text(encoding="utf-8"))
    card, taken = check["machine"].get("device", "cuda"), 0
    for path in sorted((ROOT / "docs" / "benchmarks").glob("*.json")):
        if not (folder / path.name).exists():
            continue
        new = [row for row in json.loads((folder / path.name).read_text(encoding="utf-8")) if row["device"] == "cuda"]
        new = [{**row, "machine": card} for row in new if row["status"] != "not measured"]
        names = {(row["name"], row["setting"], row["unit"]) for row in new}
        old = json.loads(path.read_text(encoding="utf-8"))
        kept = [r for r in old if r["device"] != "cuda" or (r["name"], r["setting"], r["unit"]) not in names]
        path.write_text(json.dumps([*kept, *new], indent=1) + "\n", encoding="utf-8")
        taken += len(new)
    subprocess.run([sys.executable, str(ROOT / "docs" / "benchmarks" / "make_index.py")], check=True)
    return taken


def main() -> int:
    """Run the check; the exit status is 1 if a step failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the result")
    parser.add_argument("--dry", action="store_true", help="run nothing, mark every step")
    parser.add_argument("--minutes", type=float, default=8, help="start nothing after so many minutes")
    parser.add_argument("--take", type=Path, help="put the rows of an earlier check into docs/benchmarks")
    args = parser.parse_args()
    if args.take is not None:
        print(f"{take(args.take)} rows taken")
        return 0
    if args.out is None:
        parser.error("--out is missing: name a folder for the result")
    check = Check(args.out.absolute(), args.minutes, args.dry)
    check.tests()
    for package, name in BENCHMARKS:
        check.benchmark(package, name)
    for name in RECIPES:
        check.recipe(name)
    return int(any(row.status == "failed" for row in check.rows))


if __name__ == "__main__":
    raise SystemExit(main())
