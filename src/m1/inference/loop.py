"""The engine in a thread of its own, fed from others: what a server needs around the core.

Over several ranks every rank runs one loop; the first takes requests and tells the others, so all
make the same steps.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from m1.inference.core import EngineCore, OnEnd, OnToken
from m1.inference.engine import require_newer
from m1.inference.params import SamplingParams
from m1.inference.sequences import Sequence
from m1.inference.weights import apply, stage
from m1.types import M1Error

_HEARTBEAT_SECONDS = 10.0


class EngineFailedError(M1Error):
    """The engine's thread has ended by an exception."""


class BusyError(Exception):
    """More requests wait than the engine takes; the caller should come again."""


@dataclass
class _Command:
    """What the loop does between two steps; the same on every rank."""

    kind: str
    key: int
    arguments: tuple[Any, ...] = ()
    future: "Future[Any] | None" = field(default=None, repr=False)
    on_token: OnToken | None = field(default=None, repr=False)
    on_end: OnEnd | None = field(default=None, repr=False)


class EngineLoop:
    """A core that steps in its own thread while there is work."""

    def __init__(
        self, core: EngineCore, model: torch.nn.Module, *, max_waiting: int = 1024
    ) -> None:
        """Wrap a core; `start` begins.

        Args:
            core: Not to be touched by others from now on.
            model: Its model, for new weights.
            max_waiting: Completions queued or running beyond which `submit` refuses.
        """
        self.core, self.model, self.max_waiting = core, model, max_waiting
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._sequences: dict[int, list[Sequence]] = {}
        self._key_of: dict[int, int] = {}
        """Arrival number in the core -> key."""
        self._group = core.runner.parameters.tensor_group or core.runner.parameters.expert_group
        self._is_first = self._group is None or self._group.rank() == 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._count = 0
        self._lock = threading.Lock()
        self._weights_lock = threading.Lock()
        self.num_pending = 0
        """Completions that have not ended."""
        self.after_step: Callable[[], None] | None = None
        """Called in the engine's thread after every step."""
        self.failure: BaseException | None = None
        """Why the loop ended, if it did not end by `stop`."""

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the current step; open requests are left as they are."""
        if self._thread.is_alive():
            self._commands.put(_Command("stop", 0))
            self._thread.join(timeout=60)

    def serve_as_follower(self) -> None:
        """On a rank that is not the first: step with the others until they stop."""
        self._run()

    def submit(
        self,
        prompt: tuple[int, ...],
        params: SamplingParams,
        seeds: tuple[int, ...],
        *,
        on_token: OnToken | None = None,
        on_end: OnEnd | None = None,
    ) -> tuple[int, "Future[Any]"]:
        """Queue a request.

        Args:
            prompt: Token ids.
            params: Sampling.
            seeds: One for each completion.
            on_token: Called in the engine's thread with every token.
            on_end: Called there with every completion that ends of itself.

        Returns:
            A key for `cancel`, and a future that is done when the request is accepted; it has the
            `M1Error` of one that is not.

        Raises:
            BusyError: Too many wait.
        """
        self.require_alive()
        with self._lock:
            if self.num_pending + len(seeds) > self.max_waiting:
                raise BusyError(
                    f"{self.num_pending} completions are under way and {len(seeds)} more would "
                    f"exceed {self.max_waiting}; come again later"
                )
            self.num_pending += len(seeds)
            self._count += 1
            key = self._count
        command = _Command("add", key, (prompt, params, seeds), Future(), on_token, on_end)
        self._commands.put(command)
        assert command.future is not None
        return key, command.future

    def cancel(self, key: int) -> None:
        """End a request now; harmless when it has ended."""
        self._commands.put(_Command("cancel", key))

    def load_weights(self, uri: str, version: int, *, recompute: bool = False) -> None:
        """Read new weights beside the running engine and swap them in between two steps.

        Args:
            uri: See `m1.inference.weights`.
            version: Of the policy; not below the present one.
            recompute: Whether running completions' states are made again from the new weights.

        Raises:
            M1Error: The weights are refused; the old ones stay and nothing is interrupted.
        """
        self.require_alive()
        with self._weights_lock:
            require_newer(version, self.core.policy_version)
            staged = None if self._group else stage(uri, self.model)
            future: Future[None] = Future()
            self._commands.put(_Command("load", 0, (uri, version, recompute, staged), future))
            future.result()

    def require_alive(self) -> None:
        """Raise `M1Error` if the engine has failed."""
        if self.failure is not None:
            raise EngineFailedError(f"the engine has failed ({self.failure!r}); restart it")

    def _run(self) -> None:
        try:
            while self._obey(self._next_commands()):
                if not self.core.is_idle:
                    for sequence in self.core.step():
                        self._forget(sequence)
                    if self.after_step is not None:
                        self.after_step()
        except BaseException as error:
            self.failure = error
            self._fail_all(error)
            raise

    def _next_commands(self) -> list[_Command]:
        found: list[_Command] = []
        if self._is_first:
            # Followers wait in a collective, which must not run into its time limit.
            patience = None if self._group is None else _HEARTBEAT_SECONDS
            with contextlib.suppress(queue.Empty):
                if self.core.is_idle:
                    found.append(self._commands.get(timeout=patience))
                while True:
                    found.append(self._commands.get_nowait())
        if self._group is None:
            return found
        plain: list[Any] = [[(c.kind, c.key, c.arguments) for c in found]]
        source = dist.get_global_rank(self._group, 0)
        dist.broadcast_object_list(plain, src=source, group=self._group)
        return found if self._is_first else [_Command(*entry) for entry in plain[0]]

    def _obey(self, commands: list[_Command]) -> bool:
        for command in commands:
            if command.kind == "stop":
                return False
            try:
                self._do(command)
            except M1Error as error:
                if command.kind == "add":
                    self._ended(len(command.arguments[2]))
                if command.future is not None:
                    command.future.set_exception(error)
            else:
                if command.future is not None:
                    command.future.set_result(None)
        return True

    def _do(self, command: _Command) -> None:
        if command.kind == "add":
            prompt, params, seeds = command.arguments
            added = self.core.add(
                prompt, params, seeds, on_token=command.on_token, on_end=command.on_end
            )
            self._sequences[command.key] = added
            self._key_of[added[0].order[0]] = command.key
        elif command.kind == "cancel":
            for sequence in self._sequences.pop(command.key, ()):
                self._key_of.pop(sequence.order[0], None)
                if sequence.finish_reason is None:
                    self.core.cancel(sequence)
                    self._ended(1)
        elif command.kind == "load":
            self._swap_weights(*command.arguments)

    def _swap_weights(
        self, uri: str, version: int, recompute: bool, staged: dict[str, torch.Tensor] | None
    ) -> None:
        if staged is None:
            staged = self._stage_together(uri)
        apply(staged, self.model)
        self.core.weights_changed(version=version, recompute=recompute)

    def _stage_together(self, uri: str) -> dict[str, torch.Tensor]:
        """Stage on all ranks; if one refuses, all do."""
        staged, refusal = None, None
        try:
            staged = stage(uri, self.model)
        except M1Error as error:
            refusal = str(error)
        refusals: list[Any] = [None] * self._group.size()
        dist.all_gather_object(refusals, refusal, group=self._group)
        reasons = [reason for reason in refusals if reason]
        if reasons or staged is None:
            raise M1Error(reasons[0])
        return staged

    def _forget(self, sequence: Sequence) -> None:
        self._ended(1)
        arrival = sequence.order[0]
        key = self._key_of.get(arrival, 0)
        if all(other.finish_reason is not None for other in self._sequences.get(key, ())):
            self._sequences.pop(key, None)
            self._key_of.pop(arrival, None)

    def _ended(self, count: int) -> None:
        with self._lock:
            self.num_pending -= count

    def _fail_all(self, error: BaseException) -> None:
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            if command.future is not None:
                command.future.set_exception(EngineFailedError(f"it has failed ({error!r})"))


def wait_until_idle(loop: EngineLoop, *, timeout_seconds: float) -> bool:
    """Wait for open requests to end; returns whether they did."""
    deadline = time.monotonic() + timeout_seconds
    while loop.num_pending and time.monotonic() < deadline:
        time.sleep(0.02)
    return not loop.num_pending
