"""PromptSRC's regularisers: agreement with the frozen model, and the Gaussian average of the prompts over epochs.

Reference: Khattak et al., "Self-regulating prompts: foundational model adaptation without forgetting", ICCV 2023,
sections 3.2 to 3.4.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mat_align._checks import check_positive
from mat_align.backbones import Backbone, backbone
from mat_align.prompts._text import encode_text

NUM_TEMPLATES = 60


@torch.no_grad()
def template_features(clip: nn.Module | Backbone, texts: Sequence[str], batch_size: int = 64) -> Float[Tensor, "n d"]:
    """Unit text features of the frozen model: the normalised mean over the first 60 of CLIP's ImageNet templates.

    Args:
        clip: the model, see `mat_align.backbones`.
        texts: texts of the labels.
        batch_size: sentences encoded at once.

    Returns:
        Features `(n d)` of length 1.
    """
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

    templates = OPENAI_IMAGENET_TEMPLATES[:NUM_TEMPLATES]
    sentences = [template(text) for text in texts for template in templates]
    parts = backbone(clip)
    ids = parts.text.tokenize(sentences).to(parts.logit_scale.device)
    found = torch.cat([encode_text(parts, part) for part in ids.split(batch_size)])
    return F.normalize(found.float().unflatten(0, (len(texts), len(templates))).mean(dim=1), dim=-1)


class PromptSRCRegularizer(nn.Module):
    """How far the prompted model moved from the frozen one.

    text_weight mean|t - t0| + image_weight mean|f - f0| + logit_weight sum p0 (log p0 - log p)/(B n), on unit features.

    Args:
        text_weight: >= 0.
        image_weight: >= 0.
        logit_weight: >= 0.

    Raises:
        ValueError: a negative or non-finite weight.
    """

    def __init__(self, text_weight: float = 25.0, image_weight: float = 10.0, logit_weight: float = 1.0) -> None:
        """Keep the weights."""
        super().__init__()
        for name, value in (
            ("text_weight", text_weight),
            ("image_weight", image_weight),
            ("logit_weight", logit_weight),
        ):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be finite and >= 0, got {value}")
        self.text_weight, self.image_weight, self.logit_weight = text_weight, image_weight, logit_weight

    def forward(
        self,
        text: Float[Tensor, "n d"],
        frozen_text: Float[Tensor, "n d"],
        image: Float[Tensor, "B d"],
        frozen_image: Float[Tensor, "B d"],
        logits: Float[Tensor, "B n"],
        frozen_logits: Float[Tensor, "B n"],
    ) -> Float[Tensor, ""]:
        """Add up the three terms.

        Args:
            text: prompted text features.
            frozen_text: text features of the frozen model.
            image: prompted image features (the last token).
            frozen_image: image features of the frozen model.
            logits: of the prompted model.
            frozen_logits: of the frozen model.

        Returns:
            A scalar >= 0.
        """
        t, t0, f, f0 = (F.normalize(x.float(), dim=-1) for x in (text, frozen_text, image, frozen_image))
        log_p, log_p0 = logits.float().log_softmax(dim=-1), frozen_logits.float().log_softmax(dim=-1)
        divergence = F.kl_div(log_p, log_p0, reduction="sum", log_target=True) / max(logits.numel(), 1)
        image_term = (f - f0).abs().sum() / max(f.numel(), 1)
        return (
            self.text_weight * (t - t0).abs().mean() + self.image_weight * image_term + self.logit_weight * divergence
        )


class GaussianPromptAverage:
    """Average of the trained parameters over epochs, weighted by a Gaussian of the epoch number 1..num_epochs.

    w_e is proportional to exp(-(e - mean)^2 / (2 std^2)), and the weights add up to 1. Only the trained parameters are
    averaged (the released code averages the whole half-precision state, and frozen weights drift by rounding).

    Args:
        num_epochs: number of epochs E, at least 1.
        mean: epoch of the largest weight.
        std: width in epochs, > 0.

    Attributes:
        weights: (E,) fp64.

    Raises:
        ValueError: num_epochs < 1, or std not finite and > 0.

    >>> GaussianPromptAverage(2, mean=1.5).weights
    tensor([0.5000, 0.5000], dtype=torch.float64)
    """

    def __init__(self, num_epochs: int, mean: float = 30.0, std: float = 30.0) -> None:
        """Compute the weights."""
        if num_epochs < 1:
            raise ValueError(f"num_epochs must be at least 1, got {num_epochs}")
        check_positive("std", std)
        epochs = torch.arange(1, num_epochs + 1, dtype=torch.float64)
        self.weights = (-((epochs - mean) ** 2) / (2 * std**2)).softmax(dim=0)
        self.num_updates = 0
        self.average: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Add the parameters at the end of an epoch; those without gradient are left out.

        Args:
            parameters: `model.named_parameters()`.

        Raises:
            RuntimeError: more updates than epochs.
        """
        if self.num_updates == len(self.weights):
            raise RuntimeError(f"all {len(self.weights)} epochs have been added already")
        weight = self.weights[self.num_updates].item()
        for name, parameter in parameters:
            if parameter.requires_grad:
                value = weight * parameter.detach().double()
                self.average[name] = self.average[name] + value if name in self.average else value
        self.num_updates += 1

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Write the average into the model's parameters.

        Raises:
            RuntimeError: fewer updates than epochs.
        """
        if self.num_updates != len(self.weights):
            raise RuntimeError(f"{self.num_updates} of {len(self.weights)} epochs have been added")
        for name, parameter in model.named_parameters():
            if name in self.average:
                parameter.copy_(self.average[name])
