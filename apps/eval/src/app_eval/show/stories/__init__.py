"""What each results page tells: rows, columns and claims as data."""

EMOJI_CREDIT = (
    "Twemoji graphics by Twitter, Inc and other contributors are licensed under CC BY 4.0, OpenMoji under CC BY-SA 4.0, Noto Emoji under "
    "OFL 1.1; no picture is part of this repository."
)
