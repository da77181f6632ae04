"""Hierarchical losses, decoders and metrics for PyTorch.

The submodules below are loaded when they are first used: torchmetrics, which the metrics build on, is slow to import.
"""

import importlib
from typing import TYPE_CHECKING, Any

from hier_losses.__about__ import __version__
from hier_losses.graph import LabelGraph
from hier_losses.reading import Reading, read_label_graph, read_taxonomy
from hier_losses.taxonomy import Taxonomy, TaxonomySummary, TaxonomyUpdate, match_taxonomies

if TYPE_CHECKING:
    from hier_losses import (
        builders,
        decoding,
        discriminant,
        functional,
        losses,
        metrics,
        path_ops,
        probabilities,
        treecuts,
    )
    from hier_losses.losses import HierarchyAwareLoss

__all__ = [
    "HierarchyAwareLoss",
    "LabelGraph",
    "Reading",
    "Taxonomy",
    "TaxonomySummary",
    "TaxonomyUpdate",
    "__version__",
    "builders",
    "decoding",
    "discriminant",
    "functional",
    "losses",
    "match_taxonomies",
    "metrics",
    "path_ops",
    "probabilities",
    "read_label_graph",
    "read_taxonomy",
    "treecuts",
]

_SUBMODULES = (
    "builders",
    "decoding",
    "discriminant",
    "functional",
    "losses",
    "metrics",
    "path_ops",
    "probabilities",
    "treecuts",
)


def __getattr__(name: str) -> Any:
    """Load a submodule, or the loss that sits at the top level, on first use."""
    if name in _SUBMODULES:
        return importlib.import_module(f"hier_losses.{name}")
    if name == "HierarchyAwareLoss":
        return importlib.import_module("hier_losses.losses").HierarchyAwareLoss
    raise AttributeError(f"module 'hier_losses' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return __all__
