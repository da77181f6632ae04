"""Public functions of all packages with any arguments: each gives a value, or a `ValueError` or `TypeError` with a message."""

import importlib
import inspect
import pkgutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random

from fuzz.arguments import Call, Unknown

PACKAGES = ("hyper_geom", "hier_losses", "hier_lora", "mat_align", "hyper_blip", "hyper_icl")
# They write files or load models: `tests/test_hostile.py` is theirs.
LEFT_OUT = ("save", "load", "read", "write", "download", "plot", "show", "from_pretrained", "wordnet")


@dataclass
class Found:
    """What a function did over all its calls."""

    calls: int = 0
    values: int = 0
    refused: int = 0
    wrong: dict[str, str] = field(default_factory=dict)


def public_functions() -> dict[str, Callable]:
    """Every function that a package or a public module of it names in `__all__`, by its shortest name."""
    found: dict[Callable, str] = {}
    for package in PACKAGES:
        top = importlib.import_module(package)
        names = [f"{package}.{info.name}" for info in pkgutil.iter_modules(top.__path__) if info.name[0] != "_"]
        modules = [top]
        for name in names:
            with warnings.catch_warnings(), suppress(ImportError):  # a bridge to a library that is not installed
                warnings.simplefilter("ignore")
                modules.append(importlib.import_module(name))
        for module in modules:
            for name in getattr(module, "__all__", ()):
                value = getattr(module, name)
                if inspect.isfunction(value) and not any(word in name for word in LEFT_OUT):
                    found.setdefault(value, f"{module.__name__}.{name}")
    return {name: function for function, name in found.items()}


def fuzz(function: Callable, count: int, seed: int = 0) -> Found | None:
    """Call a function; None if nobody knows values for one of its parameters."""
    found = Found()
    for number in range(count):
        try:
            call = Call(function, Random(f"{function.__qualname__} {seed} {number}"))
        except Unknown:
            return None
        found.calls += 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                function(**call.given)
                found.values += 1
            except (ValueError, TypeError) as error:
                if not str(error).strip():
                    found.wrong.setdefault(type(error).__name__, f"call {number}: an error without a message")
                found.refused += 1
            except (NotImplementedError, ImportError, OSError):  # what reads files says which
                found.refused += 1
            except Exception as error:
                kind = f"{type(error).__name__}: {str(error).splitlines()[0][:90] if str(error) else ''}"
                found.wrong.setdefault(kind, f"call {number}: {_shown(call.given)}")
    return found


def _shown(given: dict) -> str:
    parts = []
    for name, value in given.items():
        parts.append(
            f"{name}={tuple(value.shape)} {value.dtype}" if hasattr(value, "shape") else f"{name}={str(value)[:40]!r}"
        )
    return ", ".join(parts)
