"""Sampling completions from the model in training, one token at a time from cached states.

Each prompt is prefilled once and its state copied to the completions of its group; then every step
feeds one token per sequence: lightning layers keep a recurrent state of constant size, softmax
layers a key-value cache.
Shapes: B active sequences, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from m1.config.schema import RepetitionStopConfig, SamplingConfig
from m1.inference.sampler import sample, uniforms
from m1.model.packing import LayerState, decode_step, pack
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
        self, requests: Sequence[Request], sampling: SamplingConfig
    ) -> list[list[Completion]]:
        """Completions of every request, in order of its seeds."""


class LocalEngine:
    """Engine on a model in this process; sees weight changes as soon as the trainer makes them."""

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        stop_token: int,
        num_tokens: int,
        repetition_stop: RepetitionStopConfig | None = None,
        max_sequences: int = 512,
    ) -> None:
        """Wrap a model.

        Args:
            model: A GPTModel from `m1.model.build`.
            stop_token: Id that ends a completion; it is the completion's last token.
            num_tokens: Size of the tokenizer; higher ids are never sampled.
            repetition_stop: Early truncation rule; absent: the paper's.
            max_sequences: Completions decoded together.
        """
        self.model = model
        self.stop_token = stop_token
        self.num_tokens = num_tokens
        self.repetition_stop = repetition_stop or RepetitionStopConfig()
        self.max_sequences = max_sequences
        self.policy_version = 0

    @torch.no_grad()
    def generate(
        self, requests: Sequence[Request], sampling: SamplingConfig
    ) -> list[list[Completion]]:
        """Completions of every request, in order of its seeds.

        Raises:
            M1Error: A prompt and its completion can exceed the positions of the model.
        """
        for request in requests:
            self._require_positions(len(request.prompt_tokens), sampling.max_new_tokens)
        was_training = self.model.training
        self.model.eval()
        results: list[list[Completion]] = []
        batch: list[Request] = []
        for request in requests:
            if batch and sum(len(r.seeds) for r in [*batch, request]) > self.max_sequences:
                results += self._generate_batch(batch, sampling)
                batch = []
            batch.append(request)
        if batch:
            results += self._generate_batch(batch, sampling)
        self.model.train(was_training)
        return results

    def _require_positions(self, num_prompt: int, max_new_tokens: int) -> None:
        limit: int = self.model.max_sequence_length  # type: ignore[assignment]
        if num_prompt + max_new_tokens > limit:
            raise M1Error(
                f"a prompt of {num_prompt} tokens and sampling.max_new_tokens {max_new_tokens} "
                f"exceed model.max_position {limit}; lower max_new_tokens, shorten the prompts, or "
                "raise max_position"
            )

    def _generate_batch(
        self, requests: Sequence[Request], sampling: SamplingConfig
    ) -> list[list[Completion]]:
        batch = _Batch(requests, sampling, self.repetition_stop, self.stop_token)
        longest = max(len(r.prompt_tokens) for r in requests) + sampling.max_new_tokens
        logits, states = self._prefill(requests, longest)
        states = _select(states, batch.request_of_row)
        logits = logits[batch.request_of_row]
        while True:
            chosen = sample(logits, batch.next_uniform(), sampling, num_tokens=self.num_tokens)
            keep = batch.record(chosen.tokens, chosen.logprobs, chosen.entropies)
            if not keep.any():
                break
            tokens = chosen.tokens
            if keep.sum() < 0.8 * len(keep):
                states, tokens = _select(states, keep.nonzero().squeeze(1)), tokens[keep]
                batch.compact(keep)
            step = decode_step(batch.positions(), states, max_length=longest)
            logits = self.model(tokens[None], step.positions[None], None, packed_seq_params=step)[0]
        return batch.completions(self.policy_version)

    def _prefill(
        self, requests: Sequence[Request], longest: int
    ) -> tuple[torch.Tensor, dict[int, LayerState]]:
        """Logits [N, V] after each prompt, and the states with room for `longest` tokens."""
        lengths = torch.tensor([len(r.prompt_tokens) for r in requests])
        tokens = torch.tensor([t for r in requests for t in r.prompt_tokens])
        states: dict[int, LayerState] = {}
        packing = pack(lengths, states=states)
        logits = self.model(tokens[None], packing.positions[None], None, packed_seq_params=packing)[
            0
        ]
        for state in states.values():
            if state.keys is not None and state.values is not None:
                room = (0, 0, 0, 0, 0, longest - state.keys.shape[1])
                state.keys, state.values = F.pad(state.keys, room), F.pad(state.values, room)
        return logits[lengths.cumsum(0) - 1], states


def _select(states: dict[int, LayerState], rows: torch.Tensor) -> dict[int, LayerState]:
    def pick(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x[rows]

    return {
        layer: LayerState(pick(s.recurrent), pick(s.keys), pick(s.values))
        for layer, s in states.items()
    }


class _Batch:
    """Bookkeeping of completions decoded together; rows are those still in the model's batch."""

    def __init__(
        self,
        requests: Sequence[Request],
        sampling: SamplingConfig,
        repetition: RepetitionStopConfig,
        stop_token: int,
    ) -> None:
        self.requests, self.stop_token, self.repetition = requests, stop_token, repetition
        self.max_new_tokens = sampling.max_new_tokens
        pairs = [(i, seed) for i, request in enumerate(requests) for seed in request.seeds]
        self.request_of_row = torch.tensor([i for i, _ in pairs])
        prompt_lengths = torch.tensor([len(r.prompt_tokens) for r in requests])
        self._uniforms = torch.from_numpy(
            np.stack([uniforms(seed, self.max_new_tokens) for _, seed in pairs])
        )
        count = len(pairs)
        self._prompt_length = prompt_lengths[self.request_of_row]
        self._tokens = torch.zeros(count, self.max_new_tokens, dtype=torch.int64)
        self._logprobs = torch.zeros(count, self.max_new_tokens)
        self._entropies = torch.zeros(count, self.max_new_tokens)
        self._length = torch.zeros(count, dtype=torch.int64)
        self._streak = torch.zeros(count, dtype=torch.int64)
        self._reason = ["length"] * count
        self._is_done = torch.zeros(count, dtype=torch.bool)
        self._rows = torch.arange(count)
        self._step = 0

    def next_uniform(self) -> torch.Tensor:
        """Random numbers [B] for the next token of the rows in the batch."""
        return self._uniforms[self._rows, self._step]

    def positions(self) -> torch.Tensor:
        """int64 [B], position of the newest token of each row."""
        return self._prompt_length[self._rows] + self._step - 1

    def record(
        self, tokens: torch.Tensor, logprobs: torch.Tensor, entropies: torch.Tensor
    ) -> torch.Tensor:
        """Append one token to every unfinished row; returns bool [B], the rows that go on."""
        active = ~self._is_done[self._rows]
        rows = self._rows[active]
        self._tokens[rows, self._step] = tokens[active]
        self._logprobs[rows, self._step] = logprobs[active]
        self._entropies[rows, self._step] = entropies[active]
        self._length[rows] += 1
        confident = logprobs[active].exp() > self.repetition.probability
        self._streak[rows] = torch.where(confident, self._streak[rows] + 1, 0)
        stopped = tokens[active] == self.stop_token
        repeated = (self._streak[rows] >= self.repetition.num_tokens) & ~stopped
        for row in rows[stopped].tolist():
            self._reason[row] = "stop"
        for row in rows[repeated].tolist():
            self._reason[row] = "repetition"
        self._step += 1
        is_full = self._step >= self.max_new_tokens
        self._is_done[rows] = stopped | repeated | is_full
        return ~self._is_done[self._rows]

    def compact(self, keep: torch.Tensor) -> None:
        """Forget the rows that left the model's batch."""
        self._rows = self._rows[keep]

    def completions(self, policy_version: int) -> list[list[Completion]]:
        """Finished completions, by request."""
        grouped: list[list[Completion]] = [[] for _ in self.requests]
        for row, index in enumerate(self.request_of_row.tolist()):
            n = int(self._length[row])
            grouped[index].append(
                Completion(
                    prompt_tokens=self.requests[index].prompt_tokens,
                    tokens=tuple(self._tokens[row, :n].tolist()),
                    logprobs=tuple(self._logprobs[row, :n].tolist()),
                    entropies=tuple(self._entropies[row, :n].tolist()),
                    finish_reason=self._reason[row],
                    policy_versions=(policy_version,) * n,
                )
            )
        return grouped
