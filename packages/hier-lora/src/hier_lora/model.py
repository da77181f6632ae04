"""A dual encoder that scores every node of a taxonomy, adapted with LoRA.

z = exp(logit_scale) * cos(image, text of the node), for all N nodes on all levels. LoRA: Hu et al., 2022.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from hier_lora.dual_encoder import load_dual_encoder
from hier_lora.predict import Prediction, predict_paths
from hier_lora.prompts import PromptSet
from hier_losses import Taxonomy

TEXT_MODES = ("cached", "live")
STATE, SETTINGS, TREE = "hier_lora.safetensors", "hier_lora.json", "taxonomy.json"


class HierLoraCLIP(nn.Module):
    """Logits for all nodes of a taxonomy from a dual encoder with LoRA adapters.

    Args:
        model: a dual encoder (see `hier_lora.DualEncoder`).
        tax: the taxonomy; its N nodes are the classes.
        lora: a `peft.LoraConfig` (see `hier_lora.lora_config`); None leaves the model frozen: zero-shot.
        text: "cached" embeds the prompts once, with the text tower frozen; "live" embeds them in every forward pass, so that
            a LoRA on the text tower learns.
        prompts: the sentences; `PromptSet(tax)` if None.
        train_logit_scale: peft freezes the scale of the cosines; True trains it beside the adapter.
        center_text: subtract the mean of the node embeddings before normalising. Sentence encoders that were not trained
            with pictures put all short prompts into one narrow cone; CLIP needs no centring.
        picture_size: side of the centred square that `predict` cuts out and scales before `preprocess`; None leaves the
            size to `preprocess`.

    Raises:
        ValueError: for an unknown text mode, or a text mode that would ignore LoRA layers on the text tower.
    """

    def __init__(
        self,
        model: nn.Module,
        tax: Taxonomy,
        lora: LoraConfig | None = None,
        text: str = "cached",
        *,
        prompts: PromptSet | None = None,
        train_logit_scale: bool = False,
        center_text: bool = False,
        picture_size: int | None = None,
    ) -> None:
        super().__init__()
        if text not in TEXT_MODES:
            raise ValueError(f"text must be one of {TEXT_MODES}, got {text!r}")
        self.tax = tax
        self.prompts = PromptSet(tax) if prompts is None else prompts
        if len(self.prompts) != tax.num_nodes:
            raise ValueError(f"prompts must cover the {tax.num_nodes} nodes of the taxonomy, got {len(self.prompts)}")
        self.text = text
        self.center_text = center_text
        self.picture_size = picture_size
        if lora is not None and text == "cached":
            _check_text_is_frozen(model, lora)
        model.requires_grad_(False)
        self.encoder = model if lora is None else get_peft_model(model, lora)
        self.train_logit_scale = train_logit_scale
        self.dual_encoder.logit_scale.requires_grad_(train_logit_scale)
        self.register_buffer("node_features", None)
        if text == "cached":
            self.refresh_text()

    @property
    def dual_encoder(self) -> nn.Module:
        """The dual encoder, with the adapter's layers inside."""
        return self.encoder.get_base_model() if isinstance(self.encoder, PeftModel) else self.encoder

    def train(self, mode: bool = True) -> "HierLoraCLIP":
        """Switch to training mode, with every BatchNorm left in evaluation mode: its statistics belong to the base model."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def encode_nodes(self) -> Float[Tensor, "nodes dim"]:
        """Embed the prompts of all nodes: unit vectors, averaged over templates."""
        sentences = self.prompts.sentences()
        num_templates = len(sentences[0])
        flat = [sentence for row in sentences for sentence in row]
        embedded = F.normalize(self.dual_encoder.encode_text(flat).float(), dim=-1)
        nodes = embedded.reshape(len(sentences), num_templates, -1).mean(1)
        if self.center_text:
            nodes = nodes - nodes.mean(0)
        return F.normalize(nodes, dim=-1)

    @torch.no_grad()
    def refresh_text(self) -> None:
        """Embed the prompts again and keep the result; needed only after a change of prompts or of the text tower."""
        mode = self.dual_encoder.training
        self.dual_encoder.eval()
        self.node_features = self.encode_nodes()
        self.dual_encoder.train(mode)

    def encode_image(self, pixels: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim"]:
        """Embed preprocessed pictures: unit vectors, in single precision."""
        return F.normalize(self.dual_encoder.encode_image(pixels).float(), dim=-1)

    def score(self, image_features: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch nodes"]:
        """Logits of all nodes for unit image features."""
        nodes = self.node_features if self.text == "cached" else self.encode_nodes()
        return self.dual_encoder.logit_scale.float().exp() * image_features @ nodes.T

    def forward(self, pixels: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch nodes"]:
        """Logits of all nodes.

        Args:
            pixels: pictures as `preprocess` returns them.

        Returns:
            exp(logit_scale) times the cosines, in [-exp(logit_scale), exp(logit_scale)].
        """
        return self.score(self.encode_image(pixels))

    @torch.inference_mode()
    def predict(self, pictures: Sequence, decoder: str = "joint_path", batch_size: int = 64) -> list[Prediction]:
        """Name the path of each picture from the top of the taxonomy to a leaf, with a probability for each level.

        Args:
            pictures: PIL pictures, or uint8 arrays of shape (H, W, 3).
            decoder: a decoder of `hier_losses.decoding`, by name.
            batch_size: pictures scored at a time, at least 1.

        Returns:
            One `Prediction` a picture.

        Raises:
            ValueError: for an unknown decoder.
        """
        was_training = self.training
        self.eval()
        device = self.dual_encoder.logit_scale.device
        found: list[Prediction] = []
        for start in range(0, len(pictures), batch_size):
            pixels = torch.stack([self._prepare(picture) for picture in pictures[start : start + batch_size]])
            found += predict_paths(self(pixels.to(device)).cpu(), self.tax, decoder)
        self.train(was_training)
        return found

    def _prepare(self, picture: Image.Image | np.ndarray) -> Tensor:
        if self.picture_size is not None:
            picture = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
            picture = ImageOps.fit(
                picture.convert("RGB"), (self.picture_size, self.picture_size), Image.Resampling.BICUBIC
            )
        return self.dual_encoder.preprocess(picture)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the adapter in peft's format, and beside it the taxonomy, the prompts and the text features.

        The base model's weights are not written: the locator names where they come from.

        Raises:
            ValueError: if the base model has no locator.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        locator = getattr(self.dual_encoder, "locator", "")
        if not locator:
            raise ValueError(
                "model.locator must name where the base model comes from ('hf:...', 'open_clip:...'), got ''"
            )
        if isinstance(self.encoder, PeftModel):
            self.encoder.peft_config["default"].base_model_name_or_path = locator
            # The text tower's vocabulary never changes; without this peft looks the locator up as a hub name.
            self.encoder.save_pretrained(str(folder), save_embedding_layers=False)
        state = {"logit_scale": self.dual_encoder.logit_scale.detach().reshape(1)}
        if self.node_features is not None:
            state["node_features"] = self.node_features
        save_file({k: v.cpu().contiguous() for k, v in state.items()}, folder / STATE)
        settings = {
            "format": 1,
            "locator": locator,
            "text": self.text,
            "adapter": isinstance(self.encoder, PeftModel),
            "train_logit_scale": self.train_logit_scale,
            "center_text": self.center_text,
            "picture_size": self.picture_size,
            "prompts": {
                "templates": list(self.prompts.templates),
                "style": self.prompts.style,
                "words": self.prompts.words,
            },
        }
        (folder / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")
        (folder / TREE).write_text(json.dumps(self.tax.to_json()) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path, model: nn.Module | None = None) -> "HierLoraCLIP":
        """Load what `save_pretrained` wrote.

        Args:
            folder: the folder.
            model: the base model; loaded through the stored locator if None.

        Returns:
            The model in evaluation mode.

        Raises:
            ValueError: if a file is missing or damaged; the message names it.
        """
        folder = Path(folder)
        try:
            settings = json.loads((folder / SETTINGS).read_text())
            state = load_file(folder / STATE)
            tax = Taxonomy.from_json(folder / TREE)
        except (OSError, json.JSONDecodeError, SafetensorError) as error:
            raise ValueError(f"folder must hold a complete saved model, got {folder}: {error}") from error
        model = load_dual_encoder(settings["locator"]) if model is None else model
        found = cls.__new__(cls)
        nn.Module.__init__(found)
        found.tax, found.text, found.center_text = tax, settings["text"], settings["center_text"]
        found.prompts = PromptSet.from_words(settings["prompts"])
        found.train_logit_scale, found.picture_size = settings["train_logit_scale"], settings["picture_size"]
        model.requires_grad_(False)
        if settings["adapter"]:
            try:
                found.encoder = PeftModel.from_pretrained(model, str(folder))
            except (OSError, SafetensorError, RuntimeError) as error:
                raise ValueError(
                    f"folder must hold a readable adapter of {settings['locator']}, got {folder}: {error}"
                ) from error
        else:
            found.encoder = model
        with torch.no_grad():
            found.dual_encoder.logit_scale.copy_(state["logit_scale"].reshape(()))
        found.register_buffer("node_features", state.get("node_features"))
        return found.eval()


def _check_text_is_frozen(model: nn.Module, lora: LoraConfig) -> None:
    """Refuse cached text features beside LoRA on the text tower, before peft changes the model."""
    prefixes = tuple(getattr(model, "tower_modules", {}).get("text", ()))
    targets = lora.target_modules
    for name, _ in model.named_modules():
        if isinstance(targets, str):
            adapted = re.fullmatch(targets, name)
        else:
            adapted = any(name == target or name.endswith(f".{target}") for target in targets or ())
        if adapted and prefixes and name.startswith(prefixes):
            raise ValueError(f"text must be 'live' when LoRA adapts the text tower ({name}), got 'cached'")
