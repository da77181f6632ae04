"""The version of hier-lora."""

__version__ = "0.1.0"
