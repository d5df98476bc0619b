"""What the service counts, by kind of verifier."""

import threading
from collections import Counter, defaultdict


class Metrics:
    """Counters and sums; names are `rewards/<kind>/<what>`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, Counter[str]] = defaultdict(Counter)
        self._longest: dict[str, float] = defaultdict(float)

    def add(self, kind: str, **values: float) -> None:
        """Add to counters of a kind."""
        with self._lock:
            for name, value in values.items():
                self._values[kind][name] += value  # type: ignore[assignment]
            if "busy_seconds" in values:
                self._longest[kind] = max(self._longest[kind], values["busy_seconds"])

    def snapshot(self) -> dict[str, float]:
        """All values now: sums since the start, `longest_seconds` the maximum."""
        with self._lock:
            flat = {
                f"rewards/{kind}/{name}": float(value)
                for kind, counter in self._values.items()
                for name, value in sorted(counter.items())
            }
            for kind, value in self._longest.items():
                flat[f"rewards/{kind}/longest_seconds"] = value
            return flat
