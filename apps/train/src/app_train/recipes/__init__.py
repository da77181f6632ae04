"""Recipes: small functions that turn settings into a run."""
