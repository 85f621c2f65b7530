"""Optimizer state in pages, and AdamW over them."""
