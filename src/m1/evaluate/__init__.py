"""Scores, intervals, report."""
