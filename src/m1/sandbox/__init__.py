"""Running programs that nobody trusts: isolated, bounded, and gone when closed."""
