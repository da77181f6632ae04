"""A run folder belongs to one run and one process at a time; what may differ between two commands does not block them."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from pydantic import Field

from app_data.store.atomic import new_file, new_folder, remove_folder, write_json
from app_data.store.errors import DataError
from app_train.core.config import Frozen, RunConfig, StageConfig, config_hash, read_yaml
from app_train.core.errors import RunError
from app_train.core.run_folder import Run


class Group(Frozen):
    stage: StageConfig = StageConfig(lr=2e-4)
    rank: int = 4


class Config(RunConfig):
    fit: Group = Group()
    seeds: int = Field(1, ge=1)
    rates: dict[str, float] = Field(default_factory=lambda: {"a": 1.0, "b": 2.0})


def config(folder, **more):
    return Config(out=folder, **more)


def claim(settings, data="data-1"):
    with Run("test", settings, ("seeds",)) as run:
        run.claim(data)


def test_settings_stand_in_the_folder_before_anything_else(tmp_path):
    claim(config(tmp_path / "run"))
    written = yaml.safe_load((tmp_path / "run" / "config.resolved.yaml").read_text())
    assert written["config"]["fit"]["stage"]["lr"] == 2e-4
    assert "torch" in written["versions"]


@pytest.mark.parametrize(
    "more", [{"save_every": 3}, {"tensorboard": False}, {"cache_dir": Path("elsewhere")}, {"seeds": 3}, {}]
)
def test_what_says_where_and_how_does_not_block_a_resume(tmp_path, more):
    claim(config(tmp_path / "run"))
    claim(config(tmp_path / "run", **more))


def test_other_settings_are_named_with_dots_old_and_new(tmp_path):
    claim(config(tmp_path / "run"))
    other = Group(stage=StageConfig(lr=0.5), rank=8)
    with pytest.raises(RunError, match=r"fit\.stage\.lr: 0\.0002 -> 0\.5; fit\.rank: 4 -> 8"):
        claim(config(tmp_path / "run", fit=other))
    with pytest.raises(RunError, match="the data: data-1 -> data-2"):
        claim(config(tmp_path / "run"), "data-2")


def test_a_foreign_folder_and_a_file_are_refused(tmp_path):
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "thesis.tex").write_text("")
    with pytest.raises(RunError, match="not empty"):
        claim(config(strange))
    with pytest.raises(RunError, match="is a file"):
        claim(config(strange / "thesis.tex"))


def test_two_processes_cannot_share_a_folder(tmp_path):
    with Run("test", config(tmp_path / "run")) as run:
        run.claim("data-1")
        code = (
            "import fcntl, sys; f = open(sys.argv[1], 'a+'); "
            "\ntry: fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB); print('free')"
            "\nexcept BlockingIOError: print('taken')"
        )
        args = [sys.executable, "-c", code, str(tmp_path / "run" / ".lock")]
        assert subprocess.run(args, capture_output=True, text=True).stdout.strip() == "taken"
        with pytest.raises(RunError, match=f"process {os.getpid()} on .* is at work"):
            claim(config(tmp_path / "run"))
    claim(config(tmp_path / "run"))  # the first one has let go


def test_a_lock_of_a_dead_process_is_taken_over(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text("process 999999 on elsewhere")
    claim(config(tmp_path / "run"))


@pytest.mark.parametrize("content", ["", "config: {", "just a sentence", "config: 3\ndata: x\n"])
def test_damaged_settings_say_how_to_go_on(tmp_path, content):
    claim(config(tmp_path / "run"))
    path = tmp_path / "run" / "config.resolved.yaml"
    path.write_text(content)
    with pytest.raises(RunError, match="delete this file"):
        claim(config(tmp_path / "run"))
    path.unlink()
    claim(config(tmp_path / "run"))


def test_a_full_disk_leaves_no_half_settings(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space"):
            claim(config(tmp_path / "run"))
    assert not (tmp_path / "run" / "config.resolved.yaml").exists()
    claim(config(tmp_path / "run"))


def test_leftovers_of_a_killed_writer_go_when_the_folder_is_claimed(tmp_path):
    claim(config(tmp_path / "run"))
    (tmp_path / "run" / "row").mkdir()
    (tmp_path / "run" / "row" / ".adapter.tmp-123").mkdir()
    (tmp_path / "run" / ".result.json.tmp-123").write_text("{")
    claim(config(tmp_path / "run"))
    assert not list((tmp_path / "run").rglob(".*tmp*"))


def test_a_result_comes_before_the_manifest_and_is_read_back(tmp_path):
    with Run("test", config(tmp_path / "run"), ("seeds",)) as run:
        run.claim("data-1")
        assert run.result() is None
        run.finish({"n": 3, "pair": (1, 2)})
        assert run.result() is None  # not sealed: the report may be missing
        run.seal()
        assert run.result()["pair"] == [1, 2]
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())["sha256"]
    assert set(manifest) == {"config.resolved.yaml", "result.json"}
    with Run("test", config(tmp_path / "run", seeds=2), ("seeds",)) as run:
        run.claim("data-1")
        assert run.result() is None  # more was asked for


def test_a_result_is_not_read_back_where_a_file_has_changed(tmp_path):
    def finish():
        with Run("test", config(tmp_path / "run"), ("seeds",)) as run:
            run.claim("data-1")
            write_json(run.out / "seed-0" / "scores.json", {"a": 1})
            (run.out / "seed-0" / "checkpoint-00000003").mkdir()
            run.finish({"n": 3})
            run.seal()

    def known(**more):
        with Run("test", config(tmp_path / "run", **more), ("seeds",)) as run:
            run.claim("data-1")
            return run.result()

    finish()
    assert not (tmp_path / "run" / "seed-0" / "checkpoint-00000003").exists()
    assert known()["n"] == 3
    assert known(save_every=7)["n"] == 3  # the settings are written anew
    for name in ("seed-0/scores.json", "result.json", "manifest.json"):
        path = tmp_path / "run" / name
        path.write_text(path.read_text().replace("1", "2").replace("3", "4"))
        assert known() is None
        finish()
    (tmp_path / "run" / "seed-0" / "scores.json").unlink()
    assert known() is None


def test_a_result_of_a_later_version_is_left_alone(tmp_path):
    with Run("test", config(tmp_path / "run"), ("seeds",)) as run:
        run.claim("data-1")
        run.finish({"format": 2})
        run.seal()
        with pytest.raises(DataError, match="result.json has format 2, this version reads 1"):
            run.result()


def test_a_folder_that_is_being_deleted_has_lost_its_name(tmp_path, monkeypatch):
    (tmp_path / "checkpoint-1").mkdir()
    monkeypatch.setattr("app_data.store.atomic.shutil.rmtree", lambda *_, **__: None)  # killed right here
    remove_folder(tmp_path / "checkpoint-1")
    assert not (tmp_path / "checkpoint-1").exists()
    assert len(list(tmp_path.glob(".checkpoint-1.old.tmp-*"))) == 1


def test_a_full_disk_is_told_by_its_number(tmp_path):
    """safetensors says it in its own words, and gives the space back first."""
    with pytest.raises(OSError, match="No space") as caught, new_file(tmp_path / "x"):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


def test_one_process_recipes_refuse_several(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="runs in one process"):
        Run("test", config(tmp_path / "run"), processes=False)


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("[../gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:16259", RunError),
        ("NCCL error: remote process exited", RunError),
        ("mat1 and mat2 shapes cannot be multiplied", RuntimeError),
    ],
)
def test_a_process_that_is_left_says_so(tmp_path, said, kind):
    """Another one was stopped while this one waited for it; an error of our own stays what it is."""
    run = Run("test", config(tmp_path / "run"), ("seeds",))
    run.accelerator = SimpleNamespace(num_processes=2)
    with pytest.raises(kind) as caught, run:
        raise RuntimeError(said)
    assert type(caught.value) is kind
    if kind is RunError:
        assert "another process of this run has ended" in str(caught.value)


def test_a_file_merges_into_the_recipes_own_defaults(tmp_path):
    """A nested group keeps what the file does not name: the recipe's learning rate, not that of the group's class."""
    file = tmp_path / "some.yaml"
    file.write_text("fit: {stage: {epochs: 1}}\nrates: {a: 5.0}\n")
    read = read_yaml(file, Config)
    assert read.fit.stage == StageConfig(lr=2e-4, epochs=1)
    assert read.rates == {"a": 5.0, "b": 2.0}


def test_resolved_settings_can_be_fed_back(tmp_path):
    settings = config(tmp_path / "run", fit=Group(rank=7))
    claim(settings)
    assert read_yaml(tmp_path / "run" / "config.resolved.yaml", Config) == settings


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fit: {rnak: 3}", "rnak"),
        ("[1, 2]", "keys and values"),
        ("fit: {stage: {epochs: -1}}", "epochs"),
        ("a: [", "YAML"),
    ],
)
def test_wrong_files_are_explained(tmp_path, text, words):
    file = tmp_path / "some.yaml"
    file.write_text(text)
    with pytest.raises(RunError, match=words):
        read_yaml(file, Config)


def test_the_hash_changes_with_any_setting():
    one, other = Config(), Config(fit=Group(rank=8))
    assert config_hash(one) != config_hash(other)
    assert config_hash(one) == config_hash(Config(**json.loads(one.model_dump_json())))


def die_writing(make, target):
    with make(target) as temporary:
        (temporary / "a" if temporary.is_dir() else temporary).write_text("new")
        raise ZeroDivisionError


def test_a_writer_that_dies_leaves_the_old_content(tmp_path):
    for make, target in ((new_file, tmp_path / "file"), (new_folder, tmp_path / "folder")):
        with make(target) as temporary:
            (temporary / "a" if temporary.is_dir() else temporary).write_text("old")
        with pytest.raises(ZeroDivisionError):
            die_writing(make, target)
        assert (target / "a" if target.is_dir() else target).read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
    with new_folder(tmp_path / "folder") as temporary:
        (temporary / "b").write_text("new")
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["b"]
