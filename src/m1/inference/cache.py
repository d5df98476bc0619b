"""What decoding remembers: a table of lightning states, pages of keys and values, and who has them.

Shapes: S slots, P pages, G tokens of a page, H heads and KV key-value heads of this rank, D head
dim, L layers of a kind.
"""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from m1.inference.parameters import Lightning, Parameters
from m1.types import M1Error


@dataclass(frozen=True)
class Swapped:
    """Memory of one sequence, taken out of the table and the pages."""

    state: torch.Tensor
    """float32 [L, H, D, D]."""
    keys: torch.Tensor
    """[L, pages, G, KV, D]."""
    values: torch.Tensor
    routed_experts: torch.Tensor | None = None
    """int16 [layers, pages, G, k], where they are recorded."""


class Cache:
    """Tensors of all slots and pages on this rank.

    A slot holds the states of all lightning layers of one sequence, of constant size; a page holds
    keys and values of all softmax layers for G consecutive tokens. The last row of each belongs to
    nobody: index -1, the padding of a batch, reads and writes it. Where experts are recorded, they
    lie in pages too, and so follow their tokens through shared prompts, snapshots and preemption.
    """

    def __init__(
        self,
        parameters: Parameters,
        *,
        num_slots: int,
        num_pages: int,
        page_size: int,
        record_experts: bool = False,
    ) -> None:
        """Allocate.

        Raises:
            M1Error: Experts are to be recorded where there are none.
        """
        config = parameters.config
        num_lightning = sum(isinstance(x.attention, Lightning) for x in parameters.layers)
        num_softmax = len(parameters.layers) - num_lightning
        ranks = parameters.tensor_group.size() if parameters.tensor_group else 1
        heads, groups = config.num_attention_heads // ranks, config.num_query_groups // ranks
        dim, device = config.kv_channels, parameters.device
        self.num_slots, self.num_pages, self.page_size = num_slots, num_pages, page_size
        self.states = torch.zeros(num_lightning, num_slots + 1, heads, dim, dim, device=device)
        pages = (num_softmax, num_pages + 1, page_size, groups, dim)
        self.keys = torch.zeros(pages, dtype=config.params_dtype, device=device)
        self.values = torch.zeros(pages, dtype=config.params_dtype, device=device)
        self.routed_experts: torch.Tensor | None = None
        """int16 [layers, P + 1, G, k], -1 where nothing was computed; None: not recorded."""
        if record_experts:
            if any(layer.mlp.router is None for layer in parameters.layers):
                raise M1Error(
                    "experts are to be recorded, but this model's layers are dense; turn "
                    "record_experts off (rl.routing_replay)"
                )
            shape = (len(parameters.layers), num_pages + 1, page_size, parameters.top_k)
            self.routed_experts = torch.full(shape, -1, dtype=torch.int16, device=device)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        tensors = [self.states, self.keys, self.values]
        if self.routed_experts is not None:
            tensors.append(self.routed_experts)
        return sum(x.numel() * x.element_size() for x in tensors)

    def copy_slot(self, source: int, targets: list[int]) -> None:
        """Give other slots the states of one."""
        if targets:
            self.states[:, targets] = self.states[:, source : source + 1].clone()

    def copy_page(self, source: int, target: int) -> None:
        """Give another page the content of one."""
        self.keys[:, target], self.values[:, target] = self.keys[:, source], self.values[:, source]
        if self.routed_experts is not None:
            self.routed_experts[:, target] = self.routed_experts[:, source]

    def experts_of(self, pages: list[int], length: int) -> torch.Tensor | None:
        """Experts of a sequence's first tokens.

        Args:
            pages: The sequence's.
            length: Tokens.

        Returns:
            int16 [length, layers, k] on the CPU; None where they are not recorded.
        """
        if self.routed_experts is None:
            return None
        used = torch.tensor(pages[: -(-length // self.page_size)], device=self.keys.device)
        found = self.routed_experts[:, used].flatten(1, 2)[:, :length]
        return found.transpose(0, 1).contiguous().cpu()

    def take_out(self, slot: int, pages: list[int], *, device: torch.device | str) -> Swapped:
        """Copy a sequence's memory to `device`."""
        index = torch.tensor(pages, dtype=torch.int64, device=self.keys.device)
        return Swapped(
            self.states[:, slot].to(device, copy=True),
            self.keys[:, index].to(device),
            self.values[:, index].to(device),
            None if self.routed_experts is None else self.routed_experts[:, index].to(device),
        )

    def put_back(self, saved: Swapped, slot: int, pages: list[int]) -> None:
        """Write what `take_out` copied into a slot and as many pages."""
        self.states[:, slot] = saved.state.to(self.states.device)
        index = torch.tensor(pages, dtype=torch.int64, device=self.keys.device)
        self.keys[:, index] = saved.keys.to(self.keys.device)
        self.values[:, index] = saved.values.to(self.values.device)
        if self.routed_experts is not None and saved.routed_experts is not None:
            self.routed_experts[:, index] = saved.routed_experts.to(self.keys.device)


class SlotPool:
    """Free slots, lowest first, so that an idle engine always begins the same way."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count))

    def __len__(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """A free slot; there must be one."""
        return heapq.heappop(self._free)

    def give(self, slot: int) -> None:
        """Return a slot."""
        heapq.heappush(self._free, slot)


class PagePool:
    """Free pages, lowest first, and how many hold each of the others."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count))
        self._holders = [0] * count

    def __len__(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """A free page; there must be one."""
        page = heapq.heappop(self._free)
        self._holders[page] = 1
        return page

    def share(self, pages: list[int]) -> None:
        """Note one more holder of each page."""
        for page in pages:
            self._holders[page] += 1

    def give(self, pages: list[int]) -> None:
        """Note one holder less of each page; without any it is free."""
        for page in pages:
            self._holders[page] -= 1
            if self._holders[page] == 0:
                heapq.heappush(self._free, page)
            assert self._holders[page] >= 0, f"page {page} was given back twice"


class PageTable:
    """Which pages each slot's sequence has, on the device; only what is new is copied there."""

    def __init__(self, cache: Cache, *, max_tokens: int) -> None:
        columns = min(cache.num_pages, -(-max_tokens // cache.page_size))
        self._table = torch.full(
            (cache.num_slots + 1, columns), -1, dtype=torch.int64, device=cache.keys.device
        )
        self._known: list[list[int]] = [[] for _ in range(cache.num_slots)]
        """The very list of pages that a slot's row was copied from."""
        self._counts = [0] * cache.num_slots

    def update(self, placed: Iterable[tuple[int, list[int]]]) -> bool:
        """Copy new pages; returns whether there were any.

        Args:
            placed: Slot and pages of every sequence. A list grows at its end only, and a sequence
                that is placed anew has another list.
        """
        rows: list[int] = []
        columns: list[int] = []
        pages: list[int] = []
        for slot, own in placed:
            start = self._counts[slot] if self._known[slot] is own else 0
            if start == len(own):
                continue
            rows += [slot] * (len(own) - start)
            columns += range(start, len(own))
            pages += own[start:]
            self._known[slot], self._counts[slot] = own, len(own)
        if pages:
            self._table[rows, columns] = torch.tensor(pages, device=self._table.device)
        return bool(pages)

    def rows(self, slots: torch.Tensor | slice, width: int) -> torch.Tensor:
        """int64 [B, width], the first pages of some slots; what follows a row's own is stale."""
        return self._table[slots][:, :width]
