"""Curating tasks for RL: what is dropped, why, and how many (paper sec. 4.1)."""
