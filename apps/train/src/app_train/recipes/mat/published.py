"""The sixteen published configurations of Modality Alignment across Trees, each as a pure function.

Source: the released configurations of arXiv 2510.27391 (four data sets, 1 and 16 shots, MaPLe and PromptSRC). They need
the weights of a ViT-B/16 CLIP by OpenAI, and of BioCLIP for Rare Species.
"""

from functools import partial
from typing import Literal

from pydantic import Field

from app_train.core.config import Frozen

DataName = Literal["cifar100", "sun", "imagenet", "rare", "emoji"]
Method = Literal["maple", "promptsrc"]
# (data, shots, method): lr, curv_init, c_img, c_txt, scale.
_TABLE: dict[tuple[str, int, str], tuple[float, float, float, float, float]] = {
    ("cifar100", 1, "maple"): (0.02, 0.5, 0.5, 0.5, 10),
    ("cifar100", 1, "promptsrc"): (0.02, 0.05, 0.025, 0.05, 1),
    ("cifar100", 16, "maple"): (0.01, 0.05, 0.05, 0.025, 1),
    ("cifar100", 16, "promptsrc"): (0.01, 0.05, 0.05, 0.05, 10),
    ("sun", 1, "maple"): (0.02, 0.05, 0.05, 0.025, 1),
    ("sun", 1, "promptsrc"): (0.01, 0.05, 0.05, 0.025, 10),
    ("sun", 16, "maple"): (0.01, 0.05, 0.05, 0.05, 1),
    ("sun", 16, "promptsrc"): (0.01, 0.05, 0.05, 0.025, 10),
    ("imagenet", 1, "maple"): (0.02, 0.5, 0.25, 0.5, 1),
    ("imagenet", 1, "promptsrc"): (0.02, 0.05, 0.025, 0.05, 1),
    ("imagenet", 16, "maple"): (0.02, 0.05, 0.05, 0.025, 1),
    ("imagenet", 16, "promptsrc"): (0.02, 0.05, 0.05, 0.025, 1),
    ("rare", 1, "maple"): (0.02, 0.05, 0.05, 0.025, 1),
    ("rare", 1, "promptsrc"): (0.02, 0.5, 0.5, 0.25, 1),
    ("rare", 16, "maple"): (0.03, 0.05, 0.05, 0.025, 1),
    ("rare", 16, "promptsrc"): (0.03, 0.05, 0.05, 0.025, 1),
}
_EPOCHS_AND_BATCH = {"cifar100": (200, 8), "sun": (200, 8), "imagenet": (10, 2), "rare": (10, 8)}


class PublishedConfig(Frozen):
    """How prompts are tuned; the published rows use plain SGD without momentum or decay, a cosine after one warm-up epoch."""

    data: DataName
    shots: int = Field(ge=1)
    method: Method
    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    lr: float = Field(gt=0)
    curv_init: float = Field(gt=0)
    c_img: float = Field(gt=0)
    c_txt: float = Field(gt=0)
    scale: float = Field(gt=0)
    seed: int = Field(ge=0)
    model: str
    """Name in open_clip; OpenAI's weights need the QuickGELU model, which their files do not record."""
    pretrained: str | None
    """Tag of open_clip's weights; None where the name carries them."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    warmup_epochs: int = 1
    warmup_lr: float = 1e-3
    treecut_weight: float = 1.0
    node_weight: float = 0.5
    entail_weight: float = 0.5
    treecut_dropout: float = 0.1
    min_radius: float = 0.1
    ctx_init: str = "a photo of a"
    num_ctx: int = 2
    """MaPLe's tokens."""
    depth: int = 3
    """MaPLe's depth."""
    num_ctx_text: int = 4
    num_ctx_vision: int = 4
    depth_text: int = 9
    depth_vision: int = 9
    average_mean: float = 30.0
    """PromptSRC's Gaussian average over epochs."""
    average_std: float = 30.0
    text_weight: float = 25.0
    image_weight: float = 10.0
    logit_weight: float = 1.0


def published(data: DataName, shots: int, method: Method) -> PublishedConfig:
    """The configuration of one published row.

    Args:
        data: "cifar100", "sun", "imagenet" or "rare".
        shots: 1 or 16.
        method: "maple" or "promptsrc".

    Raises:
        ValueError: There is no such row.
    """
    if (data, shots, method) not in _TABLE:
        raise ValueError(f"(data, shots, method) must be one of {list(_TABLE)}, got {(data, shots, method)}")
    lr, curv_init, c_img, c_txt, scale = _TABLE[data, shots, method]
    epochs, batch_size = _EPOCHS_AND_BATCH[data]
    model, pretrained = ("ViT-B-16-quickgelu", "openai")
    if data == "rare":
        # The checkpoint's own configuration decides its activation.
        model, pretrained = ("hf-hub:imageomics/bioclip", None)
    return PublishedConfig(
        data=data,
        shots=shots,
        method=method,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        curv_init=curv_init,
        c_img=c_img,
        c_txt=c_txt,
        scale=scale,
        seed=1 if data in ("cifar100", "sun") else 2,
        model=model,
        pretrained=pretrained,
    )


PUBLISHED = {f"{data}-{shots}-{method}": partial(published, data, shots, method) for data, shots, method in _TABLE}
