"""What other ways to find the curvature between two manifolds would give where training ended.

The chord objective of Modality Alignment across Trees (arXiv 2510.27391) stands for a divergence of distributions; how far
its minimiser lies from those of the exact divergences, and from plain means, needs no training to say.
"""

from collections.abc import Sequence

from mat_align.intermediate import exact_intermediate_curvature, intermediate_curvature

_DIRECTIONS = ("forward", "reverse", "jeffreys")
_MEANS = ("arithmetic", "geometric", "harmonic")
# Width of the joint space of the recipes; samples of deviation 1/sqrt(n) lie near radius 1.
_DIM = 384


def solvers_at(c_img: float, c_txt: float, dim: int = _DIM) -> dict[str, float]:
    """The curvature between two others by every way but the chord objective, which also needs radii.

    Args:
        c_img: curvature parameter of the image manifold.
        c_txt: curvature parameter of the text manifold.
        dim: dimension of the wrapped normals whose divergences are compared.
    """
    exact = {
        f"exact {name}": exact_intermediate_curvature(c_img, c_txt, dim, dim**-0.5, name).item() for name in _DIRECTIONS
    }
    return exact | {name: intermediate_curvature(c_img, c_txt, method=name).item() for name in _MEANS}


def solvers_at_the_end(by_seed: Sequence[Sequence]) -> dict[str, float]:
    """What every way gives at the last logged curvatures, mean over seeds.

    Args:
        by_seed: for each seed the logged (step, c_img, c_txt, c_mid).
    """
    rows = [
        {"c_img": img, "c_txt": txt, "chord, in training": mid} | solvers_at(img, txt)
        for _, img, txt, mid in (curve[-1] for curve in by_seed)
    ]
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
