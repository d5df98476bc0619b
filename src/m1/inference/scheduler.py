"""Who runs: admission, shared prompts, preemption. The oldest request can always go on.

A sequence or prompt that lacks pages takes them from snapshots first, then from younger ones, the
youngest first; with nobody younger it makes way itself.
"""

from bisect import insort
from operator import attrgetter
from typing import Literal

from m1.inference.cache import Cache, PagePool, SlotPool
from m1.inference.prefix import PrefixCache
from m1.inference.sequences import Order, Prefill, Sequence

Preemption = Literal["swap", "recompute"]


class Scheduler:
    """Queues and their share of the cache."""

    def __init__(self, cache: Cache, *, preemption: Preemption, prefix_bytes: int) -> None:
        self.cache = cache
        self.slots, self.pages = SlotPool(cache.num_slots), PagePool(cache.num_pages)
        self.prefixes = PrefixCache(cache, self.pages, max_bytes=prefix_bytes)
        self.preemption = preemption
        self.waiting: list[Prefill] = []
        """Sorted by order, without slot or pages."""
        self.prefilling: list[Prefill] = []
        """With a slot and the pages of all their tokens."""
        self.running: list[Sequence] = []
        """With a slot; sorted by it."""
        self.swapped: list[Sequence] = []
        """Preempted, their memory on the host."""
        self.num_preemptions = 0

    @property
    def is_idle(self) -> bool:
        """Whether nobody is left."""
        return not (self.waiting or self.prefilling or self.running or self.swapped)

    def add(self, prefill: Prefill) -> None:
        """Queue tokens and the sequences after them."""
        insort(self.waiting, prefill, key=attrgetter("order"))

    def admit(self) -> None:
        """Bring back who was preempted and let in who waits, the oldest first."""
        while self.swapped or self.waiting:
            old = self.swapped[0] if self.swapped else None
            new = self.waiting[0] if self.waiting else None
            if old is not None and (new is None or old.order < new.order):
                if not self._restore(old):
                    return
                self.swapped.pop(0)
            elif new is not None:
                if not self._begin(new):
                    return
                self.waiting.remove(new)
                insort(self.prefilling, new, key=attrgetter("order"))

    def grow(self) -> None:
        """Give every running sequence a page for its next token, or preempt it."""
        for sequence in sorted(self.running, key=attrgetter("order")):
            if sequence.slot < 0:  # made way for an older one
                continue
            if sequence.length < len(sequence.pages) * self.cache.page_size:
                continue
            if self._make_room(1, sequence.order):
                sequence.pages.append(self.pages.take())
            else:
                self.preempt(sequence)

    def fork(self, prefill: Prefill) -> list[Sequence]:
        """Begin as many children of a computed prompt as there are slots and pages for.

        Full pages are shared; the last one, if it is begun, is copied. The last child takes over
        the prompt's own slot and pages.
        """
        size = self.cache.page_size
        shared = len(prefill.tokens) // size
        begun: list[Sequence] = []
        while len(prefill.children) > 1 and len(self.slots):
            pages = prefill.pages[:shared]
            is_partial = shared < len(prefill.pages)
            if is_partial and not self._make_room(1, prefill.order):
                break
            self.pages.share(pages)
            if is_partial:
                pages.append(self.pages.take())
                self.cache.copy_page(prefill.pages[shared], pages[-1])
            child = prefill.children.pop(0)
            child.slot, child.pages = self.slots.take(), pages
            begun.append(child)
        self.cache.copy_slot(prefill.slot, [child.slot for child in begun])
        if len(prefill.children) > 1 and not begun and not self.running:  # nobody will make room
            self.add(Prefill(prefill.tokens, prefill.children[1:]))
            del prefill.children[1:]
        if len(prefill.children) == 1:
            child = prefill.children.pop()
            child.slot, child.pages = prefill.slot, prefill.pages
            self.prefilling.remove(prefill)
            begun.append(child)
        for child in begun:
            child.length = len(prefill.tokens)
            insort(self.running, child, key=attrgetter("slot"))
        return begun

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence out of the cache."""
        self.num_preemptions += 1
        if self.preemption == "swap":
            saved = self.cache.take_out(sequence.slot, sequence.pages, device="cpu")
            self.release(sequence)
            sequence.saved = saved
            insort(self.swapped, sequence, key=attrgetter("order"))
        else:
            self.release(sequence)
            self.add(again(sequence))

    def release(self, sequence: Sequence) -> None:
        """Take back a running sequence's slot and pages."""
        self.running.remove(sequence)
        self.slots.give(sequence.slot)
        self.pages.give(sequence.pages)
        sequence.slot, sequence.pages = -1, []

    def recompute_all(self) -> None:
        """Forget everything computed so far; all sequences go on after computing it again."""
        self.prefixes.clear()
        for prefill in list(self.prefilling):
            self._send_back(prefill)
        for sequence in list(self.running):
            self.release(sequence)
            self.add(again(sequence))
        for sequence in self.swapped:
            sequence.saved = None
            self.add(again(sequence))
        self.swapped.clear()

    def drop(self, sequence: Sequence) -> None:
        """Remove a sequence wherever it is."""
        if sequence.slot >= 0:
            self.release(sequence)
        elif sequence in self.swapped:
            self.swapped.remove(sequence)
            sequence.saved = None
        else:
            self._drop_unborn(sequence)

    def _drop_unborn(self, sequence: Sequence) -> None:
        for queue in (self.waiting, self.prefilling):
            for prefill in queue:
                if sequence not in prefill.children:
                    continue
                if len(prefill.children) > 1:
                    prefill.children.remove(sequence)
                    queue.sort(key=attrgetter("order"))
                    return
                if prefill.slot >= 0:
                    self._vacate(prefill)
                queue.remove(prefill)
                return

    def _restore(self, sequence: Sequence) -> bool:
        assert sequence.saved is not None
        count = sequence.saved.keys.shape[1]
        if not self._has_slot(sequence.order) or not self._make_room(count, sequence.order):
            return False
        sequence.slot = self.slots.take()
        sequence.pages = [self.pages.take() for _ in range(count)]
        self.cache.put_back(sequence.saved, sequence.slot, sequence.pages)
        sequence.saved = None
        insort(self.running, sequence, key=attrgetter("slot"))
        return True

    def _begin(self, prefill: Prefill) -> bool:
        """Give a prompt a slot and its pages, and what a snapshot already knows of it."""
        size = self.cache.page_size
        count = -(-len(prefill.tokens) // size)
        if not self._has_slot(prefill.order):
            return False
        known = self.prefixes.find(prefill.tokens) if len(self.prefixes) else None
        shared = known.pages[: len(known.tokens) // size] if known else []
        if known:
            self.pages.share(known.pages)  # a snapshot that is dropped now must not take them along
        if not self._make_room(count - len(shared), prefill.order):
            if known:
                self.pages.give(known.pages)
            return False
        prefill.slot = self.slots.take()
        prefill.pages = shared + [self.pages.take() for _ in range(count - len(shared))]
        if known:
            prefill.done = len(known.tokens)
            self.cache.states[:, prefill.slot] = known.state
            if len(known.pages) > len(shared):
                self.cache.copy_page(known.pages[-1], prefill.pages[len(shared)])
                self.pages.give(known.pages[len(shared) :])
        return True

    def _has_slot(self, order: Order) -> bool:
        """Whether a slot is left after the children of older prompts."""
        older = (prefill for prefill in self.prefilling if prefill.order < order)
        return len(self.slots) > sum(len(prefill.children) - 1 for prefill in older)

    def _make_room(self, count: int, order: Order) -> bool:
        """Free pages until there are `count`, at the expense of snapshots and younger ones."""
        while len(self.pages) < count:
            if self.prefixes.drop_oldest():
                continue
            prefill = max(self.prefilling, key=attrgetter("order"), default=None)
            sequence = max(self.running, key=attrgetter("order"), default=None)
            if (
                prefill
                and prefill.order > order
                and not (sequence and sequence.order > prefill.order)
            ):
                self._send_back(prefill)
            elif sequence and sequence.order > order:
                self.preempt(sequence)
            else:
                return False
        return True

    def _send_back(self, prefill: Prefill) -> None:
        self._vacate(prefill)
        self.prefilling.remove(prefill)
        self.add(prefill)

    def _vacate(self, prefill: Prefill) -> None:
        self.slots.give(prefill.slot)
        self.pages.give(prefill.pages)
        prefill.slot, prefill.pages, prefill.done, prefill.logits = -1, [], 0, None


def again(sequence: Sequence) -> Prefill:
    """Compute a sequence's tokens anew."""
    sequence.length = 0
    return Prefill(tokens=sequence.prompt + tuple(sequence.tokens), children=[sequence])
