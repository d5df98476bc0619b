"""The engine's loop: schedule, one model call, sample, record.

Shapes: B rows that decode, T tokens of a step, R rows of logits, V vocabulary, n pages of a row.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from m1.inference.batching import Batcher, Rows
from m1.inference.cache import Cache
from m1.inference.graphs import DecodeGraphs
from m1.inference.host import HostDecoder
from m1.inference.invariant import invariant_linear
from m1.inference.limits import EngineLimits
from m1.inference.params import SamplingParams, TokenOutput
from m1.inference.recorded import pack_experts
from m1.inference.runner import ModelRunner
from m1.inference.sampler import RandomStream, RowParams, SampledTokens, sample, sample_plain
from m1.inference.scheduler import Scheduler
from m1.inference.sequences import Prefill, Sequence
from m1.inference.steps import Chunk, Step
from m1.inference.stopping import StopText, reason_to_stop
from m1.types import M1Error

OnToken = Callable[[TokenOutput], None]
OnEnd = Callable[[Sequence], None]


class EngineCore:
    """Continuous batching on one model; not thread-safe."""

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        num_tokens: int,
        limits: EngineLimits | None = None,
        tokenizer: Any = None,
    ) -> None:
        """Make an engine.

        Args:
            model: A GPTModel from `m1.model.build`.
            num_tokens: Size of the tokenizer; higher ids are never sampled.
            limits: Sizes.
            tokenizer: For stop strings; see `StopText`.
        """
        self.limits = limits or EngineLimits()
        linear = invariant_linear if self.limits.is_invariant else F.linear
        self.runner = ModelRunner(model, linear=linear)
        self.num_tokens, self.tokenizer = num_tokens, tokenizer
        self.max_position: int = model.max_sequence_length  # type: ignore[assignment]
        self.policy_version = 0
        self._allocate()
        self._arrivals = 0
        self.num_prefilled = self.num_sampled = self.num_steps = 0

    def _allocate(self) -> None:
        limits = self.limits
        self.cache = Cache(
            self.runner.parameters,
            num_slots=limits.num_slots,
            num_pages=limits.num_pages,
            page_size=limits.page_size,
            record_experts=limits.record_experts,
        )
        is_graphed = self.limits.cuda_graphs and self.cache.keys.is_cuda
        self._graphs = DecodeGraphs(self.runner, self.cache) if is_graphed else None
        is_hosted = self.limits.host_kernel and HostDecoder.serves(self.runner.parameters)
        self._host = HostDecoder(self.runner, self.cache) if is_hosted else None
        self.scheduler = Scheduler(
            self.cache,
            # What is computed anew differs in its last bits.
            preemption="swap" if limits.is_invariant else limits.preemption,
            prefix_bytes=0 if limits.is_invariant else limits.prefix_bytes,
        )
        self._batcher = Batcher(self.scheduler, self.cache, limits, max_position=self.max_position)

    def add(
        self,
        prompt: tuple[int, ...],
        params: SamplingParams,
        seeds: tuple[int, ...],
        *,
        on_token: OnToken | None = None,
        on_end: OnEnd | None = None,
    ) -> list[Sequence]:
        """Queue one prompt and a completion for each seed.

        Args:
            prompt: Token ids.
            params: Of all its completions.
            seeds: One each.
            on_token: Called with every token of every completion.
            on_end: Called with every completion that ends of itself.

        Raises:
            M1Error: The prompt is empty, has ids that are no tokens, or does not fit.
        """
        self._require_fit(prompt, params)
        if not seeds:
            raise M1Error("a request asks for 0 completions; give at least one seed")
        self._arrivals += 1
        stops = params.stop_strings
        sequences = [
            Sequence(
                order=(self._arrivals, number),
                prompt=prompt,
                params=params,
                random=RandomStream(seed),
                on_token=on_token,
                on_end=on_end,
                detokenizer=StopText(self.tokenizer, stops) if stops else None,
            )
            for number, seed in enumerate(seeds)
        ]
        self.scheduler.add(Prefill(tokens=prompt, children=list(sequences)))
        return sequences

    def _require_fit(self, prompt: tuple[int, ...], params: SamplingParams) -> None:
        if not prompt:
            raise M1Error("the prompt has no tokens; give at least one")
        rows = self.runner.parameters.vocab_size
        strangers = [token for token in prompt if not 0 <= token < rows]
        if strangers:
            raise M1Error(
                f"the prompt has token {strangers[0]}, but ids run from 0 to {rows - 1}; "
                "encode it with this model's tokenizer"
            )
        if params.stop_strings and self.tokenizer is None:
            raise M1Error(
                "stop_strings were given, but this engine has no tokenizer; give stop_tokens"
            )
        length = len(prompt) + params.max_new_tokens
        if length > self.max_position:
            raise M1Error(
                f"a prompt of {len(prompt)} tokens and max_new_tokens {params.max_new_tokens} "
                f"exceed model.max_position {self.max_position}; lower max_new_tokens, shorten the "
                "prompts, or raise max_position"
            )
        room = self.limits.num_tokens
        if length > room:
            raise M1Error(
                f"a prompt of {len(prompt)} tokens and max_new_tokens {params.max_new_tokens} "
                f"exceed the engine's memory for {room} tokens; lower max_new_tokens, shorten the "
                "prompt, or raise the number of pages"
            )

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence now, wherever it is; harmless when it has ended."""
        if sequence.finish_reason is None:
            sequence.finish_reason = "cancelled"
            self.scheduler.drop(sequence)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return self.scheduler.is_idle

    def weights_changed(self, *, version: int, recompute: bool) -> None:
        """Take notice of new weights between two steps.

        Args:
            version: Of the policy from now on.
            recompute: Whether running sequences' states are computed anew with the new weights; if
                not, they go on from those of the old ones.
        """
        self.runner.refresh()
        if self._host is not None:
            self._host.refresh()
        self.policy_version = version
        self.scheduler.prefixes.clear()
        if recompute:
            self.scheduler.recompute_all()

    @torch.inference_mode()
    def step(self) -> list[Sequence]:
        """One model call and one token for every sequence that takes part; returns who finished."""
        scheduler = self.scheduler
        scheduler.admit()
        scheduler.grow()
        rows = self._batcher.rows()
        chunks = self._batcher.chunks(rows.decode.count if rows else 0)
        logits: list[torch.Tensor] = []
        if rows or chunks:
            step = self._batcher.step(rows, chunks)
            made = self._compute(step)
            self.num_steps += 1
            count = rows.decode.count if rows else 0
            logits += [made[:count]] if rows else []
            self._note_prefilled(chunks, made[count:])
        began, first = self._begin_sequences()
        members = [*(rows.members if rows else ()), *began]
        if not members:
            return []
        logits += first
        chosen = self._sample(rows, began, logits[0] if len(logits) == 1 else torch.cat(logits))
        for sequence in rows.members if rows else ():
            sequence.length += 1
        return self._record(members, chosen, began)

    def _compute(self, step: Step) -> torch.Tensor:
        if self._host is not None:
            return self._host(step)
        if self._graphs is not None:
            logits = self._graphs(step)
            if logits is not None:
                return logits
        return self.runner(step, self.cache)

    def _note_prefilled(self, chunks: list[tuple[Prefill, Chunk]], logits: torch.Tensor) -> None:
        finished = 0
        for prefill, chunk in chunks:
            prefill.done += chunk.count
            self.num_prefilled += chunk.count
            if prefill.done == len(prefill.tokens):
                prefill.logits = logits[finished : finished + 1]
                prefill.version = self.policy_version
                finished += 1
                self.scheduler.prefixes.keep(prefill.tokens, prefill.slot, prefill.pages)

    def _begin_sequences(self) -> tuple[list[Sequence], list[torch.Tensor]]:
        """Start what waits for computed prompts; their logits [children, V] of each prompt."""
        began, logits = [], []
        for prefill in list(self.scheduler.prefilling):
            if prefill.logits is None:  # not done, or it made way meanwhile
                continue
            children = self.scheduler.fork(prefill)
            if children:
                began += children
                logits.append(prefill.logits.expand(len(children), -1))
                for child in children:
                    child.versions.append(prefill.version)
        return began, logits

    def _sample(
        self, rows: Rows | None, began: list[Sequence], logits: torch.Tensor
    ) -> SampledTokens:
        members = [*(rows.members if rows else ()), *began]
        if rows and not began:
            params = rows.params
        else:
            params = RowParams.of([member.params for member in members], logits.device)
        drawn = torch.tensor([member.random.next() for member in members], dtype=torch.float64)
        uniform = drawn.to(logits.device, non_blocking=True)
        # In invariant mode what others ask for must not choose the arithmetic.
        is_fast = self._host is not None or logits.is_cuda
        is_plain = is_fast and params.is_plain and not self.limits.is_invariant
        choose = sample_plain if is_plain else sample
        chosen = choose(logits, uniform, params, num_tokens=self.num_tokens)
        if rows:
            rows.tokens = chosen.tokens[: rows.decode.count]
        return chosen

    def _record(
        self, members: list[Sequence], chosen: SampledTokens, began: list[Sequence]
    ) -> list[Sequence]:
        """Append a token to every sequence and release those that end with it."""
        columns = (chosen.tokens, chosen.logprobs, chosen.sampling_logprobs, chosen.entropies)
        # One transfer; float64 holds ids and float32 exactly.
        tokens, logprobs, sampling, entropies = torch.stack([x.double() for x in columns]).tolist()
        version = self.policy_version
        tops = chosen.top_lists()
        finished = []
        num_decoding = len(members) - len(began)
        for row, sequence in enumerate(members):
            token = int(tokens[row])
            sequence.tokens.append(token)
            sequence.logprobs.append(logprobs[row])
            sequence.sampling_logprobs.append(sampling[row])
            sequence.entropies.append(entropies[row])
            if row < num_decoding:
                sequence.versions.append(version)
            reason = reason_to_stop(sequence, token, logprobs[row])
            if reason is not None:
                sequence.finish_reason = reason
                if sequence.slot >= 0:
                    self._leave(sequence)
                finished.append(sequence)
            if sequence.on_token is not None:
                sequence.on_token(sequence.newest(tops[row] if tops else ()))
            if reason is not None and sequence.on_end is not None:
                sequence.on_end(sequence)
        self.num_sampled += len(members)
        return finished

    def _leave(self, sequence: Sequence) -> None:
        """Keep what others may want of a finished sequence's memory, and take the memory back."""
        if self.scheduler.prefixes.capacity:
            known = sequence.prompt + tuple(sequence.tokens[:-1])
            self.scheduler.prefixes.keep(known, sequence.slot, sequence.pages)
        experts = self.cache.experts_of(sequence.pages, sequence.length)
        sequence.routed_experts = None if experts is None else pack_experts(experts)
        self.scheduler.release(sequence)
