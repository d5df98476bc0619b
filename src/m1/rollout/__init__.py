"""Groups of completions with rewards."""
