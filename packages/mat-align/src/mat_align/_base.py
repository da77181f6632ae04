"""What both models share: the head at work on encoded pictures and labels, alone or over several processes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn

from mat_align.head import MATHead, PathFeatures
from mat_align.variants import Variant


class MATOutput(NamedTuple):
    """What a forward pass returns.

    Attributes:
        logits: (B, n), one per picture and name.
        tokens: (B, M, d) layer tokens.
        text: (n, d) text features, not normalised.
        paths: features along the paths that were asked for.
        curvatures: c_img, c_txt and c_mid of the batch, with `paths`.
        frozen: (B, d) picture and (k, d) text features of the frozen model, with `reference`.
    """

    logits: Tensor
    tokens: Tensor
    text: Tensor
    paths: PathFeatures | None = None
    curvatures: tuple[Tensor, Tensor, Tensor] | None = None
    frozen: tuple[Tensor, Tensor] | None = None


def gather(x: Tensor, group: Any) -> Tensor:
    """The rows of all processes in rank order; alone, x itself.

    Every process goes on to compute the loss of all rows. The gradient of its own rows is that loss's, times the number
    of processes: the mean over processes that DistributedDataParallel takes is then their sum.
    """
    if group is None:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.detach().contiguous(), group=group)
    if x.requires_grad:
        parts[dist.get_rank(group)] = x.detach() + len(parts) * (x - x.detach())
    return torch.cat(parts)


class TreeModel(nn.Module):
    """What both models have: a head, and the names of its curvatures at the top."""

    head: MATHead

    @property
    def variant(self) -> Variant:
        """What is computed."""
        return self.head.variant

    @property
    def c_img(self) -> nn.Module | None:
        """Curvature of the image manifold, a `hyper_geom.Curvature`; None if the variant has none."""
        return self.head.c_img

    @property
    def c_txt(self) -> nn.Module | None:
        """Curvature of the text manifold, a `hyper_geom.Curvature`; None if the variant has none."""
        return self.head.c_txt

    def c_mid(self, norm_img: float | Tensor = 1.0, norm_txt: float | Tensor = 1.0) -> Float[Tensor, ""]:
        """See `MATHead.c_mid`."""
        return self.head.c_mid(norm_img, norm_txt)

    def score(self, tokens: Float[Tensor, "B M d"], text: Float[Tensor, "n d"]) -> Float[Tensor, "B n"]:
        """Logits of labels for pictures that are encoded already."""
        return self.head.logits(tokens, text, self.logit_scale)

    def forward(
        self,
        images: Tensor,
        names: Sequence[str],
        paths: Int[Tensor, "B H"] | None = None,
        length: Int[Tensor, " B"] | None = None,
        reference: Sequence[str] | None = None,
        group: Any = None,
    ) -> MATOutput:
        """Encode pictures and labels once and score all pairs: all that trains takes part here, for wrappers such as DDP.

        Args:
            images: what `encode_image` takes.
            names: texts of the labels.
            paths: rows of `names`, the nodes on each picture's path, for its features and the curvatures.
            length: number of nodes on each path.
            reference: labels whose features of the frozen model are wanted too.
            group: processes whose pictures are scored too, equally many in each; `paths` and `length` are then of all.
        """
        tokens, text = gather(self.encode_image(images), group), self.encode_text(names)
        found = curvatures = frozen = None
        if reference is not None:
            frozen = gather(self.frozen_image(images).float(), group), self.frozen_text(reference)
        # Towers may run in half precision; cosines and curvatures may not.
        with torch.autocast(tokens.device.type, enabled=False):
            if paths is not None and length is not None:
                found = self.head.path_features(tokens, text[paths])
                curvatures = self.head.curvatures(found, length)
            return MATOutput(self.score(tokens, text), tokens, text, found, curvatures, frozen)
