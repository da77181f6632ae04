"""`blip2-opt-2.7b` on webdataset shards: killed and resumed, in pieces, by several readers."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from app_data.sets.shards import Shards
from app_data.sets.stream import Stream
from app_train.cli import main
from app_train.core.schedule import Step
from helpers import releases, weights
from helpers.stops import terminated_in_step

pytestmark = pytest.mark.filterwarnings("default")

WORDS = (
    "a red circle",
    "the shape is blue",
    "a picture of a teal rectangle",
    "yes",
    "no",
    "a green triangle is the shape",
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two shards of seven pictures, each of two captions."""
    root, draw = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    for shard in range(2):
        with tarfile.open(root / f"{shard}.tar", "w") as tar:
            for i in range(7):
                content = io.BytesIO()
                Image.fromarray(draw.integers(0, 255, (30 + i, 40, 3), dtype=np.uint8)).save(content, "JPEG")
                captions = [WORDS[(i + shard) % 6], WORDS[(i + 2) % 6]]
                for ending, data in (("jpg", content.getvalue()), ("json", json.dumps({"caption": captions}).encode())):
                    info = tarfile.TarInfo(f"{i}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return root


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blip2")
    options = weights.blip2(folder)
    config = json.loads((folder / "config.json").read_text())
    # Dropout draws for each piece anew.
    config["qformer_config"] |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return options


@pytest.fixture
def train(shards, source, tmp_path):
    def run(out, *more, stage=1):
        return main(
            ["blip2-opt-2.7b", *source, "--data", str(shards), "--out", str(tmp_path / out), "--cache-dir", str(tmp_path / "cache"),
             "--stage", str(stage), "--cards", "1", "--max-tokens", "8", "--no-tensorboard", "--fit.epochs", "2",
             "--fit.batch-size", "4", "--window", "5", "--fit.lr", "1e-3", *more]
        )  # fmt: skip

    return run


def state(folder):
    from safetensors.torch import load_file

    return load_file(folder / "stage1" / "model.safetensors")


def test_killed_and_resumed_is_bit_identical(train, tmp_path):
    """Within the second epoch, between two checkpoints; six steps over two shards."""
    assert train("whole") == 0
    with terminated_in_step(5):
        assert train("killed") == 143
    assert train("killed", "--readers", "1") == 0  # how many threads read is no part of a run
    lines = [(tmp_path / name / "run-1" / "train" / "metrics.jsonl").read_text() for name in ("whole", "killed")]
    assert lines[0] == lines[1]
    assert len(lines[0].splitlines()) == 6
    whole, killed = (state(tmp_path / name) for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    assert train("killed", "--window", "6") == 2  # the order is


def test_pieces_add_up_to_the_gradient_of_the_batch(train, tmp_path):
    """Stage 2, whose loss is a mean over words: pieces of unequally many."""
    import shutil

    assert train("one") == 0
    shutil.copytree(tmp_path / "one" / "stage1", tmp_path / "three" / "stage1")
    assert train("one", stage=2) == 0
    assert train("three", "--micro-batches", "3", stage=2) == 0
    rows = [
        [json.loads(line) for line in (tmp_path / name / "run-2" / "train" / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "three")
    ]
    for one, three in zip(*rows, strict=True):
        # The frozen towers are in bf16, whose rounding depends on the shapes; equal weights of the pieces would be off by 1e-2.
        assert three["loss"] == pytest.approx(one["loss"], rel=3e-4)
        assert three["grad_norm"] == pytest.approx(one["grad_norm"], rel=2e-2)


def test_pixels_and_captions_are_functions_of_the_row(shards, tmp_path):
    from app_train.recipes.blip.pairs import Streamed

    def streamed(readers, rank=0, world=1, augment=True):
        stream = Stream([Shards(shards, tmp_path / "cache")], window=5)
        return Streamed(stream, 16, augment=augment, readers=readers, rank=rank, world=world)

    def step(data, number, epoch=0):
        rows = data.order(epoch)[4 * number : 4 * number + 4]
        return Step(3 * epoch + number + 1, "s", epoch, number, rows, 3 * epoch + number, 6, False)

    one, many = streamed(1), streamed(4)
    for number in range(3):
        a, b = (data.share(step(data, number)) for data in (one, many))
        assert torch.equal(a.pixels, b.pixels)
        assert a.captions == b.captions
        # Read later, alone, in pieces, or by two processes: the same pairs.
        fresh = streamed(2)
        piece = fresh.piece(step(fresh, number), step(fresh, number).rows[2:])
        assert torch.equal(piece.pixels, a.pixels[2:])
        assert piece.captions == a.captions[2:]
        halves = [streamed(1, rank, 2) for rank in range(2)]
        for rank, half in enumerate(halves):
            assert torch.equal(half.share(step(half, number)).pixels, a.pixels[rank::2])
    again = one.share(step(one, 0, epoch=1))
    rows = one.order(0)[:].tolist()
    place = rows.index(int(one.order(1)[0:1][0]))
    first = streamed(1)
    earlier = first.share(step(first, place // 4)) if place < 12 else None
    assert earlier is None or not torch.equal(again.pixels[0], earlier.pixels[place % 4])  # another epoch, another cut
    plain = streamed(1, augment=False)
    assert not torch.equal(plain.share(step(plain, 0)).pixels, one.share(step(one, 0)).pixels)
    for data in (one, many):
        data.close()


def test_settings_that_do_not_go_together(train, shards, tmp_path, capsys, source):
    more = releases.karpathy(tmp_path / "coco")
    assert train("x", *more) == 2
    assert "--data streams shards in place of --annotations" in capsys.readouterr().err
    assert main(["blip2-opt-2.7b", *source, *more, "--weights", "1", "--out", str(tmp_path / "x")]) == 2
    assert "--weights share --data" in capsys.readouterr().err
    assert train("x", "--weights", "1", "2") == 2
    assert "weights must be 1 numbers above 0" in capsys.readouterr().err
    assert train("x", "--data", str(tmp_path / "none.tar")) == 2
    assert "none.tar does not exist" in capsys.readouterr().err
