"""The version of app-data."""

__version__ = "0.1.0"
