"""Hyperbolic geometry for PyTorch, accurate where it is used.

`lorentz` and `poincare` hold the same functions for the two models, `convert` leads from one to the other.
`hyper_geom.riemannian` (needs geoopt) and `hyper_geom.plot` (needs matplotlib) are imported by name.
"""

from hyper_geom import cones, contrastive, convert, hyperbolicity, lorentz, poincare
from hyper_geom.__about__ import __version__
from hyper_geom.cones import entailment_loss, entailment_violation, is_entailed
from hyper_geom.contrastive import DistanceInfoNCE, distance_info_nce
from hyper_geom.curvature import Curvature
from hyper_geom.hyperbolicity import gromov_delta, gromov_product
from hyper_geom.wrapped_normal import WrappedNormal

__all__ = [
    "Curvature",
    "DistanceInfoNCE",
    "WrappedNormal",
    "__version__",
    "cones",
    "contrastive",
    "convert",
    "distance_info_nce",
    "entailment_loss",
    "entailment_violation",
    "gromov_delta",
    "gromov_product",
    "hyperbolicity",
    "is_entailed",
    "lorentz",
    "poincare",
]
