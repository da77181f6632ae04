"""Entailment cones: how far a child lies outside its parent's cone.

References: Ganea, Becigneul and Hofmann, "Hyperbolic entailment cones for learning hierarchical embeddings", ICML 2018,
eq. 32; Desai et al., "Hyperbolic image-text representations", ICML 2023, eq. 13 (MERU); Pal et al., "Compositional
entailment learning for hyperbolic vision-language models", ICLR 2025 (HyCoCLIP, the aperture scale).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hyper_geom import _numerics as nm
from hyper_geom import lorentz, poincare

_MODELS = {"lorentz": lorentz, "poincare": poincare}
_REDUCTIONS = ("mean", "sum", "none")


def _excess(
    parent: Tensor, child: Tensor, min_radius: float, aperture_scale: float, model: str, c: float | Tensor
) -> Tensor:
    geometry = _MODELS[nm.check_choice("model", model, _MODELS)]
    nm.check_positive("aperture_scale", aperture_scale)
    omega = geometry.half_aperture(parent, c=c, min_radius=min_radius)
    return geometry.exterior_angle(parent, child, c=c) - aperture_scale * omega


@nm.geometry(2)
def entailment_violation(
    parent: Float[Tensor, "*#batch dim"],
    child: Float[Tensor, "*#batch dim"],
    *,
    c: float | Tensor = 1.0,
    min_radius: float = 0.1,
    aperture_scale: float = 1.0,
    model: str = "lorentz",
) -> Float[Tensor, "*#batch"]:
    """Angle by which a child lies outside its parent's cone.

    max(0, phi(parent, child) - aperture_scale omega(parent))

    Args:
        parent: apexes `(*batch dim)`.
        child: points `(*batch dim)`.
        c: curvature parameter.
        min_radius: K of the half aperture omega, > 0.
        aperture_scale: factor on omega, > 0; HyCoCLIP takes 0.7 between modalities and 1.2 within one.
        model: "lorentz" or "poincare".

    Returns:
        Angles `(*batch)` in [0, pi]; 0 inside the cone.

    Raises:
        ValueError: unknown model, min_radius or aperture_scale not > 0, bad c or shapes.
        TypeError: a dtype that is not floating.
    """
    return _excess(parent, child, min_radius, aperture_scale, model, c).clamp(min=0)


@nm.geometry(2)
def is_entailed(
    parent: Float[Tensor, "*#batch dim"],
    child: Float[Tensor, "*#batch dim"],
    *,
    c: float | Tensor = 1.0,
    min_radius: float = 0.1,
    aperture_scale: float = 1.0,
    model: str = "lorentz",
) -> Bool[Tensor, "*#batch"]:
    """Whether a child lies in its parent's cone.

    phi(parent, child) <= aperture_scale omega(parent)

    Args:
        parent: apexes `(*batch dim)`.
        child: points `(*batch dim)`.
        c: curvature parameter.
        min_radius: K of the half aperture omega, > 0.
        aperture_scale: factor on omega, > 0.
        model: "lorentz" or "poincare".

    Returns:
        Booleans `(*batch)`.

    Raises:
        ValueError: unknown model, min_radius or aperture_scale not > 0, bad c or shapes.
        TypeError: a dtype that is not floating.

    >>> is_entailed(torch.tensor([1.0, 0.0]), torch.tensor([[3.0, 0.1], [0.0, 1.0]]))
    tensor([ True, False])
    """
    return _excess(parent, child, min_radius, aperture_scale, model, c) <= 0


@nm.geometry(2)
def entailment_loss(
    parent: Float[Tensor, "*#batch dim"],
    child: Float[Tensor, "*#batch dim"],
    *,
    c: float | Tensor = 1.0,
    min_radius: float = 0.1,
    aperture_scale: float = 1.0,
    mask: Tensor | None = None,
    reduction: str = "mean",
    model: str = "lorentz",
) -> Float[Tensor, "..."]:
    """`entailment_violation`, reduced over the pairs that are kept.

    mean over kept pairs of max(0, phi - aperture_scale omega); nothing kept gives 0 with gradient 0.

    Args:
        parent: apexes `(*batch dim)`.
        child: points `(*batch dim)`.
        c: curvature parameter.
        min_radius: K of the half aperture omega, > 0.
        aperture_scale: factor on omega, > 0.
        mask: True for the pairs to keep, expands to `(*batch)`; all by default.
        reduction: "mean", "sum", or "none" for one value per pair, 0 where dropped.
        model: "lorentz" or "poincare".

    Returns:
        A scalar, or `(*batch)` for "none"; at least 0.

    Raises:
        ValueError: unknown model or reduction, min_radius or aperture_scale not > 0, bad c or shapes.
        TypeError: a mask that is not boolean, another tensor that is not floating.
    """
    nm.check_choice("reduction", reduction, _REDUCTIONS)
    violation = _excess(parent, child, min_radius, aperture_scale, model, c).clamp(min=0)
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be boolean, got {mask.dtype}")
        if not nm.broadcasts_to(mask.shape, violation.shape):
            raise ValueError(f"mask must expand to {tuple(violation.shape)}, got shape {tuple(mask.shape)}")
        if mask.device != violation.device:
            raise ValueError(f"mask must be on {violation.device}, got {mask.device}")
        mask = mask.expand(violation.shape)
        violation = torch.where(mask, violation, 0.0)
    if reduction == "none":
        return violation
    total = violation.sum()
    if reduction == "sum":
        return total
    return total / (max(violation.numel(), 1) if mask is None else mask.sum().clamp(min=1))
