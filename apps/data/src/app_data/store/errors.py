"""The errors a person can meet while loading data: each message is one sentence that names the thing and the remedy."""

from dataclasses import dataclass


class DataError(ValueError):
    """The data on disk (or its description) cannot be used as it is; the message says what to change."""


class DamagedFile(DataError):
    """A file is not as it was written."""


class UnreadablePicture(DataError):
    """One file is no picture, or only a part of one; loaders catch it, count it and go on."""


class TooManyBadFiles(DataError):
    """More files than the stated budget could not be read."""


class MissingAssetError(ImportError):
    """An optional package that carries pictures or weights is not installed; the message says what to install."""


@dataclass(frozen=True)
class Skipped:
    """A file that was left out, and why."""

    path: str
    reason: str
