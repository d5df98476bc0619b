"""The tensors of a step: those of the decoding batch live on while its members do.

Shapes: B rows that decode, T tokens of a step, n pages of a row.
"""

from dataclasses import dataclass

import torch

from m1.inference.cache import Cache, PageTable
from m1.inference.limits import EngineLimits
from m1.inference.sampler import RowParams
from m1.inference.scheduler import Scheduler
from m1.inference.sequences import Prefill, Sequence
from m1.inference.steps import Chunk, DecodeRows, Step


@dataclass
class Rows:
    """Tensors of the decoding batch that live on while its members do."""

    members: list[Sequence]
    decode: DecodeRows
    positions: torch.Tensor
    tokens: torch.Tensor
    params: RowParams


class Batcher:
    """Makes a `Step` of whom the scheduler lets run."""

    def __init__(
        self, scheduler: Scheduler, cache: Cache, limits: EngineLimits, *, max_position: int
    ) -> None:
        self._scheduler, self._cache, self._limits = scheduler, cache, limits
        self._pages = PageTable(cache, max_tokens=max_position)
        self._rows: Rows | None = None

    def rows(self) -> Rows | None:
        """The running sequences as tensors, made anew when they are others."""
        running = self._scheduler.running
        if not running:
            self._rows = None
            return None
        has_new_pages = self._pages.update((x.slot, x.pages) for x in running)
        kept = self._rows
        if kept is not None and kept.members == running:
            kept.positions += 1
            kept.decode.lengths += 1
            if has_new_pages:
                kept.decode.pages = self._pages_of(kept.decode.slots, running)
            return kept
        device = self._cache.keys.device
        numbers = [sequence.slot for sequence in running]
        is_range = device.type == "cpu" and numbers[-1] - numbers[0] + 1 == len(numbers)
        slots: torch.Tensor | slice = slice(numbers[0], numbers[-1] + 1)
        if not is_range:
            slots = torch.tensor(numbers, device=device)
        positions = torch.tensor([sequence.length for sequence in running], device=device)
        self._rows = Rows(
            members=list(running),
            decode=DecodeRows(
                slots=slots,
                pages=self._pages_of(slots, running),
                lengths=positions + 1,
                count=len(numbers),
            ),
            positions=positions,
            tokens=torch.tensor([sequence.tokens[-1] for sequence in running], device=device),
            params=RowParams.of([sequence.params for sequence in running], device),
        )
        return self._rows

    def _pages_of(self, slots: torch.Tensor | slice, running: list[Sequence]) -> torch.Tensor:
        return self._pages.rows(slots, max(len(sequence.pages) for sequence in running))

    def chunks(self, num_decoding: int) -> list[tuple[Prefill, Chunk]]:
        """Parts of prompts that fill the step, the oldest first."""
        room = max(1, self._limits.step_tokens - num_decoding)
        chunks: list[tuple[Prefill, Chunk]] = []
        for prefill in self._scheduler.prefilling:
            left = len(prefill.tokens) - prefill.done
            if not left:
                continue
            if self._limits.is_invariant:  # cut at the same places whatever the others are
                count = min(left, self._limits.step_tokens)
                if chunks and count > room:
                    break
            else:
                count = min(left, room)
            pages = torch.tensor(prefill.pages, device=self._cache.keys.device)
            chunks.append((prefill, Chunk(prefill.slot, prefill.done, count, pages)))
            room -= count
            if room <= 0:
                break
        return chunks

    def step(self, rows: Rows | None, chunks: list[tuple[Prefill, Chunk]]) -> Step:
        """What the model is asked; logits after every row and after prompts that end here."""
        size, device = self._cache.page_size, self._cache.keys.device
        tokens: list[torch.Tensor] = []
        positions: list[torch.Tensor] = []
        places: list[torch.Tensor] = []
        if rows:
            tokens.append(rows.tokens)
            positions.append(rows.positions)
            page = rows.decode.pages.gather(1, (rows.positions // size)[:, None]).squeeze(1)
            places.append(page * size + rows.positions % size)
        logits_of = list(range(rows.decode.count if rows else 0))
        total = len(logits_of)
        for prefill, chunk in chunks:
            end = chunk.start + chunk.count
            place = torch.arange(chunk.start, end, device=device)
            tokens.append(torch.tensor(prefill.tokens[chunk.start : end], device=device))
            positions.append(place)
            places.append(chunk.pages[place // size] * size + place % size)
            total += chunk.count
            if end == len(prefill.tokens):
                logits_of.append(total - 1)
        return Step(
            tokens=torch.cat(tokens),
            positions=torch.cat(positions),
            places=torch.cat(places),
            decode=rows.decode if rows else None,
            chunks=[chunk for _, chunk in chunks],
            logits_of=torch.tensor(logits_of, dtype=torch.int64, device=device) if chunks else None,
        )
