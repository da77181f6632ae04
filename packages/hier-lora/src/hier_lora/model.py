"""A dual encoder that scores every node of a taxonomy, adapted with LoRA.

z = exp(logit_scale) * cos(image, text of the node), for all N nodes on all levels. LoRA: Hu et al., 2022.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F

from hier_lora import saving
from hier_lora.calibration import fit_sigmoid, fit_temperatures, guarded
from hier_lora.dual_encoder import DualEncoder
from hier_lora.lora import add_lora, check_targets
from hier_lora.predict import (
    LabelPrediction,
    Prediction,
    check_decoder,
    label_probabilities,
    name_labels,
    predict_paths,
)
from hier_lora.prompts import PromptSet
from hier_lora.text import PLAIN_CHUNK, TEXT_MODES, embed_sentences, sample_nodes, spread
from hier_losses import LabelGraph, Taxonomy, TaxonomyUpdate, match_taxonomies
from hier_losses.functional import mcm

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel


class HierLoraCLIP(nn.Module):
    """Logits for all nodes of a taxonomy from a dual encoder with LoRA adapters.

    Args:
        model: a dual encoder (see `hier_lora.DualEncoder`).
        tax: the taxonomy, whose N nodes are the classes; or a `LabelGraph` for pictures with several labels.
        lora: a `peft.LoraConfig` (see `hier_lora.lora_config`); None leaves the model frozen: zero-shot.
        text: how prompts become features while training. "cached": once, with the text tower frozen; "live": in every
            forward pass, so that a LoRA on the text tower learns; "chunked": as live, with the memory of one chunk;
            "sampled": only the nodes that the batch needs and some random ones, see `forward`. Outside training, every
            mode scores all nodes.
        prompts: the sentences; `PromptSet(tax)` if None.
        train_logit_scale: peft freezes the scale of the cosines; True trains it beside the adapter.
        train_logit_bias: add a trained number to all logits, as sigmoid losses on a `LabelGraph` need; softmax losses do
            not see it.
        center_text: subtract the mean of the node embeddings before normalising. Sentence encoders that were not trained
            with pictures put all short prompts into one narrow cone; CLIP needs no centring.
        picture_size: side of the centred square that `predict` cuts out and scales before `preprocess`; None leaves the
            size to `preprocess`.
        text_chunk: sentences that "chunked" holds in memory at a time, at least 1.
        num_negatives: random nodes that "sampled" adds to a batch, at least 0.

    Raises:
        ValueError: for an unknown text mode, a text mode that would ignore LoRA layers on the text tower, LoRA layers that
            the model would ignore, or a number outside its range.
    """

    dual_encoder: Any  # an nn.Module with the members of DualEncoder
    adapter: "PeftModel | None"
    base_logit_scale: Tensor
    node_features: Any  # a Tensor with cached text, else None
    text_center: Tensor | None
    temperature: Tensor | None
    sigmoid: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        tax: Taxonomy | LabelGraph,
        lora: "LoraConfig | None" = None,
        text: str = "cached",
        *,
        prompts: PromptSet | None = None,
        train_logit_scale: bool = False,
        train_logit_bias: bool = False,
        center_text: bool = False,
        picture_size: int | None = None,
        text_chunk: int = 256,
        num_negatives: int = 256,
    ) -> None:
        super().__init__()
        if text not in TEXT_MODES:
            raise ValueError(f"text must be one of {TEXT_MODES}, got {text!r}")
        if text == "sampled" and isinstance(tax, LabelGraph):
            raise ValueError("text must not be 'sampled' for a LabelGraph: its losses need every label")
        if text_chunk < 1:
            raise ValueError(f"text_chunk must be at least 1, got {text_chunk}")
        if num_negatives < 0:
            raise ValueError(f"num_negatives must be at least 0, got {num_negatives}")
        prompts = PromptSet(tax) if prompts is None else prompts
        if len(prompts) != tax.num_nodes:
            raise ValueError(f"prompts must cover the {tax.num_nodes} nodes of the taxonomy, got {len(prompts)}")
        if lora is not None:
            check_targets(model, lora, text_is_frozen=text == "cached")
        model.requires_grad_(False)
        self._set_up(
            model, None if lora is None else add_lora(model, lora), tax, prompts, cast(DualEncoder, model).logit_scale,
            text=text, train_logit_scale=train_logit_scale, train_logit_bias=train_logit_bias, center_text=center_text,
            picture_size=picture_size, text_chunk=text_chunk, num_negatives=num_negatives,
        )  # fmt: skip
        if text == "cached":
            self.refresh_text()

    def _set_up(
        self, encoder: nn.Module, adapter: "PeftModel | None", tax, prompts: PromptSet, base_scale: Tensor, **settings
    ) -> None:
        self.dual_encoder, self.tax, self.prompts = encoder, tax, prompts
        # Its layers lie inside the dual encoder: registered as well, every weight would have two names.
        object.__setattr__(self, "adapter", adapter)
        self.text = settings["text"]
        self.train_logit_scale = settings["train_logit_scale"]
        self.train_logit_bias = settings["train_logit_bias"]
        self.center_text = settings["center_text"]
        self.picture_size = settings["picture_size"]
        self.text_chunk, self.num_negatives = settings["text_chunk"], settings["num_negatives"]
        self.merged = False
        self.dual_encoder.logit_scale.requires_grad_(self.train_logit_scale)
        self.logit_bias = nn.Parameter(torch.zeros(())) if self.train_logit_bias else None
        self.register_buffer("base_logit_scale", base_scale.detach().clone(), persistent=False)
        self.register_buffer("node_features", None)
        # Fixed once nodes come or go, so that those that stay keep their features; None means the mean of all nodes.
        self.register_buffer("text_center", None)
        self.register_buffer("temperature", None)
        self.register_buffer("sigmoid", None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HierLoraCLIP":
        """Move or cast the model; features and temperatures stay in single precision: bfloat16 has 8 bits for a cosine."""
        kept = {name: value for name, value in self.named_buffers(recurse=False)}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            setattr(self, name, value.to(getattr(self, name).device))
        return self

    def train(self, mode: bool = True) -> "HierLoraCLIP":
        """Switch to training mode, with every BatchNorm left in evaluation mode: its statistics belong to the base model."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def _embed(self, nodes: Sequence[int] | None = None) -> Float[Tensor, "nodes dim"]:
        """Prompts of some nodes, or of all, before centring."""
        sentences = self.prompts.sentences(nodes)
        with_graph = torch.is_grad_enabled()
        chunk = None if with_graph else PLAIN_CHUNK
        recompute = with_graph and self.text == "chunked"
        if recompute:
            chunk = self.text_chunk
        return embed_sentences(self.dual_encoder.encode_text, sentences, chunk=chunk, recompute=recompute)

    def _centred(self, raw: Tensor, center: Tensor | None) -> Tensor:
        return F.normalize(raw if center is None else raw - center, dim=-1)

    def encode_nodes(self) -> Float[Tensor, "nodes dim"]:
        """Embed the prompts of all nodes: unit vectors, averaged over templates."""
        raw = self._embed()
        if self.center_text and self.text_center is None:
            return self._centred(raw, raw.mean(0))
        return self._centred(raw, self.text_center)

    @torch.no_grad()
    def refresh_text(self) -> None:
        """Embed the prompts again and keep the result; needed only after a change of prompts or of the text tower."""
        with self._evaluating():
            raw = self._embed()
        self.text_center = raw.mean(0) if self.center_text else None
        self.node_features = self._centred(raw, self.text_center)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        mode = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(mode)

    def encode_image(self, pixels: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim"]:
        """Embed preprocessed pictures: unit vectors, in single precision."""
        pixels = pixels.to(self.dual_encoder.logit_scale.dtype)
        return F.normalize(self.dual_encoder.encode_image(pixels).float(), dim=-1)

    def score(
        self, image_features: Float[Tensor, "batch dim"], target: Tensor | None = None
    ) -> Float[Tensor, "batch nodes"]:
        """Logits of all nodes for unit image features; see `forward`."""
        if self.text == "sampled" and self.training:
            return self._score_sample(image_features, target)
        nodes = self.node_features if self.text == "cached" else self.encode_nodes()
        return self._scaled(image_features @ nodes.T)

    def _scaled(self, cosines: Tensor) -> Tensor:
        logits = self.dual_encoder.logit_scale.float().exp() * cosines
        return logits if self.logit_bias is None else logits + self.logit_bias

    def _score_sample(self, image_features: Tensor, target: Tensor | None) -> Tensor:
        if target is None:
            raise ValueError(
                "target must be given while training with text='sampled': it decides which nodes are scored"
            )
        sample = sample_nodes(target, self.tax.to(target.device), self.num_negatives)
        raw, center = self._embed(sample.nodes.tolist()), self.text_center
        if self.center_text and center is None:
            weight = sample.log_weight.exp()[:, None]
            center = (weight * raw).sum(0) / weight.sum()
        return spread(self._scaled(image_features @ self._centred(raw, center).T), sample, self.tax.num_nodes)

    def forward(
        self, pixels: Float[Tensor, "batch channels height width"], target: Tensor | None = None
    ) -> Float[Tensor, "batch nodes"]:
        """Logits of all nodes.

        Args:
            pixels: pictures as `preprocess` returns them.
            target: (batch,) node ids; read only while training with text="sampled". Nodes outside the sample then get the
                logit -10,000, and random negatives log(nodes they stand for) on top, so that the losses that sum over
                nodes (level cross-entropy, TP-KL, HiSCE, leaf cross-entropy) work unchanged on an estimate of their
                log-sum-exps; `parent_child_consistency` needs all nodes.

        Returns:
            exp(logit_scale) times the cosines, in [-exp(logit_scale), exp(logit_scale)] (plus the bias, if trained).

        Raises:
            ValueError: if a target is needed and missing.
        """
        return self.score(self.encode_image(pixels), target)

    @torch.inference_mode()
    def logits(self, pictures: Sequence, batch_size: int = 64) -> Float[Tensor, "pictures nodes"]:
        """Logits of all nodes for pictures as they come, on the CPU; the prompts are embedded once.

        Args:
            pictures: PIL pictures, or uint8 arrays of shape (H, W, 3).
            batch_size: pictures scored at a time, at least 1.

        Raises:
            ValueError: for anything that is no picture, or a batch size below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        device = self.dual_encoder.logit_scale.device
        rows = [torch.zeros(0, self.tax.num_nodes)]
        with self._evaluating():
            nodes = self.node_features if self.text == "cached" or not len(pictures) else self.encode_nodes()
            for start in range(0, len(pictures), batch_size):
                chosen = pictures[start : start + batch_size]
                pixels = [self._prepare(picture, start + i) for i, picture in enumerate(chosen)]
                # Without a picture size a preprocessing may keep that of each picture: these are encoded one by one.
                alike = len({each.shape for each in pixels}) == 1
                for batch in [torch.stack(pixels)] if alike else [each[None] for each in pixels]:
                    rows.append(self._scaled(self.encode_image(batch.to(device)) @ nodes.T).cpu())
        return torch.cat(rows)

    def predict(
        self, pictures: Sequence, decoder: str = "joint_path", batch_size: int = 64, **options: object
    ) -> list[Prediction]:
        """Name the path of each picture from the top of the taxonomy to a leaf, with a probability for each level.

        Args:
            pictures: PIL pictures, or uint8 arrays of shape (H, W, 3).
            decoder: a decoder of `hier_losses.decoding`, by name.
            batch_size: pictures scored at a time, at least 1.
            options: of the decoder, see `predict_paths`.

        Returns:
            One `Prediction` a picture; calibrated if `calibrate` was called.

        Raises:
            ValueError: for an unknown decoder or option, anything that is no picture, or a model over a label graph.
        """
        check_decoder(decoder, options)
        if isinstance(self.tax, LabelGraph):
            raise ValueError("predict needs a taxonomy, this model has a LabelGraph: use predict_labels")
        found = self.logits(pictures, batch_size)
        return predict_paths(found, self.tax.to("cpu"), decoder, self.temperature, **options)

    def predict_labels(self, pictures: Sequence, threshold: float = 0.5, batch_size: int = 64) -> list[LabelPrediction]:
        """Name all labels of each picture, with their ancestors: the multi-label counterpart of `predict`.

        Args:
            pictures: PIL pictures, or uint8 arrays of shape (H, W, 3).
            threshold: least probability of a label, in [0, 1].
            batch_size: pictures scored at a time, at least 1.
        """
        a, b = (1.0, 0.0) if self.sigmoid is None else self.sigmoid.tolist()
        found = label_probabilities(self.logits(pictures, batch_size), self.tax.to("cpu"), a, b)
        return name_labels(found, self.tax.names, threshold)

    def calibrate(self, logits: Float[Tensor, "batch nodes"], target: Tensor) -> bool:
        """Fit what turns logits into probabilities, on pictures that training did not see; saved with the adapter.

        Args:
            logits: of held-out pictures, see `logits`.
            target: (batch,) node ids: one temperature a level is fitted; or (batch, N) zeros and ones: a slope and an
                offset for all labels.

        Returns:
            Whether the model is calibrated. A level whose temperature hits its bound of 0.01 or 100 keeps 1.

        Raises:
            ValueError: for no picture, or shapes that differ.
        """
        device = self.dual_encoder.logit_scale.device
        if target.ndim == 2:
            scores = mcm(logits, self.tax.to(logits.device))
            self.sigmoid = torch.tensor(fit_sigmoid(scores, target.to(logits.device)), device=device)
        else:
            found = guarded(fit_temperatures(logits, target, self.tax))
            self.temperature = None if found is None else found.to(device)
        return target.ndim == 2 or self.temperature is not None

    @torch.no_grad()
    def update_taxonomy(
        self, update: TaxonomyUpdate | Taxonomy | LabelGraph, names: Mapping | None = None
    ) -> TaxonomyUpdate:
        """Change the classes without retraining: nodes may come, go and move.

        A node that stays keeps its words (see `PromptSet.update`), and with cached text its stored features bit for bit;
        only new or changed prompts are embedded. With centred text the centre stays where it is. Levels keep their
        temperatures; deeper ones get the last one's. Loss modules hold a taxonomy of their own: make them anew.

        Args:
            update: from `Taxonomy.extend`, `Taxonomy.prune` or `match_taxonomies`; or the new taxonomy, which is matched.
            names: words for new nodes, by name or full path.

        Returns:
            The update, whose maps carry targets over.

        Raises:
            ValueError: if the update belongs to another taxonomy.
        """
        if not isinstance(update, TaxonomyUpdate):
            update = match_taxonomies(self.tax, update)
        if len(update.old_to_new) != self.tax.num_nodes:
            raise ValueError(
                f"update must start from the {self.tax.num_nodes} nodes of the model, got {len(update.old_to_new)}"
            )
        prompts, same = self.prompts.update(self.tax, update, names)
        with self._evaluating():
            if self.center_text and self.text_center is None:
                self.text_center = self._embed().mean(0)
            self.tax, self.prompts = update.taxonomy, prompts
            if self.text == "cached":
                features = update.transfer(self.node_features)
                changed = [v for v, unchanged in enumerate(same) if not unchanged]
                if changed:
                    fresh = self._centred(self._embed(changed), self.text_center)
                    features[torch.tensor(changed, device=features.device)] = fresh
                self.node_features = features
        if self.temperature is not None:
            levels = torch.arange(self.tax.num_levels, device=self.temperature.device)
            self.temperature = self.temperature[levels.clamp(max=len(self.temperature) - 1)]
        return update

    @contextmanager
    def disable_adapter(self) -> Iterator["HierLoraCLIP"]:
        """Score as the base model does, inside a `with` block: LoRA, trained heads and the trained scale are set aside."""
        if self.adapter is None:
            yield self
            return
        scale, bias = self.dual_encoder.logit_scale.data, self.logit_bias
        with self.adapter.disable_adapter():
            try:
                self.dual_encoder.logit_scale.data = self.base_logit_scale.to(scale)
                self.logit_bias = None
                yield self
            finally:
                self.dual_encoder.logit_scale.data, self.logit_bias = scale, bias

    def merge_and_unload(self) -> "HierLoraCLIP":
        """Add the update to the base weights, which saves its time in every pass; in place, cannot be undone.

        The merged model predicts as before but has no adapter to save: save it first. `save_merged` writes the weights.

        Returns:
            The model itself.
        """
        if self.adapter is not None:
            self.adapter.merge_and_unload()
            object.__setattr__(self, "adapter", None)
            self.dual_encoder.requires_grad_(False)
            self.merged = True
        return self

    def _prepare(self, picture: object, index: int) -> Tensor:
        if isinstance(picture, np.ndarray):
            if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
                raise ValueError(
                    f"pictures[{index}] must be uint8 of shape (H, W, 3), got {picture.dtype} of shape {picture.shape}"
                )
        elif not isinstance(picture, Image.Image):
            raise ValueError(f"pictures[{index}] must be a PIL picture or a uint8 array, got {type(picture).__name__}")
        else:
            picture = ImageOps.exif_transpose(picture)
        if self.picture_size is not None:
            picture = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
            picture = ImageOps.fit(
                picture.convert("RGB"), (self.picture_size, self.picture_size), Image.Resampling.BICUBIC
            )
        return self.dual_encoder.preprocess(picture)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the adapter in peft's format, and beside it the taxonomy, the prompts, the text features and a model card.

        The base model's weights are not written: the locator names where they come from. The folder can be uploaded to a
        hub as it is.

        Raises:
            ValueError: if the base model has no locator, or the adapter was merged into it.
        """
        saving.save(self, Path(folder))

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Upload what `save_pretrained` writes to a repository of the Hugging Face hub, made if it does not exist.

        Args:
            repo_id: "owner/name".
            private: for a new repository; None takes the owner's default.
            token: with the right to write; None takes the one that `huggingface_hub` has stored.

        Returns:
            The address of the commit.

        Raises:
            ValueError: as `save_pretrained`.
        """
        return saving.push(self, repo_id, private, token)

    def save_merged(self, folder: str | Path) -> None:
        """Write the weights after `merge_and_unload` in the format of their own library, which needs neither peft nor this one.

        `CLIPModel.from_pretrained(folder)` reads those of transformers, `open_clip.create_model(..., pretrained=folder +
        "/open_clip_model.safetensors")` those of open_clip. Taxonomy and prompts are not among them.

        Raises:
            ValueError: before `merge_and_unload`, or if the dual encoder has no `save_merged` of its own.
        """
        if not self.merged:
            raise ValueError("the adapter must be merged into the base model: call merge_and_unload before save_merged")
        if not hasattr(self.dual_encoder, "save_merged"):
            kind = type(self.dual_encoder).__name__
            raise ValueError(f"model must have `save_merged` to write its weights, got {kind}: save its state_dict")
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.dual_encoder.save_merged(Path(folder))

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, model: nn.Module | None = None, *, trainable: bool = False
    ) -> "HierLoraCLIP":
        """Load what `save_pretrained` wrote.

        Args:
            folder: the folder; or "hf:owner/name", a repository of the Hugging Face hub.
            model: the base model; loaded through the stored locator if None.
            trainable: leave the adapter open for more training, such as a few pictures of new classes.

        Returns:
            The model in evaluation mode.

        Raises:
            ValueError: if a file is missing or damaged; the message names it.
        """
        return saving.load(cls, folder, model, trainable)
