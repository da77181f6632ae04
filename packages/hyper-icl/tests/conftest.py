"""Fixtures of the tests: one tiny model of every family, built once."""

import importlib.util
from pathlib import Path

import pytest


def _load(name):
    spec = importlib.util.spec_from_file_location(f"hyper_icl_tests_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    import sys

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
