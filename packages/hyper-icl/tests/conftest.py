"""Fixtures of the tests: one tiny model of every family, built once."""

import contextlib
import importlib.util
import re
import sys
from pathlib import Path

import pytest


@contextlib.contextmanager
def _refused(word):
    with pytest.raises((ValueError, TypeError)) as caught:
        yield
    if type(caught.value).__name__ != "TypeCheckError":
        assert isinstance(caught.value, ValueError)
        assert re.search(word, str(caught.value))


@pytest.fixture
def refused():
    """As `pytest.raises(ValueError, match=word)`; under the shape-checking hook its own error will do."""
    return _refused


def _load(name):
    spec = importlib.util.spec_from_file_location(f"hyper_icl_tests_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def families():
    """The helpers of _families.py, with a cache of models."""
    module = _load("_families")
    built = {}

    def model(name):
        if name not in built:
            built[name] = module.make_model(name)
        return built[name]

    module.model = model
    return module
