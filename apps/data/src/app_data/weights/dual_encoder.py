"""A small pretrained dual encoder: EfficientNet-Lite0 for pictures, MiniLM for text, and a closed-form projection.

The projection needs no picture. Let W be Lite0's ImageNet classifier (1000 x 1280) and T the text embeddings of the
class names (1000 x 384), both centred over the classes. A picture's embedding is the vector whose inner products with T
come nearest to the classifier's logits: ridge regression, P = (T^T T + ridge I)^-1 T^T W. (Going from a classifier to
word vectors follows DeViSE, Frome et al., 2013, and ConSE, Norouzi et al., 2014.)
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from app_data.weights.lite0_minilm import MiniLM, folded, imagenet_class_names, lite0, lite0_preprocess, to_uint8

# Zero-shot accuracy on ImageNet classes left out of the fit (10 folds of 100) is flat and highest from 1 to 3.
_RIDGE = 1.0


class Lite0MiniLM(nn.Module):
    """EfficientNet-Lite0 and MiniLM in one space of 384 dimensions, ready to be tuned.

    Zero-shot scores gain from centring both sides on the pictures and prompts in use before the cosine.

    Attributes:
        vision: Float[B 3 H W] -> Float[B 1280].
        projection: The trainable image head, 1280 -> 384; its bias, first 0, can centre the pictures.
        text: The sentence encoder.
        logit_scale: Logarithm of the factor on the cosines, a parameter.
        locator: Where these weights come from.
        lora_targets: Per tower, a regular expression of the layers that LoRA adapts: pointwise convolutions, and query
            and value projections.
        tower_modules: Per tower, the prefixes of its parameters.
        modules_to_save: Heads that train in full beside LoRA.
    """

    embed_dim = 384
    preprocesses_batches = True

    def __init__(self, dropout: float = 0.5):
        """Load both towers from installed packages and compute the projection (2 seconds).

        Args:
            dropout: Share of the pooled features that the projection does not see in training mode, in [0, 1).
        """
        super().__init__()
        self.locator = "pip:lite0-minilm"
        self.lora_targets = {
            # Pointwise convolutions; peft refuses a rank that the groups of a depthwise one do not divide.
            "vision": r"vision\.blocks\..*\.(conv_pw|conv_pwl)",
            "text": r"text\.bert\.encoder\.layer\..*\.(query|value)",
        }
        self.tower_modules = {"vision": ["vision."], "text": ["text."]}
        self.modules_to_save = ["projection"]
        self.vision = lite0()
        self.text = MiniLM()
        head = self.vision.classifier
        self.dropout = nn.Dropout(dropout)
        self.projection = nn.Linear(head.in_features, self.embed_dim)
        with torch.no_grad():
            names = self.text(imagenet_class_names())
            self.projection.weight.copy_(closed_form_projection(head.weight, names))
            self.projection.bias.zero_()
        self.vision.reset_classifier(0)
        # CLIP's initial temperature, 0.07 (Radford et al., 2021).
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.eval()

    def train(self, mode: bool = True) -> "Lite0MiniLM":
        """Set the mode, but leave batch norms on their ImageNet statistics, which few drawings would spoil."""
        super().train(mode)
        for module in self.vision.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def preprocess(self, picture: Image.Image | np.ndarray | Tensor) -> Float[Tensor, "*batch 3 height width"]:
        """Scale pixels the way the weights expect; the size stays.

        Args:
            picture: A PIL picture, a uint8 array (*batch, H, W, 3), or a uint8 tensor (*batch, 3, H, W).

        Returns:
            Float tensor with channels first.
        """
        return lite0_preprocess(to_uint8(picture))

    def encode_image(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Embed preprocessed pictures of any size from 32 on; not normalised."""
        # Depthwise convolutions run up to twice as fast on CPU with the channels last.
        return self.project(self.vision(pixels.contiguous(memory_format=torch.channels_last)))

    def frozen_vision(self) -> nn.Module:
        """A copy of the picture tower to read features with: the same numbers to rounding, sooner.

        Raises:
            ValueError: LoRA layers are attached: merge them first.
        """
        return folded(self.vision)

    def project(self, features: Float[Tensor, "batch 1280"]) -> Float[Tensor, "batch 384"]:
        """Map the vision tower's pooled features into the common space; not normalised."""
        return self.projection(self.dropout(features))

    @torch.no_grad()
    def center_images(self, features: Float[Tensor, "batch 1280"]) -> None:
        """Set the projection's bias so that these pooled features have mean zero after it.

        Drawings sit far from photographs in feature space; without this step most of a cosine is that common offset.
        """
        self.projection.bias.copy_(-self.projection.weight @ features.mean(0))

    def encode_text(self, texts: Sequence[str]) -> Float[Tensor, "texts dim"]:
        """Embed sentences; each row has length 1."""
        return self.text(texts)


def closed_form_projection(
    classifier: Float[Tensor, "classes width"], names: Float[Tensor, "classes dim"], ridge: float = _RIDGE
) -> Float[Tensor, "dim width"]:
    """(T^T T + ridge I)^-1 T^T W with both centred over the classes.

    Args:
        classifier: Weight W of a trained linear classifier.
        names: Text embeddings T of its classes.
        ridge: Weight of the penalty; towards infinity the result turns into the plain product T^T W.

    Returns:
        The linear map from features to text space.

    Raises:
        ValueError: The ridge is not positive.
    """
    if not ridge > 0:
        raise ValueError(f"ridge must be positive, got {ridge}")
    text = names - names.mean(0)
    weight = classifier - classifier.mean(0)
    gram = text.T @ text + ridge * torch.eye(text.shape[1], dtype=text.dtype, device=text.device)
    return torch.linalg.solve(gram, text.T @ weight)


TOWERS: dict[str, Callable[[], nn.Module]] = {"lite0-minilm": Lite0MiniLM}
"""What stands behind `pip:<name>`; see `hier_lora.DualEncoder` for what each must have."""


def load(name: str) -> nn.Module:
    """The dual encoder behind a locator of the form `pip:<name>`.

    Args:
        name: One of `TOWERS`, such as "lite0-minilm", with or without `pip:` before it.

    Raises:
        ValueError: Another name.
        MissingAssetError: A package of weights is not installed.
    """
    if name.removeprefix("pip:") not in TOWERS:
        raise ValueError(f"name must be one of {', '.join(f'pip:{one}' for one in TOWERS)}, got {name!r}")
    return TOWERS[name.removeprefix("pip:")]()
