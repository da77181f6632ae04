"""Hyperbolic geometry for PyTorch, accurate where it is used.

`lorentz` and `poincare` hold the same functions for the two models, `convert` leads from one to the other.
`hyper_geom.riemannian` (needs geoopt) and `hyper_geom.plot` (needs matplotlib) are imported by name.
"""

from hyper_geom import cones, contrastive, convert, heads, hyperbolicity, layout, lorentz, poincare, trees
from hyper_geom.__about__ import __version__
from hyper_geom._cpu import build_cpu_kernels
from hyper_geom.cones import entailment_loss, entailment_violation, is_entailed
from hyper_geom.contrastive import DistanceInfoNCE, distance_info_nce, distance_logits, info_nce
from hyper_geom.curvature import Curvature
from hyper_geom.frechet import frechet_mean
from hyper_geom.heads import BusemannHead, HyperplaneHead, busemann_logits, hyperplane_logits
from hyper_geom.hyperbolicity import gromov_delta, gromov_product
from hyper_geom.trees import embed_tree, tree_fit
from hyper_geom.wrapped_normal import WrappedNormal

__all__ = [
    "BusemannHead",
    "Curvature",
    "DistanceInfoNCE",
    "HyperplaneHead",
    "WrappedNormal",
    "__version__",
    "build_cpu_kernels",
    "busemann_logits",
    "cones",
    "contrastive",
    "convert",
    "distance_info_nce",
    "distance_logits",
    "embed_tree",
    "entailment_loss",
    "entailment_violation",
    "frechet_mean",
    "gromov_delta",
    "gromov_product",
    "heads",
    "hyperbolicity",
    "hyperplane_logits",
    "info_nce",
    "is_entailed",
    "layout",
    "lorentz",
    "poincare",
    "tree_fit",
    "trees",
]
