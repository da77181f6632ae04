"""What the method asks of a model's two towers, and adapters for open_clip (ViT, EVA) and transformers (CLIP, SigLIP, SigLIP2).

An `ImageTower` embeds, runs its blocks on all states or on tokens that come alone, and pools; a `TextTower` tokenises,
embeds, runs its blocks and pools. Subclass them for another model and set a `Backbone`'s `image` and `text`.
"""

from jaxtyping import Float
from torch import Tensor, nn

from mat_align.backbones._image import ImageTower, image_tower
from mat_align.backbones._text import TextTower, Tokenizer, text_tower, token_ids

__all__ = ["Backbone", "ImageTower", "TextTower", "Tokenizer", "backbone", "image_tower", "text_tower", "token_ids"]


class Backbone:
    """A frozen two-tower model and its parts; `MATModel` and the prompt learners take one in place of the model.

    Args:
        model: open_clip's CLIP or CustomTextCLIP, or transformers' CLIPModel, SiglipModel or Siglip2Model.
        tokenizer: texts to ids `(n length)`, padded as the model was trained; CLIP's own where it is CLIP.

    Raises:
        ValueError: another model, or SigLIP without a tokenizer.
    """

    def __init__(self, model: nn.Module, tokenizer: Tokenizer | None = None) -> None:
        self.model = model
        self.image, self.text = image_tower(model), text_tower(model, tokenizer)

    @property
    def logit_scale(self) -> Float[Tensor, ""]:
        """Logarithm of the factor on the cosines."""
        return self.model.logit_scale.reshape(())

    def encode_image(self, images: Tensor) -> Float[Tensor, "B d"]:
        """The model's own features of pictures."""
        x = self.image.embed(images, None)
        for number in range(self.image.num_blocks):
            x = self.image.block(number, x)
        return self.image.feature(x, 0)[:, 0]


def backbone(clip: nn.Module | Backbone) -> Backbone:
    """The parts of a model, or what is a `Backbone` already."""
    return clip if isinstance(clip, Backbone) else Backbone(clip)
