"""The version of hier-losses."""

__version__ = "0.1.0"
