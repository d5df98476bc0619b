"""Pretraining, SFT and RL."""
