"""The version of app-train."""

__version__ = "0.1.0"
