"""Throughput of a checkpoint-sized file to and from S3: m1.storage beside boto3's transfer manager.

Needs S3_ENDPOINT, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and a bucket, as `m1 up` gives them:

    python -m benchmarks.storage s3://BUCKET/PREFIX --mebibytes 512 --json OUT

Both move the same file between the same disk and the same server, in turns; the median counts. Both
check what arrives: boto3 as configured by default, m1 against the SHA-256 kept with the object.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.machine import describe, write
from m1.storage import S3Storage, open_storage
from m1.types import M1Error

_CHUNK_BYTES = 1 << 24


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _boto3(storage: S3Storage):  # type: ignore[no-untyped-def]
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=storage.connection.endpoint,
        region_name=os.environ.get("AWS_REGION", "us-east-1"),
    )


def measure(root: str, *, num_bytes: int, num_rounds: int, scratch: Path) -> dict[str, object]:
    """Rates in MiB/s of both, with the share that ours is of boto3's.

    Args:
        root: `s3://bucket/prefix`, in which objects are made and removed.
        num_bytes: Size of the file.
        num_rounds: Turns of each.
        scratch: Folder for the files.
    """
    storage = open_storage(root)
    if not isinstance(storage, S3Storage):
        raise M1Error(f"{root} is not on S3; give s3://bucket/prefix")
    source = scratch / "source" / "shard"
    source.parent.mkdir()
    with source.open("wb") as file:
        for start in range(0, num_bytes, _CHUNK_BYTES):
            file.write(os.urandom(min(_CHUNK_BYTES, num_bytes - start)))
    theirs = _boto3(storage)
    name = f"{storage.prefix}/boto3/shard".lstrip("/")
    fetched = scratch / "boto3"
    times: dict[str, list[float]] = {"m1_up": [], "boto3_up": [], "m1_down": [], "boto3_down": []}
    for number in range(num_rounds):
        key = f"m1/{number}"
        pairs = [
            ("boto3_up", lambda: theirs.upload_file(str(source), storage.bucket, name)),
            ("m1_up", lambda key=key: storage.upload_folder(source.parent, key)),
            ("boto3_down", lambda: theirs.download_file(storage.bucket, name, str(fetched))),
            ("m1_down", lambda key=key: storage.download_folder(key, scratch / "m1")),
        ]
        for label, work in pairs if number % 2 else [pairs[1], pairs[0], pairs[3], pairs[2]]:
            times[label].append(_seconds(work))
        if (scratch / "m1" / "shard").stat().st_size != num_bytes:
            raise M1Error("what came back has another size")
        storage.remove_folder(key)
    storage.remove_folder("boto3")
    rates = {label: num_bytes / (1 << 20) / statistics.median(t) for label, t in times.items()}
    return {
        "mebibytes": num_bytes >> 20,
        "rounds": num_rounds,
        "mebibytes_per_second": {label: round(rate, 1) for label, rate in rates.items()},
        "seconds": {label: [round(t, 3) for t in taken] for label, taken in times.items()},
        "upload_share_of_boto3": round(rates["m1_up"] / rates["boto3_up"], 3),
        "download_share_of_boto3": round(rates["m1_down"] / rates["boto3_down"], 3),
    }


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root")
    parser.add_argument("--mebibytes", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(
            given.root,
            num_bytes=given.mebibytes << 20,
            num_rounds=given.rounds,
            scratch=Path(folder),
        )
    results = {"machine": describe(), **found}
    print(json.dumps(results, indent=2))
    write(given.json, results)


if __name__ == "__main__":
    main()
