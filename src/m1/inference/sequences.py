"""What the scheduler moves between its queues: sequences, and prompts on their way to one."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from m1.inference.cache import Swapped
from m1.inference.params import SamplingParams, TokenOutput
from m1.inference.sampler import RandomStream
from m1.types import RoutedExperts

Order = tuple[int, int]
"""Arrival of the request, number of the completion: who was there first is served first."""


@dataclass(eq=False, slots=True)
class Sequence:
    """One completion in the making."""

    order: Order
    prompt: tuple[int, ...]
    params: SamplingParams
    random: RandomStream
    on_token: Callable[[TokenOutput], None] | None = None
    on_end: "Callable[[Sequence], None] | None" = None
    detokenizer: Any = None
    """`m1.inference.stopping.StopText`, where there are stop strings."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampling_logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    streak: int = 0
    """Tokens in a row above the repetition stop's probability."""
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    length: int = 0
    """Tokens whose states and keys are in the cache: all but the newest, while it runs."""
    saved: Swapped | None = None
    """The cache's content while it is preempted."""
    routed_experts: RoutedExperts | None = None
    """Once it has finished, where they are recorded."""
    finish_reason: str | None = None
    stop_string: str | None = None

    def newest(self, top: tuple[tuple[int, float], ...]) -> TokenOutput:
        """The last token; `top` are likely ones at its place with their log-probabilities."""
        return TokenOutput(
            index=self.order[1],
            token=self.tokens[-1],
            logprob=self.logprobs[-1],
            sampling_logprob=self.sampling_logprobs[-1],
            entropy=self.entropies[-1],
            policy_version=self.versions[-1],
            top=top[: self.params.top_logprobs],
            finish_reason=self.finish_reason,
            stop_string=self.stop_string,
            routed_experts=self.routed_experts,
        )


@dataclass(eq=False, slots=True)
class Prefill:
    """Tokens that enter the cache once, for one or more sequences that begin after them."""

    tokens: tuple[int, ...]
    children: list[Sequence]
    """Not yet begun, in order."""
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    done: int = 0
    """Tokens in the cache."""
    logits: torch.Tensor | None = None
    """float32 [V] after the last token."""
    version: int = 0
    """Policy that made the logits."""

    @property
    def order(self) -> Order:
        """That of the first sequence that waits for it."""
        return self.children[0].order
