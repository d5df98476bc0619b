"""Memory of finished turns, so that a conversation that goes on is not computed again.

Recurrent states cannot be cut back, so a snapshot is taken where a later prompt is likely to go on:
after a prompt and after a completion.
"""

from dataclasses import dataclass

import torch

from m1.inference.cache import Cache, PagePool


@dataclass(frozen=True, eq=False)
class Snapshot:
    """States after some tokens, and a share in the pages of their keys."""

    tokens: tuple[int, ...]
    state: torch.Tensor
    """float32 [L, H, D, D]."""
    pages: list[int]


class PrefixCache:
    """Snapshots within a bound of bytes, the least recently used dropped first.

    The bound counts states; pages are given up whenever a sequence needs them.
    """

    def __init__(self, cache: Cache, pool: PagePool, *, max_bytes: int) -> None:
        self._cache, self._pool = cache, pool
        state = cache.states[:, 0]
        self.capacity = max_bytes // max(1, state.numel() * state.element_size())
        self._snapshots: list[Snapshot] = []
        """Snapshots that fit."""
        self.hits = self.misses = 0

    def __len__(self) -> int:
        return len(self._snapshots)

    def keep(self, tokens: tuple[int, ...], slot: int, pages: list[int]) -> None:
        """Remember what slot and pages hold after `tokens`."""
        if not self.capacity or not tokens:
            return
        if any(known.tokens == tokens for known in self._snapshots):
            return
        while len(self._snapshots) >= self.capacity:
            self.drop_oldest()
        used = pages[: -(-len(tokens) // self._cache.page_size)]
        self._pool.share(used)
        self._snapshots.append(Snapshot(tokens, self._cache.states[:, slot].clone(), used))

    def find(self, tokens: tuple[int, ...]) -> Snapshot | None:
        """The longest snapshot whose tokens begin `tokens`, which must go on after them."""
        best = None
        for known in self._snapshots:
            size = len(known.tokens)
            if (best is None or size > len(best.tokens)) and tokens[
                :size
            ] == known.tokens != tokens:
                best = known
        if best is None:
            self.misses += 1
            return None
        self.hits += 1
        self._snapshots.remove(best)
        self._snapshots.append(best)
        return best

    def drop_oldest(self) -> bool:
        """Forget the least recently used snapshot; returns whether there was one."""
        if not self._snapshots:
            return False
        self._pool.give(self._snapshots.pop(0).pages)
        return True

    def clear(self) -> None:
        """Forget all, as after a change of weights."""
        while self.drop_oldest():
            pass
