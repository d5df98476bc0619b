"""Container images: how they are locked, built and described."""
