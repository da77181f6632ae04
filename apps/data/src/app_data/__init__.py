"""Data sets and pretrained backbones."""

from app_data.__about__ import __version__

__all__ = ["__version__"]
