"""The version of hyper-icl."""

__version__ = "0.1.0"
