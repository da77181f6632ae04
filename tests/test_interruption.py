"""A run that is stopped or killed anywhere goes on with the same command and ends in the same numbers, bit for bit."""

import hashlib
import signal
import time

import pytest

TRAINED = "seed-0/trained"


def digest(run):
    """The numbers of a finished run: results, weights, and the log of every step."""
    names = ["result.json", *(f"{TRAINED}/{name}" for name in ("result.json", "metrics.jsonl", "outcome.safetensors"))]
    names += [f"{TRAINED}/adapter/{name}.safetensors" for name in ("adapter_model", "hier_lora")]
    return {name: hashlib.sha256((run / name).read_bytes()).hexdigest() for name in names}


def wait_for(condition, process, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "the run never got there"
        time.sleep(0.01)


def arguments(colours, trained, out, quick):
    cache = trained.parent / "cache"
    return ["apps/train", "folder", "--data", str(colours), "--cache-dir", str(cache), "--out", str(out), *quick]


@pytest.mark.parametrize("where", ["second stage", "at the end"])
def test_killed_runs_end_in_the_same_numbers(where, colours, trained, started, command, quick, tmp_path):
    out = tmp_path / "run"
    args = arguments(colours, trained, out, quick)
    # 32 training pictures: 2 head steps an epoch, then 4 LoRA steps an epoch, so steps 5 to 12 belong to the second stage.
    reached = {
        "second stage": lambda: bool(list((out / TRAINED).glob("checkpoint-*0[68]/COMPLETE"))),
        "at the end": lambda: (out / TRAINED / "adapter" / "adapter_config.json").exists(),
    }[where]
    process = started(*args)
    wait_for(reached, process)
    process.kill()
    process.communicate()
    status, _, err = command(*args)
    assert status == 0, err
    assert digest(out) == digest(trained)


def test_sigterm_saves_and_says_so(colours, trained, started, command, quick, tmp_path):
    out = tmp_path / "run"
    args = arguments(colours, trained, out, quick)
    process = started(*args)
    wait_for(lambda: bool(list((out / TRAINED).glob("checkpoint-*"))), process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 143, err
    assert "the same command goes on" in err
    assert "Traceback" not in err
    status, _, err = command(*args)
    assert status == 0, err
    assert digest(out) == digest(trained)


def test_a_damaged_checkpoint_is_named(colours, trained, started, command, quick, tmp_path):
    out = tmp_path / "run"
    args = arguments(colours, trained, out, quick)
    process = started(*args)
    wait_for(lambda: bool(list((out / TRAINED).glob("checkpoint-*/COMPLETE"))), process)
    process.kill()
    process.communicate()
    newest = sorted((out / TRAINED).glob("checkpoint-*"))[-1]
    weights = newest / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])
    status, _, err = command(*args)
    assert status == 2
    assert str(newest) in err.strip().splitlines()[-1]
    assert "Traceback" not in err
