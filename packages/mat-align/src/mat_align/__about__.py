"""The version of mat-align."""

__version__ = "0.0.1"
