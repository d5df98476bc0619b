"""From raw text and task generators to packed tokens."""
