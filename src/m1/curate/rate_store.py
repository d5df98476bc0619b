"""Measured pass rates on disk, so that sampling is not repeated after a kill."""

import hashlib
import json
from collections.abc import Iterator, MutableMapping
from pathlib import Path

from m1.curate.pass_rate import PassRate
from m1.curate.settings import AnswererConfig


class RateStore(MutableMapping[str, PassRate]):
    """A JSONL file of rates by content key; each is on disk once it is set.

    Only rates of the same model, settings and number of samples are seen. A model in a folder is
    known by its files' names, sizes and times; one behind an endpoint by its name alone.
    """

    def __init__(self, path: Path, model: AnswererConfig, num_samples: int) -> None:
        self._path = path
        self._context = _digest(model, num_samples)
        self._rates: dict[str, PassRate] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:  # the kill met a write
                continue
            if row["context"] == self._context:
                self._rates[row["key"]] = PassRate(row["num_passed"], row["num_judged"])

    def __getitem__(self, key: str) -> PassRate:
        """A known rate."""
        return self._rates[key]

    def __setitem__(self, key: str, rate: PassRate) -> None:
        """Remember a rate, here and on disk."""
        self._rates[key] = rate
        row = {
            "key": key,
            "num_passed": rate.num_passed,
            "num_judged": rate.num_judged,
            "context": self._context,
        }
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write("\n" + json.dumps(row))

    def __delitem__(self, key: str) -> None:
        """Forget a rate here; the file keeps it."""
        del self._rates[key]

    def __iter__(self) -> Iterator[str]:
        """Keys."""
        return iter(self._rates)

    def __len__(self) -> int:
        """How many rates are known."""
        return len(self._rates)


def _digest(model: AnswererConfig, num_samples: int) -> str:
    settings = model.model_dump(mode="json", exclude={"max_sequences"})
    files = []
    if not model.is_endpoint:
        folder = Path(model.uri.removeprefix("file://"))
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            status = path.stat()
            files.append([str(path.relative_to(folder)), status.st_size, status.st_mtime_ns])
    data = json.dumps([settings, num_samples, files], sort_keys=True)
    return hashlib.sha256(data.encode()).hexdigest()[:16]
