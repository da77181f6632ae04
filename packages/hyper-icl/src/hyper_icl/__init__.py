"""In-context learning with hyperbolic anchors (not yet implemented)."""

from hyper_icl.__about__ import __version__

__all__ = ["__version__"]
