"""The reward service: verdicts from killable worker processes."""
