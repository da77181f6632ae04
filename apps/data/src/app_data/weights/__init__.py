"""Pretrained towers and language models, each behind a locator."""
