"""Named objectives as settings of the unified one (M1 Eq. 6-7)."""

from dataclasses import dataclass, replace

from m1.config.schema import LossConfig


@dataclass(frozen=True)
class LossSettings:
    """What tells one objective from another; see `m1.train.losses.policy`."""

    clip_eps_low: float | None
    """Floor 1 - eps of the importance weight (Eq. 5); None: no floor."""
    clip_eps_high: float | None
    """Ceiling 1 + eps of the importance weight (Eq. 5); None: no ceiling."""
    mask_eps_low: float | None
    """M drops a token with A < 0 and a ratio below 1 - eps (Eq. 7); None: never."""
    mask_eps_high: float | None
    """M drops a token with A > 0 and a ratio above 1 + eps (Eq. 7); None: never."""
    aggregation: str
    """See `m1.train.losses.aggregation`."""
    is_sequence_level: bool = False
    """Whether the ratio is the geometric mean over the completion's tokens (GSPO)."""


PRESETS = {
    # Eq. 4-5: the weight is clamped from above, no token is dropped. The paper tunes eps_high and
    # does not publish it; other systems use a ceiling of 5.
    "cispo": LossSettings(None, 4.0, None, None, "token_mean"),
    # Eq. 3: the weight as it is, and 1/|o_i|.
    "reinforce": LossSettings(None, None, None, None, "sample_mean"),
    # Eq. 1 without its critic: advantages are group-relative here.
    "ppo": LossSettings(None, None, 0.2, 0.2, "sample_mean"),
    # DeepSeekMath (arXiv 2402.03300, Eq. 3): PPO's surrogate with the advantage of Eq. 2; its KL
    # term (0.04 there) is `kl_coefficient`, off here.
    "grpo": LossSettings(None, None, 0.2, 0.2, "sample_mean"),
    # DAPO (arXiv 2503.14476, Eq. 8): clip-higher and a token mean.
    "dapo": LossSettings(None, None, 0.2, 0.28, "token_mean"),
    # GSPO (arXiv 2507.18071, Eq. 5 and 7; clip range of its sec. 5.1).
    "gspo": LossSettings(None, None, 3e-4, 4e-4, "sample_mean", is_sequence_level=True),
}


def settings_of(config: LossConfig) -> LossSettings:
    """The settings that `name` stands for, with what the recipe sets in their place."""
    given = {
        "clip_eps_low": config.clip_eps_low,
        "clip_eps_high": config.clip_eps_high,
        "mask_eps_low": config.mask_eps_low,
        "mask_eps_high": config.mask_eps_high,
        "aggregation": config.aggregation,
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    return replace(PRESETS[config.name], **chosen)  # type: ignore[arg-type]
