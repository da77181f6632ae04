"""The Lorentz (hyperboloid) model of curvature -c on space components.

A point is its d space components; the time component sqrt(1/c + |x|^2) is implied, so every finite vector is on the
manifold. A tangent vector at x is its space components too; its time component is x.v/x_t.

All functions: `c` is a float or a tensor > 0, by keyword, 1.0 by default: one element, or one for each
leading index (in functions of matrices `(*b n d)`, for each index of `*b`). Leading dimensions broadcast.
They compute and return fp64 if any input is fp64, else fp32, also under autocast. They raise ValueError for c <= 0 or
non-finite, for shapes that do not fit and for tensors on two devices; TypeError for a dtype that is not floating.

References: Nickel and Kiela, "Learning continuous hierarchies in the Lorentz model", ICML 2018; Nagano et al.,
ICML 2019; Law et al., ICML 2019; Desai et al., ICML 2023.
"""

from hyper_geom.lorentz._cones import exterior_angle, half_aperture, pairwise_exterior_angle
from hyper_geom.lorentz._maps import (
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
from hyper_geom.lorentz._metric import (
    dist,
    dist0,
    egrad2rgrad,
    inner,
    inner_ambient,
    norm,
    pairwise_dist,
    pairwise_inner,
    sq_dist,
    tangent0_dist,
    tangent0_sq_dist,
    time,
)

__all__ = [
    "clip_tangent0",
    "dist",
    "dist0",
    "egrad2rgrad",
    "exp_map",
    "exp_map0",
    "exp_map_frame",
    "exterior_angle",
    "geodesic",
    "half_aperture",
    "inner",
    "inner_ambient",
    "log_map",
    "log_map0",
    "log_map_frame",
    "midpoint",
    "norm",
    "pairwise_dist",
    "pairwise_exterior_angle",
    "pairwise_inner",
    "parallel_transport",
    "parallel_transport0",
    "parallel_transport0_back",
    "soft_clip_tangent0",
    "sq_dist",
    "tangent0_dist",
    "tangent0_sq_dist",
    "time",
]
