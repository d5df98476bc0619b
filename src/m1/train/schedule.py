"""Learning-rate schedule as a function of the step: a resumed run needs no scheduler state."""

import math

from m1.config.schema import ScheduleConfig


def learning_rate(config: ScheduleConfig, *, peak: float, step: int, num_steps: int) -> float:
    """Rate for update `step` (from 0): linear warm-up, constant, then decay (paper sec. 2.1).

    The last step of the decay is `min_lr` exactly.
    """
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    decay_steps = round(config.decay_fraction * num_steps)
    into_decay = step - (num_steps - decay_steps) + 1
    if into_decay <= 0:
        return peak
    progress = min(into_decay / decay_steps, 1.0)
    if config.decay_style == "cosine":
        progress = 0.5 * (1.0 - math.cos(math.pi * progress))
    return peak + (config.min_lr - peak) * progress
