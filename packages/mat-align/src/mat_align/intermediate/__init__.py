"""The curvature of the manifold between those of images and text, and the studies it is compared with."""

from mat_align.intermediate._chord import (
    METHODS,
    chord_objective,
    intermediate_curvature,
    released_radii,
    search_radii,
)
from mat_align.intermediate._kl import exact_intermediate_curvature, kl_homothety, kl_spatial

__all__ = [
    "METHODS",
    "chord_objective",
    "exact_intermediate_curvature",
    "intermediate_curvature",
    "kl_homothety",
    "kl_spatial",
    "released_radii",
    "search_radii",
]
