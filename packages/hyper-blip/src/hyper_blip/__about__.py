"""The version of hyper-blip."""

__version__ = "0.1.0"
