"""`hier predict RUN --export FILE`: a finished model in one file, its pretrained weights included."""

import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from app_data.store.atomic import new_file, write_json
from app_data.store.errors import DataError, MissingAssetError
from app_eval.ask.frozen import FrozenClassifier
from app_eval.measure.embed import embedding
from hier_lora import HierLoraCLIP

PIXELS, SCORES = "pixels", "scores"


class Whole(nn.Module):
    """From pictures to scores of all nodes, in one graph."""

    def __init__(self, model: FrozenClassifier | HierLoraCLIP) -> None:
        super().__init__()
        self.frozen = isinstance(model, FrozenClassifier)
        self.base = model.base if self.frozen else model.dual_encoder
        if self.frozen:
            for expert in model.product.experts.values():
                if hasattr(expert, "prepare_export"):
                    expert.prepare_export()
            self.product = model.product
            self.register_buffer("mean", model.mean)
        else:
            model.refresh_text()
            model.text = "cached"
            self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        """Scores (B, N) of pictures (B, 3, S, S): raw values of 0 to 255 if the base model prepares batches, else prepared ones."""
        if getattr(self.base, "preprocesses_batches", False):
            pixels = self.base.preprocess(pixels)
        if not self.frozen:
            return self.model(pixels)
        x = getattr(self.base, "vision", self.base.encode_image)(pixels).float() - self.mean
        features = dict.fromkeys(self.product.experts, x)
        if "prompts" in features:
            features["prompts"] = embedding(self.base)(x)
        return self.product.logits(features)


def export(model: FrozenClassifier | HierLoraCLIP, size: int, path: Path) -> None:
    """Write a model, and beside it `FILE.json` with what a caller must know: the tree, the size, the temperatures.

    Args:
        model: the model; a LoRA adapter is merged into it.
        size: height and width of the pictures.
        path: `.onnx` for a graph from pixels to scores of all nodes, for a batch of any size; `.safetensors` for the weights of a
            LoRA model, merged, under the names of its base model.

    Raises:
        DataError: another ending, or weights that no single file makes whole.
        MissingAssetError: a package that writes ONNX is missing.
    """
    frozen = isinstance(model, FrozenClassifier)
    if path.suffix == ".safetensors" and not frozen:
        base = model.merge_and_unload().dual_encoder
        state = getattr(base, "plain_model", base).state_dict()
        with new_file(path) as temporary:
            save_file({name: value.cpu().clone().contiguous() for name, value in state.items()}, temporary)
    elif path.suffix == ".safetensors":
        raise DataError(
            "--export FILE.safetensors is for LoRA runs; the folder of a classifier on frozen features holds its weights as "
            "safetensors already: experts.safetensors and mean.safetensors"
        )
    elif path.suffix == ".onnx":
        _onnx(model if frozen else model.merge_and_unload(), size, path)
    else:
        raise DataError(f"--export must name a file that ends in .onnx or .safetensors, got {path}")
    base = model.base if frozen else model.dual_encoder
    raw = bool(getattr(base, "preprocesses_batches", False))
    shown = model.product.shown(model.product.settings.decoder) if frozen else model.temperature
    about = {
        "format": 1,
        "base": model.locator if frozen else base.locator,
        "size": size,
        "pixels": "RGB, 0 to 255, uint8" if raw else "as the preprocessing of the base model gives them, float32",
        "scores": "log-probabilities of all nodes" if frozen else "logits of all nodes; softmax level by level",
        "decoder": model.product.settings.decoder if frozen else "joint_path",
        "temperature": None if shown is None else shown.tolist(),
        "taxonomy": (model.product if frozen else model).tax.to_json(),
    }
    write_json(path.with_name(path.name + ".json"), about)


def _onnx(model: FrozenClassifier | HierLoraCLIP, size: int, path: Path) -> None:
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise MissingAssetError(f"--export needs {' and '.join(missing)}: run pip install onnx onnxscript")
    whole = Whole(model).eval()
    raw = getattr(whole.base, "preprocesses_batches", False)
    # Two pictures: a batch of one would be taken for a constant.
    example = torch.zeros(2, 3, size, size, dtype=torch.uint8 if raw else torch.float32)
    with new_file(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            whole, (example,), str(temporary), input_names=[PIXELS], output_names=[SCORES], external_data=False,
            dynamic_shapes={"pixels": {0: torch.export.Dim("batch")}}, verbose=False, dynamo=True,
        )  # fmt: skip
