"""The version of mat-align."""

__version__ = "0.1.0"
