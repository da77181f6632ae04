"""The sixteen published configurations of Modality Alignment across Trees as a pure function, and the scores beside them.

Source: the released configurations of arXiv 2510.27391 (four data sets, 1 and 16 shots, MaPLe and PromptSRC). They need
the weights of a ViT-B/16 CLIP by OpenAI, and of BioCLIP for Rare Species.
"""

from typing import Literal

from pydantic import Field

from app_train.core.config import Frozen

DataName = Literal["cifar100", "sun397", "imagenet", "rare-species"]
DATA: tuple[DataName, ...] = ("cifar100", "sun397", "imagenet", "rare-species")
Method = Literal["maple", "promptsrc"]
SHOTS = (1, 2, 4, 8, 16)
# (data, shots, method): lr, curv_init, c_img, c_txt, scale.
_TABLE: dict[tuple[str, int, str], tuple[float, float, float, float, float]] = {
    ("cifar100", 1, "maple"): (0.02, 0.5, 0.5, 0.5, 10),
    ("cifar100", 1, "promptsrc"): (0.02, 0.05, 0.025, 0.05, 1),
    ("cifar100", 16, "maple"): (0.01, 0.05, 0.05, 0.025, 1),
    ("cifar100", 16, "promptsrc"): (0.01, 0.05, 0.05, 0.05, 10),
    ("sun397", 1, "maple"): (0.02, 0.05, 0.05, 0.025, 1),
    ("sun397", 1, "promptsrc"): (0.01, 0.05, 0.05, 0.025, 10),
    ("sun397", 16, "maple"): (0.01, 0.05, 0.05, 0.05, 1),
    ("sun397", 16, "promptsrc"): (0.01, 0.05, 0.05, 0.025, 10),
    ("imagenet", 1, "maple"): (0.02, 0.5, 0.25, 0.5, 1),
    ("imagenet", 1, "promptsrc"): (0.02, 0.05, 0.025, 0.05, 1),
    ("imagenet", 16, "maple"): (0.02, 0.05, 0.05, 0.025, 1),
    ("imagenet", 16, "promptsrc"): (0.02, 0.05, 0.05, 0.025, 1),
    ("rare-species", 1, "maple"): (0.02, 0.05, 0.05, 0.025, 1),
    ("rare-species", 1, "promptsrc"): (0.02, 0.5, 0.5, 0.25, 1),
    ("rare-species", 16, "maple"): (0.03, 0.05, 0.05, 0.025, 1),
    ("rare-species", 16, "promptsrc"): (0.03, 0.05, 0.05, 0.025, 1),
}
# (shots, method, row): LA, HCA, MTA in percent on each of DATA; docs/results/mat-align-published.json says where they stand.
_SCORES: dict[tuple[int, str, str], tuple[tuple[float, float, float], ...]] = {
    (1, "maple", "VANILLA"): ((68.75, 4.65, 50.6), (63.98, 25.15, 50.31), (68.91, 2.97, 48.16), (41.55, 5.09, 44.75)),
    (1, "maple", "PROTECT"): ((69.33, 48.1, 83.36), (64.29, 50.45, 76.73), (66.16, 20.44, 85.18), (39.92, 13.22, 70.04)),
    (1, "maple", "HETEROGENEOUS"): ((71.37, 53.19, 85.29), (67.57, 57.92, 80.55), (66.33, 25.56, 85.98), (46.77, 20.94, 76.83)),
    (1, "promptsrc", "VANILLA"): ((72.48, 14.36, 51.91), (70.58, 42.14, 57.19), (68.82, 4.46, 54.1), (45.39, 6.72, 44.72)),
    (1, "promptsrc", "PROTECT"): ((73.07, 49.54, 85.16), (70.61, 55.52, 78.73), (68.43, 20.36, 85.63), (44.56, 20.36, 74.42)),
    (1, "promptsrc", "HETEROGENEOUS"): ((73.54, 51.91, 85.76), (70.64, 57.79, 79.94), (68.86, 25.13, 86.45), (46.98, 23.03, 77.32)),
    (16, "maple", "VANILLA"): ((75.01, 17.54, 52.21), (71.86, 33.25, 54.29), (70.7, 4.15, 48.16), (50.94, 5.3, 40.41)),
    (16, "maple", "PROTECT"): ((75.34, 61.15, 88.04), (72.17, 59.71, 82.27), (69.52, 31.24, 87.87), (48.14, 24.82, 78.79)),
    (16, "maple", "HETEROGENEOUS"): ((77.92, 69.38, 90.89), (75.47, 68.67, 86.02), (71.41, 43.79, 88.78), (69.96, 53.65, 87.27)),
    (16, "promptsrc", "VANILLA"): ((77.71, 15.07, 56.86), (75.75, 45.23, 59.42), (71.5, 2.48, 46.71), (59.2, 11.64, 55.82)),
    (16, "promptsrc", "PROTECT"): ((78.76, 66.74, 90.79), (75.54, 66.01, 84.75), (70.98, 32.89, 88.31), (56.4, 33.92, 82.47)),
    (16, "promptsrc", "HETEROGENEOUS"): ((78.9, 68.47, 91.12), (76.54, 69.18, 86.2), (71.67, 42.26, 89.64), (67.38, 50.77, 87.6)),
}  # fmt: skip
# HCA of rows of the ablation, 16-shot MaPLe.
_ABLATION = {
    "EUCLIDEAN": {"cifar100": 68.01, "sun397": 66.81, "rare-species": 51.81},
    "SHARED": {"cifar100": 69.05, "sun397": 68.26, "rare-species": 52.85},
    "SEPARATE": {"cifar100": 69.33, "sun397": 68.65, "rare-species": 52.73},
}
_EPOCHS_AND_BATCH = {"cifar100": (200, 8), "sun397": (200, 8), "imagenet": (10, 2), "rare-species": (10, 8)}


class PublishedConfig(Frozen):
    """How prompts are tuned; the published rows use plain SGD without momentum or decay, a cosine after one warm-up epoch."""

    data: Literal["cifar100", "sun397", "imagenet", "rare-species", "emoji"]
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
    """The configuration of one published row; 2 shots take the settings of 1, 4 and 8 those of 16.

    Args:
        data: one of `DATA`.
        shots: one of `SHOTS`.
        method: "maple" or "promptsrc".

    Raises:
        ValueError: There is no such row.
    """
    tuned_for = 1 if shots <= 2 else 16
    if shots not in SHOTS or (data, tuned_for, method) not in _TABLE:
        raise ValueError(
            f"(data, shots, method) must be of {DATA}, {SHOTS} and ('maple', 'promptsrc'), got {(data, shots, method)}"
        )
    lr, curv_init, c_img, c_txt, scale = _TABLE[data, tuned_for, method]
    epochs, batch_size = _EPOCHS_AND_BATCH[data]
    model, pretrained = ("ViT-B-16-quickgelu", "openai")
    if data == "rare-species":
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
        seed=1 if data in ("cifar100", "sun397") else 2,
        model=model,
        pretrained=pretrained,
    )


def published_scores(data: str, shots: int, method: str, row: str) -> dict[str, float]:
    """LA, HCA and MTA of a published row in percent, as far as they were published; all were of one run."""
    if (shots, method, row) in _SCORES:
        return dict(zip(("la", "hca", "mta"), _SCORES[shots, method, row][DATA.index(data)], strict=True))
    if (shots, method) == (16, "maple") and data in _ABLATION.get(row, {}):
        return {"hca": _ABLATION[row][data]}
    return {}
