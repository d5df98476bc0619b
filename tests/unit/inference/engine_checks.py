"""What the engine's tests ask of a core."""

from m1.inference.core import EngineCore
from m1.inference.sequences import Sequence


def finish(core: EngineCore) -> None:
    """Step until nobody is left."""
    for _ in range(10_000):
        if core.is_idle:
            return
        core.step()
    raise AssertionError("the engine does not come to an end")


def assert_nothing_leaks(core: EngineCore) -> None:
    """Every slot is free, and every page that no snapshot holds."""
    scheduler = core.scheduler
    assert scheduler.is_idle
    scheduler.prefixes.clear()
    assert len(scheduler.slots) == core.limits.num_slots
    assert len(scheduler.pages) == core.limits.num_pages
    assert not any(scheduler.pages._holders)


def results(sequences: list[Sequence]) -> list[tuple[tuple[int, ...], str | None]]:
    return [(tuple(s.tokens), s.finish_reason) for s in sequences]
