"""The engine's Protocol, and the engine in this process."""

from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from m1.config.schema import RepetitionStopConfig, SamplingConfig
from m1.inference.core import EngineCore
from m1.inference.limits import EngineLimits
from m1.inference.params import SamplingParams
from m1.inference.sequences import Sequence
from m1.inference.weights import apply, stage
from m1.types import Completion, M1Error


@dataclass(frozen=True)
class Request:
    """A prompt and the seeds of its completions, one completion a seed."""

    prompt_tokens: tuple[int, ...]
    seeds: tuple[int, ...]


class Engine(Protocol):
    """Tokens in; tokens, log-probabilities and finish reasons out."""

    policy_version: int

    def generate(
        self, requests: Items[Request], sampling: SamplingConfig
    ) -> list[list[Completion]]:
        """Completions of every request, in order of its seeds."""

    def load_weights(self, uri: str, version: int) -> None:
        """Go on with the weights at `uri`; see `m1.inference.weights`.

        Raises:
            M1Error: They are torn, corrupt or another model's, or older; the old ones stay.
        """


class LocalEngine:
    """Engine on a model in this process; sees weight changes as soon as the trainer makes them.

    What it returns is a function of weights, requests and sampling alone, to the last bit: it
    begins every call with an empty cache and the same free slots.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        stop_token: int,
        num_tokens: int,
        repetition_stop: RepetitionStopConfig | None = None,
        max_sequences: int = 512,
        limits: EngineLimits | None = None,
        record_experts: bool = False,
    ) -> None:
        """Wrap a model.

        Args:
            model: A GPTModel from `m1.model.build`.
            stop_token: Id that ends a completion; it is the completion's last token.
            num_tokens: Size of the tokenizer; higher ids are never sampled.
            repetition_stop: Early truncation rule; absent: the paper's.
            max_sequences: Completions decoded together.
            limits: Sizes, beside `max_sequences`; absent: pages for all of them at once.
            record_experts: Whether completions say which experts computed their tokens.
        """
        self.model = model
        self.stop_token = stop_token
        self.num_tokens = num_tokens
        self.repetition_stop = repetition_stop or RepetitionStopConfig()
        self.max_sequences = max_sequences
        self.policy_version = 0
        self._limits, self._record_experts = limits, record_experts
        self._max_position: int = model.max_sequence_length  # type: ignore[assignment]
        self._core: EngineCore | None = None

    def generate(
        self, requests: Items[Request], sampling: SamplingConfig
    ) -> list[list[Completion]]:
        """Completions of every request, in order of its seeds.

        Raises:
            M1Error: A prompt and its completion can exceed the positions of the model.
        """
        if not requests:
            return []
        params = SamplingParams.of(
            sampling, stop_token=self.stop_token, repetition=self.repetition_stop
        )
        core = self._prepared(requests, params)
        groups = [core.add(r.prompt_tokens, params, r.seeds) for r in requests]
        while not core.is_idle:
            core.step()
        return [[completion(sequence) for sequence in group] for group in groups]

    def load_weights(self, uri: str, version: int) -> None:
        """Copy the weights at `uri` into the model; see `m1.inference.weights`.

        Raises:
            M1Error: They are torn, corrupt or another model's, or older; the old ones stay.
        """
        require_newer(version, self.policy_version)
        apply(stage(uri, self.model), self.model)
        self.policy_version = version

    def _prepared(self, requests: Items[Request], params: SamplingParams) -> EngineCore:
        limits = replace(self._limits or EngineLimits(), record_experts=self._record_experts)
        # More slots and pages than are wanted change nothing, not even bits.
        slots = min(self.max_sequences, sum(len(r.seeds) for r in requests))
        limits = replace(limits, num_slots=slots)
        if self._limits is None:
            longest = max(len(r.prompt_tokens) for r in requests) + params.max_new_tokens
            longest = min(longest, self._max_position)
            limits = replace(limits, num_pages=(slots + 1) * -(-longest // limits.page_size))
        core = self._core
        if core is None or not _holds(core.limits, limits):
            core = EngineCore(self.model, num_tokens=self.num_tokens, limits=limits)
            self._core = core
        core.weights_changed(version=self.policy_version, recompute=False)
        return core


def _holds(large: EngineLimits, small: EngineLimits) -> bool:
    return large.num_slots >= small.num_slots and large.num_pages >= small.num_pages


def require_newer(version: int, current: int) -> None:
    """Raise unless a policy version may follow another."""
    if version < current:
        raise M1Error(
            f"version is {version}, but the engine is at {current}; versions never go back"
        )


def completion(sequence: Sequence) -> Completion:
    """A finished sequence as the rest of the house knows it."""
    assert sequence.finish_reason is not None
    return Completion(
        prompt_tokens=sequence.prompt,
        tokens=tuple(sequence.tokens),
        logprobs=tuple(sequence.logprobs),
        entropies=tuple(sequence.entropies),
        finish_reason=sequence.finish_reason,
        policy_versions=tuple(sequence.versions),
        routed_experts=sequence.routed_experts,
    )
