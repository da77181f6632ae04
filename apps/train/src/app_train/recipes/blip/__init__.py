"""Hyperbolic BLIP-2."""
