"""M1: an open system for training long-thinking models, after MiniMax-M1 (arXiv 2506.13585)."""

__version__ = "0.1.0"
