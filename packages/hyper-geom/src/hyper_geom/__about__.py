"""The version of hyper-geom."""

__version__ = "0.1.0"
