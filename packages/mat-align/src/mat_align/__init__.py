"""Modality Alignment across Trees (not yet implemented)."""

from mat_align.__about__ import __version__

__all__ = ["__version__"]
