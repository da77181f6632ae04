"""Miniature pictures, data sets in released formats, and random weights that several tests share."""
