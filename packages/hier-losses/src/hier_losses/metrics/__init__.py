"""Metrics over taxonomies: torchmetrics classes and pure functions of the same name.

Whatever needs torchmetrics is loaded when it is first used: that package imports torchvision and transformers where they are installed,
which takes ten seconds.
"""

import importlib
from typing import TYPE_CHECKING, Any

from hier_losses.metrics.cuts import hca, mta, mta_majority_baseline
from hier_losses.metrics.distance import (
    average_hierarchical_distance,
    edge_distance,
    hierarchical_precision_at_k,
    max_leaf_distance,
    mistake_severity,
)
from hier_losses.metrics.paths import (
    full_path_accuracy,
    leaf_accuracy,
    level_accuracy,
    tice,
    weighted_average_precision,
)
from hier_losses.metrics.samples import SampleScore, logit_scores, path_scores

if TYPE_CHECKING:
    from hier_losses.metrics._base import HierarchicalMetric
    from hier_losses.metrics.classes import (
        HCA,
        MTA,
        TICE,
        AverageHierarchicalDistance,
        EdgeDistance,
        FullPathAccuracy,
        HierarchicalPrecisionAtK,
        LeafAccuracy,
        LevelAccuracy,
        MistakeSeverity,
        WeightedAveragePrecision,
    )
    from hier_losses.metrics.lca import LCAMetrics, lca_metrics
    from hier_losses.metrics.levels import (
        LevelCalibration,
        LevelPRF,
        TopKAccuracy,
        level_calibration,
        level_prf,
        top_k_accuracy,
    )
    from hier_losses.metrics.multilabel import NodeAUROC, ViolationRate, node_auroc, violation_rate
    from hier_losses.metrics.prf import HierarchicalPRF, hierarchical_prf
    from hier_losses.metrics.reports import ClassRow, LevelRow, Report, report

__all__ = [
    "HCA",
    "MTA",
    "TICE",
    "AverageHierarchicalDistance",
    "ClassRow",
    "EdgeDistance",
    "FullPathAccuracy",
    "HierarchicalMetric",
    "HierarchicalPRF",
    "HierarchicalPrecisionAtK",
    "LCAMetrics",
    "LeafAccuracy",
    "LevelAccuracy",
    "LevelCalibration",
    "LevelPRF",
    "LevelRow",
    "MistakeSeverity",
    "NodeAUROC",
    "Report",
    "SampleScore",
    "TopKAccuracy",
    "ViolationRate",
    "WeightedAveragePrecision",
    "average_hierarchical_distance",
    "edge_distance",
    "full_path_accuracy",
    "hca",
    "hierarchical_precision_at_k",
    "hierarchical_prf",
    "lca_metrics",
    "leaf_accuracy",
    "level_accuracy",
    "level_calibration",
    "level_prf",
    "logit_scores",
    "max_leaf_distance",
    "mistake_severity",
    "mta",
    "mta_majority_baseline",
    "node_auroc",
    "path_scores",
    "report",
    "tice",
    "top_k_accuracy",
    "violation_rate",
    "weighted_average_precision",
]

_LAZY = {
    "_base": ("HierarchicalMetric",),
    "classes": (
        "AverageHierarchicalDistance",
        "EdgeDistance",
        "FullPathAccuracy",
        "HCA",
        "HierarchicalPrecisionAtK",
        "LeafAccuracy",
        "LevelAccuracy",
        "MTA",
        "MistakeSeverity",
        "TICE",
        "WeightedAveragePrecision",
    ),
    "lca": (
        "LCAMetrics",
        "lca_metrics",
    ),
    "levels": (
        "LevelCalibration",
        "LevelPRF",
        "TopKAccuracy",
        "level_calibration",
        "level_prf",
        "top_k_accuracy",
    ),
    "multilabel": (
        "NodeAUROC",
        "ViolationRate",
        "node_auroc",
        "violation_rate",
    ),
    "prf": (
        "HierarchicalPRF",
        "hierarchical_prf",
    ),
    "reports": (
        "ClassRow",
        "LevelRow",
        "Report",
        "report",
    ),
}


def __getattr__(name: str) -> Any:
    """Load the module of a class, or of a function that lives beside its class, on first use."""
    for module, names in _LAZY.items():
        if name in names:
            return getattr(importlib.import_module(f"hier_losses.metrics.{module}"), name)
    raise AttributeError(f"module 'hier_losses.metrics' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return __all__
