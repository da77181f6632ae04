"""Evaluation, prediction and reports."""

from app_eval.__about__ import __version__

__all__ = ["__version__"]
