"""Train two small encoders on synthetic pairs: contrastive and entailment loss with a learnable curvature.

    python packages/hyper-geom/examples/contrastive_step.py

Every general concept ("text") owns several specific items ("images"). The contrastive loss brings each item to its
concept, and the entailment loss asks the item to lie in the concept's cone, farther from the origin.
"""

import argparse

import torch
from torch import nn

from hyper_geom import Curvature, distance_info_nce, entailment_loss, is_entailed, lorentz


class Encoder(nn.Module):
    """Features to tangent vectors at the origin, with a learned length scale."""

    def __init__(self, num_features: int, dim: int, scale: float) -> None:
        """Start with tangent vectors of length about `scale`."""
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(num_features, 64), nn.GELU(), nn.Linear(64, dim))
        self.log_scale = nn.Parameter(torch.tensor(scale / dim**0.5).log())

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Tangent vectors (n dim)."""
        return self.layers(features) * self.log_scale.exp()


def main() -> None:
    """Run the steps and print the losses, the curvature and what was learned."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--weight", type=float, default=2.0, help="of the entailment loss")
    options = parser.parse_args()
    torch.manual_seed(0)
    num_concepts, num_features, batch_size = 256, 32, 128
    concepts = torch.randn(num_concepts, num_features)

    text, image = Encoder(num_features, 16, 0.3), Encoder(num_features, 16, 1.0)
    curvature = Curvature(1.0)
    log_logit_scale = nn.Parameter(torch.tensor(10.0).log())
    weights = [p for module in (text, image) for p in module.parameters() if p.ndim == 2]
    others = [p for module in (text, image) for p in module.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": weights},
            # Scales and the curvature are not shrunk towards zero.
            {"params": [*others, log_logit_scale, *curvature.parameters()], "weight_decay": 0.0},
        ],
        lr=3e-3,
    )

    def losses(rows: torch.Tensor):
        u = text(concepts[rows])
        v = image(concepts[rows] + 0.5 * torch.randn(len(rows), num_features))
        c = curvature()
        match = distance_info_nce(u, v, c=c, logit_scale=log_logit_scale.exp(), inputs="tangent0")
        parent, child = lorentz.exp_map0(u, c=c), lorentz.exp_map0(v, c=c)
        return match, entailment_loss(parent, child, c=c), parent, child

    for step in range(options.steps):
        rows = torch.randperm(num_concepts)[:batch_size]
        match, cone, _, _ = losses(rows)
        optimizer.zero_grad()
        (match + options.weight * cone).backward()
        optimizer.step()
        curvature.clamp_()
        if step % 50 == 0 or step == options.steps - 1:
            print(
                f"step {step:4d}  contrastive {match.item():.3f}  entailment {cone.item():.3f}  c {curvature().item():.3f}"
            )

    with torch.no_grad():
        _, _, parent, child = losses(torch.arange(num_concepts))
        c = curvature()
        found = lorentz.pairwise_dist(child, parent, c=c).argmin(dim=1) == torch.arange(num_concepts)
        inside = is_entailed(parent, child, c=c)
        print(
            f"items that find their concept: {found.float().mean():.1%}; inside its cone: {inside.float().mean():.1%}"
        )
        print(
            f"mean distance from the origin: concepts {lorentz.dist0(parent, c=c).mean():.2f}, "
            f"items {lorentz.dist0(child, c=c).mean():.2f}"
        )


if __name__ == "__main__":
    main()
