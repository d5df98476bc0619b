"""Tables below [rl]: objective, rewards, group filter, rollout workers, alarms."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from m1.config.base import (
    Config,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    refuse,
)


class LossConfig(Config):
    """Policy loss: the unified objective (paper Eq. 6-7), set by a name and what differs from it.

    | name | weight | trust region M | mean |
    |---|---|---|---|
    | `cispo` (Eq. 4-5) | at most 1 + 4 | none | token |
    | `reinforce` (Eq. 3) | as it is | none | sample |
    | `ppo` (Eq. 1), `grpo` | as it is | 0.2 / 0.2 | sample |
    | `dapo` | as it is | 0.2 / 0.28 | token |
    | `gspo` | as it is, of the sequence | 3e-4 / 4e-4 | sample |
    """

    name: Literal["cispo", "reinforce", "ppo", "grpo", "dapo", "gspo"] = "cispo"
    """Objective. All use group-relative advantages (Eq. 2), so `ppo` is without its critic and
    equals `grpo`."""
    clip_eps_high: PositiveFloat | None = None
    """Ceiling 1 + clip_eps_high of the importance weight (Eq. 5); absent: by name. 4 for CISPO is
    ours, as the paper does not publish its own."""
    clip_eps_low: PositiveFloat | None = None
    """Floor 1 - clip_eps_low; absent: no lower bound, as in the paper."""
    mask_eps_high: PositiveFloat | None = None
    """Tokens with a positive advantage and a ratio above 1 + this are dropped (Eq. 7); absent: by
    name."""
    mask_eps_low: PositiveFloat | None = None
    """Tokens with a negative advantage and a ratio below 1 - this are dropped (Eq. 7); absent: by
    name."""
    aggregation: Literal["token_mean", "prompt_mean", "sample_mean", "sample_token_mix"] | None = (
        None
    )
    """`token_mean`: one mean over the batch's tokens; `prompt_mean`: Eq. 4 read literally, a token
    mean within each group, averaged over prompts; `sample_mean`: a token mean within each
    completion, averaged over these; `sample_token_mix`: of the first and the third, our reading of
    sec. 5. Absent: by name."""
    sample_share: Fraction = 0.5
    """Share of the sample mean in `sample_token_mix`."""
    kl_coefficient: NonNegativeFloat = 0.0
    """Weight of the KL divergence from the weights that the stage began with; 0: no such term, as
    in the paper."""
    behaviour_cap: PositiveFloat | None = None
    """Truncated importance sampling: tokens also weigh min(pi_old / pi_behaviour, this), which
    corrects for an engine that computes, or is, another policy than the trainer; absent: 1."""


class RewardConfig(Config):
    """Weights of the reward's parts. The filter of groups sees correctness alone."""

    correctness: NonNegativeFloat = 1.0
    """Weight of a correct final answer."""
    format: NonNegativeFloat = 0.1
    """Weight of the think and answer tags in order, exactly once."""
    overlong: NonNegativeFloat = 0.0
    """Weight of DAPO's soft penalty of long completions, which M1 keeps: 0 up to max_new_tokens -
    overlong_tokens, then linear to -1."""
    overlong_tokens: PositiveInt | None = None
    """Width of its linear part; needed where `overlong` is not 0."""

    @model_validator(mode="after")
    def _penalty_has_width(self) -> Self:
        if self.overlong and self.overlong_tokens is None:
            refuse(
                [
                    f"overlong is {self.overlong}, but there is no overlong_tokens, over which the "
                    "penalty grows; set it, for example to a fifth of max_new_tokens"
                ]
            )
        return self


class DynamicSamplingConfig(Config):
    """Keep groups whose accuracy, not shaped reward, is neither 0 nor 1 (DAPO, kept by M1)."""

    enabled: bool = True
    """Whether to filter."""
    max_extra_batches: NonNegativeInt = 2
    """Further generation batches allowed per step to fill the prompt batch."""


class AdvantageConfig(Config):
    """Advantages relative to the group (paper Eq. 2)."""

    scale: Literal["group_std", "batch_std", "none"] = "group_std"
    """What R - mean R is divided by: the group's standard deviation (Eq. 2), that of all the
    batch's, or nothing."""


class RewardServiceConfig(Config):
    """Verdicts from killable processes: for all verifiers but logic puzzles and reasoning-gym."""

    num_workers: NonNegativeInt = 0
    """Worker processes; 0: one for each core."""
    num_retries: NonNegativeInt = 1
    """Further attempts after an infrastructure failure."""
    timeout_scale: PositiveFloat = 1.0
    """Multiplies every verifier's time."""


class RolloutConfig(Config):
    """Who samples, and how far ahead of the trainer."""

    mode: Literal["sync", "async"] = "sync"
    """`sync`: the trainer waits for every batch, and equal recipes give equal bits where the engine
    is the trainer's own. `async`: workers sample while the trainer updates."""
    num_workers: NonNegativeInt = 0
    """`m1 serve` processes that the stage starts beside itself, each with its own copy of the
    weights; 0: the engine in the trainer's process, or `urls`."""
    urls: tuple[str, ...] = ()
    """Running `m1 serve`s of the same model, which must be able to read the stage's folder.
    `dns+http://NAME:PORT` stands for all that the name resolves to, now and later; `cluster` for
    those of `resources.rollout`."""
    max_policy_lag: PositiveInt | None = None
    """Largest difference in policy versions (updates) between the weights that begin to train on a
    token and those that sampled it; older groups are dropped. Absent in `async`: two batches'
    updates."""
    queue_groups: PositiveInt | None = None
    """Finished groups that may wait in `async`; absent: one batch."""
    on_update: Literal["continue", "recompute"] = "continue"
    """Completions under way at an update go on from the states of the old weights, or from states
    made again with the new ones."""
    worker_sequences: PositiveInt = 64
    """Completions that a started worker decodes together."""
    worker_cache_gib: PositiveFloat | None = None
    """Memory of a started worker for keys and values; absent: 2 GiB on a CPU, and most of what is
    free on a GPU, which is too much where the trainer is on the same one."""
    worker_devices: tuple[str, ...] = ()
    """CUDA_VISIBLE_DEVICES of each started worker; absent: the trainer's."""
    timeout_seconds: PositiveFloat = 3600.0
    """Of one group; then its worker counts as dead."""
    max_attempts: PositiveInt = 4
    """Workers that a group is tried on before the stage ends."""

    @property
    def has_workers(self) -> bool:
        """Whether others than the trainer's process sample."""
        return bool(self.num_workers or self.urls)

    @model_validator(mode="after")
    def _async_has_workers(self) -> Self:
        texts = []
        if self.mode == "async" and not self.has_workers:
            texts.append(
                "mode is 'async', but there are neither num_workers nor urls, so nobody could "
                "sample while the trainer updates; set num_workers to 1 or more"
            )
        if self.worker_devices and len(self.worker_devices) != self.num_workers:
            texts.append(
                f"worker_devices has {len(self.worker_devices)} entries, but num_workers is "
                f"{self.num_workers}; name the devices of every worker"
            )
        if self.num_workers and self.urls:
            texts.append(
                f"num_workers is {self.num_workers} and there are urls, but workers are either "
                "started or given; leave one out"
            )
        refuse(texts)
        return self


MONITORS = (
    "accuracy",
    "clip_fraction",
    "completion_length_tokens",
    "entropy_nats",
    "failed_fraction",
    "gradient_share_rare",
    "grad_norm",
    "kl_nats",
    "mismatch_kl_nats",
    "mismatch_ratio_max",
    "perplexity",
    "policy_lag_max_updates",
    "probability_correlation",
    "repetition_fraction",
    "truncated_fraction",
)
"""Metrics `rl/<name>` that an alarm can watch."""


class AlarmConfig(Config):
    """What happens when a monitor leaves its bounds."""

    monitor: Literal[MONITORS]  # type: ignore[valid-type]
    """Metric `rl/<monitor>` of the step."""
    above: float | None = None
    """Alarm above this."""
    below: float | None = None
    """Alarm below this."""
    action: Literal["warn", "skip", "stop"] = "warn"
    """`skip` leaves the step's updates out where the metric is known before them (all but
    `clip_fraction`, `gradient_share_rare`, `grad_norm` and `kl_nats`, which can warn or stop; see
    `skip_grad_norm`)."""
    patience: Annotated[int, Field(ge=1)] = 1
    """Steps in a row out of bounds before the action is taken."""

    @model_validator(mode="after")
    def _has_bounds(self) -> Self:
        late = ("clip_fraction", "gradient_share_rare", "grad_norm", "kl_nats")
        texts = []
        if self.above is None and self.below is None:
            texts.append(f"monitor {self.monitor} has no bound; set above or below")
        if self.action == "skip" and self.monitor in late:
            texts.append(
                f"action is 'skip', but {self.monitor} is known only after the updates; use 'warn' "
                "or 'stop', or rl.skip_grad_norm"
            )
        refuse(texts)
        return self


DEFAULT_ALARMS = (
    AlarmConfig(monitor="mismatch_kl_nats", above=0.1, action="skip"),
    AlarmConfig(monitor="probability_correlation", below=0.9),
    AlarmConfig(monitor="entropy_nats", below=0.01, patience=3),
    AlarmConfig(monitor="failed_fraction", above=0.5),
    AlarmConfig(monitor="repetition_fraction", above=0.3, patience=3),
)
