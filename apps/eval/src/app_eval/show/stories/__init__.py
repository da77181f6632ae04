"""What each results page tells: rows, columns and claims as data."""
