"""Mathematical answers: extraction, and equivalence without evaluating model text."""
