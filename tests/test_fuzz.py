"""A few arguments of every kind for public functions and command lines, damaged files, and random trees; `nox -s fuzz` tries many."""

from random import Random

import pytest

from fuzz.commands import fuzz_commands
from fuzz.functions import fuzz, public_functions
from fuzz.readers import damage, fuzz_readers, readers
from fuzz.trees import fuzz_tree

FUNCTIONS = public_functions()
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("package", ["hyper_geom", "hier_losses", "hier_lora", "mat_align", "hyper_blip", "hyper_icl"])
def test_any_argument_gives_a_value_or_a_sentence(package):
    called = 0
    for name, function in FUNCTIONS.items():
        if name.split(".")[0] == package and (found := fuzz(function, 12)) is not None:
            assert not found.wrong, f"{name}: {found.wrong}"
            called += found.values > 0
    assert called >= 5


def test_random_trees_are_what_brute_force_says():
    assert not [said for seed in range(150) if (said := fuzz_tree(seed))]


def test_no_command_line_ends_in_a_traceback(tmp_path):
    assert fuzz_commands(60, 1, tmp_path) == []


@pytest.mark.parametrize("name", readers())
def test_a_damaged_file_gives_a_value_or_a_sentence(tmp_path, name):
    _, wrong = fuzz_readers({name: readers()[name]}, 6, 0, tmp_path)
    assert not wrong


def test_damage_changes_what_it_should(tmp_path):
    """No fault is found where nothing is damaged."""
    path, said = tmp_path / "x.json", set()
    for number in range(60):
        path.write_text('{"a": [1, {"b": 2}]}')
        said.add(damage(path, Random(number)).split()[0])
        if path.is_dir():
            path.rmdir()
    assert len(said) > 8


def test_a_function_that_fails_otherwise_is_found():
    import torch

    def bad(x: torch.Tensor, n: int) -> int:
        if n < 1:
            raise ValueError
        return [0][n - 1]

    found = fuzz(bad, 60)
    assert any(kind.startswith("IndexError") for kind in found.wrong)
    assert "an error without a message" in str(found.wrong)
