"""Metrics over taxonomies: torchmetrics classes and pure functions of the same name."""

from hier_losses.metrics._base import HierarchicalMetric
from hier_losses.metrics.cuts import HCA, MTA, hca, mta, mta_majority_baseline
from hier_losses.metrics.distance import (
    AverageHierarchicalDistance,
    EdgeDistance,
    HierarchicalPrecisionAtK,
    MistakeSeverity,
    average_hierarchical_distance,
    edge_distance,
    hierarchical_precision_at_k,
    max_leaf_distance,
    mistake_severity,
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
from hier_losses.metrics.paths import (
    TICE,
    FullPathAccuracy,
    LeafAccuracy,
    LevelAccuracy,
    WeightedAveragePrecision,
    full_path_accuracy,
    leaf_accuracy,
    level_accuracy,
    tice,
    weighted_average_precision,
)
from hier_losses.metrics.prf import HierarchicalPRF, hierarchical_prf
from hier_losses.metrics.report import ClassRow, LevelRow, Report, report
from hier_losses.metrics.samples import SampleScore, logit_scores, path_scores

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
