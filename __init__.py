"""Merge the feed-forward sublayers of a Transformer and ship the shared weights once."""

__version__ = "0.1.0"
