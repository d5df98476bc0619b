"""Inference servers behind a name: all that it resolves to, and those that come later."""

import os
import socket
import threading
from collections.abc import Callable, Iterable
from urllib.parse import urlsplit

from m1.rollout.workers import Worker, WorkerPool
from m1.types import M1Error

CLUSTER = "cluster"
"""Stands in `rl.rollout.urls` for the servers of `resources.rollout`."""
SERVERS_VARIABLE = "M1_ROLLOUT_SERVERS"
"""Where they are, as the launcher found: `dns+http://NAME:PORT`."""
_DNS = "dns+"
_LOOK_SECONDS = 15.0


def is_name(url: str) -> bool:
    """Whether a url stands for several servers."""
    return url == CLUSTER or url.startswith(_DNS)


def expand(urls: Iterable[str]) -> list[str]:
    """One url for each server.

    Raises:
        M1Error: A name cannot be resolved, or `cluster` is used outside of one.
    """
    found: dict[str, None] = {}
    for url in urls:
        found |= dict.fromkeys(_addresses(url) if is_name(url) else [url])
    return list(found)


def _addresses(url: str) -> list[str]:
    if url == CLUSTER:
        url = os.environ.get(SERVERS_VARIABLE, "")
        if not url:
            raise M1Error(
                "rl.rollout.urls names the cluster's servers, but none were made: the stage does "
                "not run there, or the recipe has no resources.rollout; give num_workers or urls"
            )
    parts = urlsplit(url.removeprefix(_DNS))
    try:
        answers = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise M1Error(
            f"no inference server is found at {parts.hostname}: {error}; see whether its pods are "
            "ready"
        ) from None
    hosts = sorted({str(answer[4][0]) for answer in answers})
    return [f"{parts.scheme}://{f'[{h}]' if ':' in h else h}:{parts.port}" for h in hosts]


class Discovery:
    """Has servers that appear behind a name join a pool, from a thread. Closed before the pool."""

    def __init__(
        self,
        pool: WorkerPool,
        urls: Iterable[str],
        known: Iterable[str],
        *,
        worker: Callable[[str], Worker],
        look_seconds: float = _LOOK_SECONDS,
    ) -> None:
        """Start looking.

        Args:
            pool: Gets the servers.
            urls: Names and addresses, as the recipe gives them.
            known: Addresses that the pool has.
            worker: Makes one of an address.
            look_seconds: Between two looks.
        """
        self._pool, self._urls, self._known = pool, list(urls), set(known)
        self._worker, self._look_seconds = worker, look_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        if any(is_name(url) for url in self._urls):
            self._thread.start()

    def close(self) -> None:
        """Stop looking."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._look_seconds):
            try:
                found = expand(self._urls)
            except M1Error:  # a moment without ready servers; the pool waits for its own
                continue
            for url in found:
                if url not in self._known:
                    self._known.add(url)
                    self._pool.join(self._worker(url))
