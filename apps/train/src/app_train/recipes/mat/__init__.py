"""Modality Alignment across Trees."""
