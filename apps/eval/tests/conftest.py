"""Fixtures of the evaluation tests."""

import json
import os
import tarfile
from importlib import import_module
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def coco_captions():
    """The captions of a sample of COCO, where the environment variable HIER_TEST_DATA names the folder that has it."""
    archive = Path(os.environ.get("HIER_TEST_DATA", ".")) / "coco_mini_224.tar"
    if not archive.is_file():
        pytest.skip("HIER_TEST_DATA names no folder with a sample of COCO")
    captions = []
    with tarfile.open(archive) as tar:
        for part in ("train", "val"):
            file = tar.extractfile(f"annotations/captions_{part}2017.json")
            captions += [row["caption"] for row in json.load(file)["annotations"]]
    return captions


@pytest.fixture(scope="session")
def tiny():
    """The script of hyper-icl's guide that writes a tiny model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[3] / "docs" / "hyper-icl")
        return import_module("tiny_model")
