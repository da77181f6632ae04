"""The version of app-eval."""

__version__ = "0.1.0"
