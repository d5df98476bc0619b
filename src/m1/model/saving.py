"""Writing a checkpoint: planned by all ranks, its files written at once or by a thread, then named.

It is written under a hidden name, its files' digests go into `complete.json`, and only then it gets
its name. A crash leaves the checkpoint before it as it was. Every rank takes the digests of its own
files.
"""

import hashlib
import inspect
import json
import os
import queue
import shutil
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from m1.model.cpu import single_threaded
from m1.model.quiet import ordinary_exceptions, quiet
from m1.storage import disk_errors
from m1.types import M1Error

MARKER = "complete.json"
# megatron starts a process to hold the results of writers in other processes; ours is this one's.
filesystem_async._results_queue = queue.Queue()
# megatron-core 0.19 wants another package's writer unless it is told to use its own.
_WRITER = (
    {"async_strategy": "mcore"}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
    else {}
)


def require_absent(folder: Path) -> None:
    """Raise if there is something where a checkpoint is to be written."""
    if folder.exists():
        raise M1Error(
            f"{folder} exists already; a checkpoint is never overwritten. Delete it first"
        )


class Saving:
    """A checkpoint that is being written. Every rank makes the same calls.

    Under `in_background` the tensors are copied to the CPU's memory before the constructor returns,
    and a thread writes them; it ends with the process.
    """

    def __init__(self, folder: Path, content: dict[str, Any], *, in_background: bool) -> None:
        """Begin a checkpoint at `folder` of megatron's sharded tensors and plain values.

        Raises:
            M1Error: The folder exists, or the disk refuses.
        """
        require_absent(folder)
        self.folder, self._partial = folder, folder.with_name(f".{folder.name}.partial")
        if dist.get_rank() == 0:
            shutil.rmtree(self._partial, ignore_errors=True)
            with disk_errors(folder.parent):
                self._partial.mkdir(parents=True)
        dist.barrier()
        self._digests: dict[str, str] = {}
        self._results: dict[int, Any] = {}
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None
        try:
            with disk_errors(folder.parent), quiet(), single_threaded(), ordinary_exceptions():
                strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
                self._request: AsyncRequest = dist_checkpointing.save(
                    content, str(self._partial), strategy, async_sharded_save=True, **_WRITER
                )
                buckets = _staged(self._request, is_copy=in_background)
        except BaseException:
            shutil.rmtree(self._partial, ignore_errors=True)
            raise
        if in_background:
            self._thread = threading.Thread(target=self._write, args=(buckets,), daemon=True)
            self._thread.start()
        else:
            self._write(buckets)

    def is_written(self) -> bool:
        """Whether every rank's files are written, so that `finish` will not wait."""
        is_alive = self._thread is not None and self._thread.is_alive()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        alive = torch.tensor(int(is_alive), device=device)
        dist.all_reduce(alive)
        return not alive.item()

    def finish(self) -> str:
        """Wait for the files, and give the checkpoint its name.

        Returns:
            The checkpoint's digest, sha256 over its manifest; "" but on the first rank.

        Raises:
            M1Error: The disk is full or not writable; earlier checkpoints are intact.
        """
        if self._thread is not None:
            self._thread.join()
        try:
            with disk_errors(self.folder.parent):
                written = self._of_all_ranks()
                with quiet(), single_threaded(), ordinary_exceptions():
                    if self._request.async_fn is not None:
                        self._request.async_fn_args[2].put(self._results)
                    for finalize in self._request.finalize_fns:
                        finalize()
        except BaseException:
            shutil.rmtree(self._partial, ignore_errors=True)
            raise
        digest = ""
        if dist.get_rank() == 0:
            with disk_errors(self.folder.parent):
                digest = complete(self._partial, self.folder, known=written)
        dist.barrier()
        return digest

    def _write(self, buckets: list[Any]) -> None:
        """Write this rank's files and take their digests; an error is kept for `finish`."""
        if self._request.async_fn is None:
            return
        transforms = self._request.async_fn.args[0]
        try:
            self._results = {n: _write_file(transforms, b) for n, b in enumerate(buckets)}
            for path in (Path(bucket[0]) for bucket in buckets):
                self._digests[str(path.relative_to(self._partial))] = sha256(path)
        except Exception as error:
            self._error = error

    def _of_all_ranks(self) -> dict[str, str]:
        """Digests of the files of all ranks; raises on every rank if one of them failed."""
        if dist.get_world_size() == 1:
            if self._error is not None:
                raise self._error
            return self._digests
        error = None if self._error is None else "".join(traceback.format_exception(self._error))
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (self._digests, error))
        if self._error is not None:
            raise self._error
        for rank, (_, error) in enumerate(gathered):
            if error is not None:
                raise RuntimeError(f"rank {rank} could not write its part of a checkpoint: {error}")
        return {name: digest for digests, _ in gathered for name, digest in digests.items()}


def _staged(request: AsyncRequest, *, is_copy: bool) -> list[Any]:
    """What each of this rank's files is to hold, in the CPU's memory."""
    if request.async_fn is None:
        return []
    buckets = []
    for path, key, (values, tensors) in request.async_fn_args[1]:
        moved = [
            (item, x.detach().to("cpu", non_blocking=True, copy=is_copy)) for item, x in tensors
        ]
        buckets.append((path, key, (values, moved)))
    torch.cuda.synchronize()
    return buckets


def _write_file(transforms: list[Any], bucket: Any) -> list[Any]:
    """Let megatron write one file; returns where each item lies in it."""
    results: queue.Queue[Any] = queue.Queue()
    workers: queue.Queue[int] = queue.Queue()
    workers.put(0)
    filesystem_async.FileSystemWriterAsync.write_preloaded_data(
        transforms, 0, bucket, results, workers, use_fsync=True
    )
    _, found = results.get_nowait()
    if isinstance(found, Exception):
        raise found
    return found  # type: ignore[no-any-return]


def complete(partial: Path, folder: Path, *, known: dict[str, str] | None = None) -> str:
    """Note the digest of every file of a written checkpoint and give it its name.

    Args:
        partial: The written files.
        folder: The name they get.
        known: Digests by path below `partial` that need not be taken again.

    Returns:
        The checkpoint's digest, sha256 over its manifest.
    """
    known = known or {}
    paths = {str(p.relative_to(partial)): p for p in sorted(partial.rglob("*")) if p.is_file()}
    files = {name: known.get(name) or sha256(path) for name, path in paths.items()}
    manifest = json.dumps({"files": files}, indent=1, sort_keys=True)
    with (partial / MARKER).open("w") as out:
        out.write(manifest)
        out.flush()
        os.fsync(out.fileno())
    partial.rename(folder)
    return hashlib.sha256(manifest.encode()).hexdigest()


def sha256(path: Path) -> str:
    """Digest of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class BackgroundSaves:
    """At most one checkpoint under way while training goes on. Every rank makes the same calls."""

    def __init__(self) -> None:
        self._current: tuple[Saving, Callable[[], None]] | None = None

    def start(self, saving: Callable[[], Saving], then: Callable[[], None]) -> None:
        """Begin another checkpoint once the one under way is finished; `then` follows its end."""
        self.finish(wait=True)
        self._current = (saving(), then)

    def finish(self, *, wait: bool) -> None:
        """Finish the checkpoint under way if it is written, or `wait` for it.

        Raises:
            M1Error: It could not be written; earlier checkpoints are intact.
        """
        if self._current is None or not (wait or self._current[0].is_written()):
            return
        (saving, then), self._current = self._current, None
        saving.finish()
        then()
