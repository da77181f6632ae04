"""BLIP-2 with hyperbolic embeddings (not yet implemented)."""

from hyper_blip.__about__ import __version__

__all__ = ["__version__"]
