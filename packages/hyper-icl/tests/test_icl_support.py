"""Some rows of docs/hyper-icl/support.md, made again; the script beside this file writes all of them."""

import importlib.util
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[3] / "docs" / "hyper-icl" / "support.md"


@pytest.fixture(scope="module")
def support():
    spec = importlib.util.spec_from_file_location("hyper_icl_support", Path(__file__).with_name("support.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not PAGE.exists(), reason="the page belongs to the repository")
@pytest.mark.parametrize(
    "family",
    ["gemma3", "inkling_mm_model", *(pytest.param(n, marks=pytest.mark.slow) for n in ("fuyu", "kimi_k25", "mllama"))],
)
def test_a_row_of_the_page(support, family):
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    names = [name.strip() for name in lines[0].strip("|").split("|")]
    row = next(line for line in lines if line.startswith(f"| {family} |"))
    written = dict(zip(names, (cell.strip() for cell in row.strip("|").split("|")), strict=True))
    # Compiling takes most of the time, and has tests of its own.
    features = [feature for feature in support.FEATURES if feature != "compiled"]
    found, why = support.row_of(family, features)
    assert found == {feature: written[feature] for feature in features}, why


def test_no_cell_is_a_fault():
    if PAGE.exists():
        assert "| no |" not in PAGE.read_text(encoding="utf-8")
