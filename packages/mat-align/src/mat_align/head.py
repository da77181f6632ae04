"""What every model of this package shares beyond its towers: attention, curvatures, and the features of paths.

Reference: Modality Alignment across Trees (arXiv 2510.27391); the curvature parameters and their bounds follow its
released configurations, the learned radius is ours.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from hyper_geom import Curvature
from mat_align._checks import check_choice, check_positive
from mat_align.intermediate import (
    exact_intermediate_curvature,
    intermediate_curvature,
    released_radii,
    search_radii,
)
from mat_align.variants import Variant
from mat_align.visual_tree import TextQueriedAttention
from mat_align.visual_tree._attention import pooled_logits


class PathFeatures(NamedTuple):
    """What the entailment terms compare: features of the nodes on each picture's path and the factors before the lift.

    Attributes:
        img: (B, H, d) visual features.
        txt: (B, H, d) text features.
        scale_img: factor of the visual features.
        scale_txt: factor of the text features.
    """

    img: Tensor
    txt: Tensor
    scale_img: float | Tensor
    scale_txt: float | Tensor


class MATHead(nn.Module):
    """Attention, curvatures and radii of one variant.

    Args:
        dim: width d of the joint space.
        variant: what is computed.
        radius: "unit" lifts unit features times `scale`, the published way: all points of a modality then share one
            radius, so no point lies in another's cone and the terms only attract. "feature" lifts the feature itself
            times exp(alpha), alpha <= 0 learned for each modality and exp(alpha) = 1/sqrt(d) at first.
        scale: factor before the lift for radius="unit".
        min_radius: K of the half aperture.
        curv_init: centre of the bounds: log c stays within log(curv_init) +- log 10.
        c_img: initial curvature of the image manifold; curv_init if None.
        c_txt: initial curvature of the text manifold; curv_init if None.
        c_mid: initial curvature of the third manifold for curvature="three"; c_txt if None.
        kappa: see `mat_align.intermediate.search_radii`.

    Attributes:
        attention: None unless the variant asks the text.
        c_img, c_txt: `hyper_geom.Curvature`, None for curvature="none", one module for curvature="one".
        c_third: the third curvature for curvature="three".

    Raises:
        ValueError: unknown radius, or a number that is not finite and > 0 or outside the curvature bounds.
    """

    def __init__(
        self,
        dim: int,
        variant: Variant,
        *,
        radius: str = "unit",
        scale: float = 1.0,
        min_radius: float = 0.1,
        curv_init: float = 0.05,
        c_img: float | None = None,
        c_txt: float | None = None,
        c_mid: float | None = None,
        kappa: float = 1.2,
    ) -> None:
        """Make the parameters of the variant."""
        super().__init__()
        for name, value in (("scale", scale), ("min_radius", min_radius), ("curv_init", curv_init), ("kappa", kappa)):
            check_positive(name, value)
        self.dim, self.variant = dim, variant
        self.radius = check_choice("radius", radius, ("unit", "feature"))
        self.settings = {
            "radius": radius, "scale": scale, "min_radius": min_radius, "curv_init": curv_init,
            "c_img": c_img, "c_txt": c_txt, "c_mid": c_mid, "kappa": kappa,
        }  # fmt: skip
        self.scale, self.min_radius, self.kappa = scale, min_radius, kappa
        self.attention = TextQueriedAttention(dim) if variant.feature == "tokens" else None
        c_img, c_txt = (curv_init if c is None else c for c in (c_img, c_txt))

        def curvature(name: str, value: float) -> Curvature:
            low, high = curv_init / 10, curv_init * 10
            if not low < value < high:
                raise ValueError(
                    f"{name} must lie in (curv_init / 10, 10 curv_init) = ({low:g}, {high:g}), got {value}"
                )
            return Curvature(value, learnable=variant.learnable, min=low, max=high)

        self.c_img = self.c_txt = self.c_third = None
        if variant.curvature == "one":
            self.c_img = self.c_txt = curvature("c_img", c_img)
        elif variant.curvature != "none":
            self.c_img, self.c_txt = curvature("c_img", c_img), curvature("c_txt", c_txt)
        if variant.curvature == "three":
            self.c_third = curvature("c_mid", c_txt if c_mid is None else c_mid)
        if radius == "feature" and variant.curvature != "none":
            start = torch.full((1,), -math.log(dim) / 2)
            self.alpha_img, self.alpha_txt = nn.Parameter(start.clone()), nn.Parameter(start.clone())

    def logits(
        self,
        tokens: Float[Tensor, "B M d"],
        text: Float[Tensor, "n d"],
        logit_scale: float | Tensor,
        form: str = "gram",
    ) -> Float[Tensor, "B n"]:
        """Scaled cosine of every label and the visual feature of the variant.

        Args:
            tokens: layer tokens.
            text: text features.
            logit_scale: logarithm of the factor.
            form: see `TextQueriedAttention.logits`; without attention there is one form.

        Returns:
            Logits `(B n)`.
        """
        if self.attention is not None:
            return self.attention.logits(tokens, text, logit_scale, form)
        if len(text) == 0:
            raise ValueError("text must hold at least one label, got n = 0")
        return pooled_logits(self._pooled(tokens), text, logit_scale)

    def features_at(self, tokens: Float[Tensor, "B M d"], path_text: Float[Tensor, "B H d"]) -> Float[Tensor, "B H d"]:
        """The visual features of each picture for its own labels.

        Args:
            tokens: layer tokens.
            path_text: text features of H labels for each picture.

        Returns:
            Features `(B H d)`, not normalised.
        """
        if self.attention is not None:
            return self.attention.attended_at(tokens, path_text)
        return self._pooled(tokens)[:, None].expand(path_text.shape)

    def path_features(self, tokens: Float[Tensor, "B M d"], path_text: Float[Tensor, "B H d"]) -> PathFeatures:
        """Features of both modalities along paths, ready for `mat_align.objective.entailment_terms`.

        Args:
            tokens: layer tokens.
            path_text: text features of the nodes of each path.
        """
        img, txt = self.features_at(tokens, path_text), path_text
        if self.radius == "unit":
            return PathFeatures(F.normalize(img, dim=-1), F.normalize(txt, dim=-1), self.scale, self.scale)
        return PathFeatures(img, txt, self.alpha_img.clamp(max=0).exp(), self.alpha_txt.clamp(max=0).exp())

    def c_mid(self, norm_img: float | Tensor = 1.0, norm_txt: float | Tensor = 1.0) -> Float[Tensor, ""]:
        """The curvature of the manifold on which both modalities meet.

        Args:
            norm_img: norm of the mean lifted visual feature; only the chord objective and the released search use it.
            norm_txt: norm of the mean lifted text feature.

        Returns:
            A 0-D tensor; with gradient unless the curvatures are fixed.

        Raises:
            ValueError: a variant without curvature.
        """
        variant = self.variant
        if variant.curvature == "none":
            raise ValueError(f"variant {variant.name} has no curvature")
        if variant.curvature == "one":
            return self.c_img()
        if variant.curvature == "three":
            return self.c_third()
        c_img, c_txt = self.c_img(), self.c_txt()
        method = variant.intermediate
        if method.startswith("exact-"):
            sigma = 1 / math.sqrt(self.dim)
            return exact_intermediate_curvature(c_img, c_txt, self.dim, sigma, method.removeprefix("exact-"))
        if method == "chord":
            radii = search_radii(norm_img, norm_txt, c_img.detach(), c_txt.detach(), self.kappa)
            return intermediate_curvature(c_img, c_txt, *radii)
        if method == "released":
            radii = released_radii(norm_img, norm_txt, c_img.detach(), c_txt.detach())
            return intermediate_curvature(c_img, c_txt, *radii, method="released")
        return intermediate_curvature(c_img, c_txt, method=method)

    def curvatures(self, features: PathFeatures, length: Int[Tensor, " B"]) -> tuple[Tensor, Tensor, Tensor]:
        """c_img, c_txt and c_mid for a batch; c_mid may depend on the ratio of the mean features' norms.

        Args:
            features: what `path_features` returns.
            length: number of nodes on each path.
        """
        with torch.no_grad():
            valid = torch.arange(features.img.shape[1], device=length.device) < length[:, None]
            norms = [
                (scale * x)[valid].mean(dim=0).norm().clamp(min=1e-6) if bool(valid.any()) else 1.0
                for x, scale in ((features.img, features.scale_img), (features.txt, features.scale_txt))
            ]
        return self.c_img(), self.c_txt(), self.c_mid(*norms)

    @torch.no_grad()
    def clamp_(self) -> "MATHead":
        """Move curvatures and radii back into their bounds, in place; call it after every optimizer step."""
        for curvature in (self.c_img, self.c_txt, self.c_third):
            if curvature is not None:
                curvature.clamp_()
        if hasattr(self, "alpha_img"):
            self.alpha_img.clamp_(max=0)
            self.alpha_txt.clamp_(max=0)
        return self

    def _pooled(self, tokens: Tensor) -> Tensor:
        return tokens[:, -1] if self.variant.feature == "last" else tokens.mean(dim=1)
