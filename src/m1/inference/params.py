"""What a client asks of the engine: prompts, sampling parameters, and what comes back."""

import math
from dataclasses import dataclass, field

from m1.config.schema import RepetitionStopConfig, SamplingConfig
from m1.types import M1Error, RoutedExperts

MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen and when they end.

    The random stream of a completion is a function of its seed alone.
    """

    max_new_tokens: int
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    """Nucleus mass."""
    top_k: int = 0
    """Most likely tokens to choose from; 0 for all."""
    min_p: float = 0.0
    """Least probability relative to the most likely token's."""
    stop_tokens: tuple[int, ...] = ()
    """Ids that end a completion, as its last token."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end a completion; the engine needs a tokenizer."""
    top_logprobs: int = 0
    """Most likely tokens to report at every place."""
    repetition: RepetitionStopConfig = field(default_factory=RepetitionStopConfig)
    """Early truncation (paper sec. 3.2)."""

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            M1Error: Names each that cannot be.
        """
        checks = (
            (self.max_new_tokens >= 1, "max_new_tokens", "must be at least 1"),
            (0 <= self.temperature < math.inf, "temperature", "must be 0 or more, and finite"),
            (0 < self.top_p <= 1, "top_p", "must be above 0 and at most 1"),
            (self.top_k >= 0, "top_k", "must be 0 (all) or more"),
            (0 <= self.min_p <= 1, "min_p", "must be between 0 and 1"),
            (
                0 <= self.top_logprobs <= MAX_TOP_LOGPROBS,
                "top_logprobs",
                f"must be between 0 and {MAX_TOP_LOGPROBS}",
            ),
            (all(self.stop_strings), "stop_strings", "must not hold an empty text"),
        )
        wrong = [
            f"{name} is {getattr(self, name)!r}, but {why}" for ok, name, why in checks if not ok
        ]
        if wrong:
            raise M1Error("; ".join(wrong) + "; change it")

    @classmethod
    def of(
        cls,
        config: SamplingConfig,
        *,
        stop_token: int,
        repetition: RepetitionStopConfig | None = None,
    ) -> "SamplingParams":
        """The parameters that a recipe's table stands for."""
        return cls(
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            min_p=config.min_p,
            stop_tokens=(stop_token,),
            repetition=repetition or RepetitionStopConfig(),
        )


@dataclass(frozen=True)
class TokenOutput:
    """One token of one completion, as soon as there is one."""

    index: int
    """Which completion of the request."""
    token: int
    logprob: float
    """Natural log-probability before temperature and filters."""
    sampling_logprob: float
    """The same after them: of the distribution it was drawn from."""
    entropy: float
    """Nats, before temperature and filters."""
    policy_version: int
    top: tuple[tuple[int, float], ...] = ()
    """Most likely ids with their log-probabilities before temperature, the likeliest first."""
    finish_reason: str | None = None
    """On the last token: `stop`, `length`, `repetition`, or `cancelled`."""
    stop_string: str | None = None
    """The stop string that ended it."""
    routed_experts: RoutedExperts | None = None
    """On the last token, of all of them, where the engine records them."""
