"""The Poincare ball model of curvature -c, with the function names and signatures of `hyper_geom.lorentz`.

A point is a vector with k|p| < 1, k = sqrt(c). Every function first pulls points outside back to k|p| = 1 - 4 eps,
where their gradient is 0 along p; `check_point` reports them. fp32 reaches k*dist0 = 15.2.

All functions: `c` is a float or a tensor > 0, by keyword, 1.0 by default: one element, or one for each
leading index (in functions of matrices `(*b n d)`, for each index of `*b`). Leading dimensions broadcast.
They compute and return fp64 if any input is fp64, else fp32, also under autocast. They raise ValueError for c <= 0 or
non-finite, for shapes that do not fit and for tensors on two devices; TypeError for a dtype that is not floating.

References: Nickel and Kiela, NeurIPS 2017; Ganea, Becigneul and Hofmann, "Hyperbolic neural networks", NeurIPS 2018 and
"Hyperbolic entailment cones", ICML 2018; Ungar, "Analytic Hyperbolic Geometry", 2008.
"""

from hyper_geom.poincare._cones import exterior_angle, half_aperture, pairwise_exterior_angle
from hyper_geom.poincare._gyro import gyration, mobius_add, mobius_scalar_mul
from hyper_geom.poincare._maps import (
    clip_tangent0,
    exp_map,
    exp_map0,
    exp_map_frame,
    geodesic,
    log_map,
    log_map0,
    log_map_frame,
    midpoint,
    parallel_transport,
    parallel_transport0,
    parallel_transport0_back,
    soft_clip_tangent0,
)
from hyper_geom.poincare._metric import (
    check_point,
    conformal_factor,
    dist,
    dist0,
    egrad2rgrad,
    inner,
    norm,
    pairwise_dist,
    project,
    sq_dist,
    tangent0_dist,
    tangent0_sq_dist,
)

__all__ = [
    "check_point",
    "clip_tangent0",
    "conformal_factor",
    "dist",
    "dist0",
    "egrad2rgrad",
    "exp_map",
    "exp_map0",
    "exp_map_frame",
    "exterior_angle",
    "geodesic",
    "gyration",
    "half_aperture",
    "inner",
    "log_map",
    "log_map0",
    "log_map_frame",
    "midpoint",
    "mobius_add",
    "mobius_scalar_mul",
    "norm",
    "pairwise_dist",
    "pairwise_exterior_angle",
    "parallel_transport",
    "parallel_transport0",
    "parallel_transport0_back",
    "project",
    "soft_clip_tangent0",
    "sq_dist",
    "tangent0_dist",
    "tangent0_sq_dist",
]
