"""Decoding as CUDA graphs: one launch a step instead of thousands.

A graph is captured when it is first wanted, for a number of rows and a width of the page table,
both rounded up; rows that are only padding work on the slot and page that belong to nobody.

Shapes: B rows, n pages of a row, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch

from m1.inference.cache import Cache
from m1.inference.feed_forward import FEW_TOKENS
from m1.inference.runner import ModelRunner
from m1.inference.steps import DecodeRows, Step

MAX_ROWS = FEW_TOKENS
"""Beyond it feed-forward layers ask the host."""


@dataclass
class _Graph:
    graph: torch.cuda.CUDAGraph
    step: Step
    logits: torch.Tensor


class DecodeGraphs:
    """A `ModelRunner` for steps that only decode, replayed from graphs."""

    def __init__(self, runner: ModelRunner, cache: Cache) -> None:
        self._runner, self._cache = runner, cache
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._pool: Any = None

    def __call__(self, step: Step) -> torch.Tensor | None:
        """Logits float32 [B, V], valid until the next call; None where no graph serves."""
        rows = step.decode
        if rows is None or step.chunks or rows.count > MAX_ROWS:
            return None
        count, width = rows.count, rows.pages.shape[1]
        key = _rounded(count), _rounded(width)
        found = self._graphs.get(key)
        if found is None:
            found = self._graphs[key] = self._capture(*key)
        self._fill(found.step, step, count, width)
        found.graph.replay()
        return found.logits[:count]

    def _fill(self, static: Step, step: Step, count: int, width: int) -> None:
        assert static.decode is not None and step.decode is not None
        static.tokens[:count].copy_(step.tokens)
        static.positions[:count].copy_(step.positions)
        static.places[:count].copy_(step.places)
        static.places[count:].fill_(self._nowhere)
        kept, given = static.decode, step.decode
        assert isinstance(kept.slots, torch.Tensor) and isinstance(given.slots, torch.Tensor)
        kept.slots[:count].copy_(given.slots)
        kept.slots[count:].fill_(-1)
        kept.pages[:count, :width].copy_(given.pages)
        kept.pages[count:].fill_(-1)
        kept.lengths[:count].copy_(given.lengths)
        kept.lengths[count:].fill_(1)

    @property
    def _nowhere(self) -> int:
        """First place of the page that belongs to nobody."""
        return self._cache.num_pages * self._cache.page_size

    def _capture(self, count: int, width: int) -> _Graph:
        step = self._padding(count, width)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._runner(step, self._cache)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._runner(step, self._cache)
        self._pool = self._pool or graph.pool()
        return _Graph(graph, step, logits)

    def _padding(self, count: int, width: int) -> Step:
        device = self._cache.keys.device

        def full(value: int, *shape: int) -> torch.Tensor:
            return torch.full(shape, value, dtype=torch.int64, device=device)

        return Step(
            tokens=full(0, count),
            positions=full(0, count),
            places=full(self._nowhere, count),
            decode=DecodeRows(
                slots=full(-1, count),
                pages=full(-1, count, width),
                lengths=full(1, count),
                count=count,
            ),
        )


def _rounded(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()
