"""Run pictures through a model: frozen features, embeddings, logits, and the nearest-neighbour control."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from app_data.read.pictures import PictureSet
from app_data.store.features import cached_features, weights_digest
from app_data.store.progress import progress
from hier_lora import HierLoraCLIP
from hier_losses import Taxonomy
from hier_losses.probabilities import leaf_to_node_logits

BATCH = 64


@torch.inference_mode()
def run_batches(
    data: PictureSet, forward: Callable[[Tensor], Tensor], label: str, check: Callable[[], None] = lambda: None
) -> Tensor:
    """Apply `forward` to all pictures, batch by batch; uint8 (b, 3, H, W) goes in, the results are joined on the CPU.

    Args:
        data: the pictures.
        forward: from a batch of pictures to one row each.
        label: shown with the progress.
        check: called after every batch; it may raise to stop.
    """
    found = []
    for start in progress(range(0, len(data), BATCH), label):
        found.append(forward(data.batch(range(start, min(start + BATCH, len(data))))).float().cpu())
        check()
    return torch.cat(found)


def prepare(base: nn.Module, batch: Tensor) -> Tensor:
    """Preprocess a uint8 batch (b, 3, H, W) as the base model wants it: at once if it can, else picture by picture."""
    if getattr(base, "preprocesses_batches", False):
        return base.preprocess(batch)
    return torch.stack([base.preprocess(picture.permute(1, 2, 0).contiguous().numpy()) for picture in batch])


def frozen_tower(base: nn.Module) -> Callable[[Tensor], Tensor]:
    """The picture tower for reading features, which nothing trains: before the projection if that stands apart."""
    if hasattr(base, "frozen_vision"):
        return base.frozen_vision()
    return base.vision if hasattr(base, "vision") else base.encode_image


def tower_features(
    base: nn.Module,
    data: PictureSet,
    label: str,
    cache_dir: Path | None = None,
    check: Callable[[], None] = lambda: None,
) -> Tensor:
    """Features of the picture tower, (n, d), from the cache if they are there: before the projection if it stands apart.

    Args:
        base: a dual encoder; without a tower `vision` its embeddings are the features.
        data: the pictures.
        label: shown with the progress.
        cache_dir: where features are kept; the user's cache folder if None.
        check: called after every batch; it may raise to stop.
    """
    base.eval()
    tower, forward = getattr(base, "vision", base), frozen_tower(base)
    device = next(tower.parameters()).device

    def compute(start: int, end: int) -> Tensor:
        part = data.select(range(start, end))
        return run_batches(part, lambda x: forward(prepare(base, x).to(device)), label, check)

    weights = weights_digest(forward if isinstance(forward, nn.Module) else tower)
    key = f"tower {weights} {device.type} {data.fingerprint}"
    # 512 rows are eight whole batches: pieces change no number.
    return cached_features(key, compute, len(data), cache_dir, piece=8 * BATCH)


def embedding(base: nn.Module) -> Callable[[Tensor], Tensor]:
    """From centred features of `tower_features` to unit vectors in the space of the words."""
    projection = getattr(base, "projection", None) if hasattr(base, "vision") else None
    if projection is None:
        return lambda x: F.normalize(x, dim=-1)
    weight = projection.weight.detach().cpu()
    return lambda x: F.normalize(x @ weight.T, dim=-1)


def node_logits(
    model: HierLoraCLIP,
    data: PictureSet,
    *,
    centred: bool = False,
    label: str = "scoring",
    check: Callable[[], None] = lambda: None,
) -> Tensor:
    """Logits of all nodes for all pictures, (n, N).

    Args:
        model: the model.
        data: the pictures.
        centred: subtract the mean embedding of these pictures first. A new artist shifts all pictures alike; the mean of
            the set takes that shift out and uses no label, but it needs the whole set.
        label: shown with the progress.
        check: called after every batch; it may raise to stop.
    """
    model.eval()
    base = model.dual_encoder
    device = base.logit_scale.device
    embedded = run_batches(data, lambda x: base.encode_image(prepare(base, x).to(device)), label, check)
    if centred:
        embedded = embedded - embedded.mean(0)
    with torch.inference_mode():
        return model.score(F.normalize(embedded, dim=-1).to(device)).cpu()


def neighbour_logits(train: Tensor, train_targets: Tensor, test: Tensor, tax: Taxonomy) -> Tensor:
    """The control without text: cosine to the nearest training picture of each leaf, each picture set centred.

    Returns:
        Scores of all nodes (n, N): 100 times the cosines at the leaves (so sharp that sums over leaves follow the nearest
        picture), their log-sum-exp above.
    """
    a, b = F.normalize(train - train.mean(0), dim=-1), F.normalize(test - test.mean(0), dim=-1)
    similarity = b @ a.T
    leaf = tax.leaf_index[train_targets]
    best = torch.full((len(test), tax.num_leaves), -1.0)
    best = best.scatter_reduce(1, leaf.expand(len(test), -1), similarity, "amax")
    return leaf_to_node_logits(100 * best, tax)
