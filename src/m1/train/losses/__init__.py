"""Losses of RL as pure functions of tensors; each cites its equation in arXiv 2506.13585 ("M1").

`policy`: the unified objective. `settings`: CISPO, REINFORCE, PPO, GRPO, DAPO and GSPO as settings
of it. `aggregation`: what a token weighs in a batch.
"""

from m1.train.losses.aggregation import token_weights
from m1.train.losses.policy import PolicyLoss, Sequences, policy_loss
from m1.train.losses.settings import LossSettings, settings_of

__all__ = [
    "LossSettings",
    "PolicyLoss",
    "Sequences",
    "policy_loss",
    "settings_of",
    "token_weights",
]
