"""Competitive programs against tests (paper sec. 4.1), and the tests themselves."""
