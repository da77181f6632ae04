"""What a recipe is: its settings, the function that runs them, and what it needs; light, for `--help`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

from app_train.core.config import RunConfig


@dataclass(frozen=True)
class Recipe:
    """One recipe.

    Attributes:
        help: one line for `--help`.
        settings: `module:Class` below `app_train.recipes`; the module is light.
        run: `module:function` there, imported only when the recipe runs.
        needs: data and weights, memory and time, in words.
        packages: modules that must be installed, because they carry data or weights.
        expect: what a run with the defaults gives, or that nobody has run it here.
    """

    help: str
    settings: str
    run: str
    needs: str
    packages: tuple[str, ...] = ()
    expect: str = ""

    def kind(self) -> type[RunConfig]:
        """The settings class."""
        return _named(self.settings)

    def function(self) -> Callable[[RunConfig], dict]:
        """The function that runs settings."""
        return _named(self.run)

    def missing(self) -> list[str]:
        """The packages that are not installed."""
        return [name for name in self.packages if find_spec(name) is None]


def _named(where: str):
    module, _, name = where.partition(":")
    return getattr(import_module(f"app_train.recipes.{module}"), name)
