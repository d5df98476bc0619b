"""One command in a pod through the API server: bounded, timed, and everything dead afterwards.

A wrapper shell inside sets the bounds, runs the command, kills all other processes of the pod and
reports what was used. Where the wrapper itself is killed, or the command outlives its time, a
second exec does the killing. What the wrapper says is trusted for no more than naming a limit.
"""

import json
import select
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from m1.sandbox.base import ExecResult, Limits, OutputSink, SandboxError, SandboxGone, met_cpu_limit

_STDOUT, _STDERR, _STATUS = 1, 2, 3
_STDERR_BYTES = 64 << 10
_PIECE = 16 << 10
_SLICE_SECONDS = 0.5
_OWN_PROCESSES = 4
_SWEEP_SECONDS = 20.0
_MARK = b"\nm1-sandbox-report "

_REPORT = r"""
report() {
  cpu=$(cat /sys/fs/cgroup/cpuacct/cpuacct.usage 2>/dev/null) ||
    cpu=$(sed -n 's/^usage_usec \(.*\)/\1000/p' /sys/fs/cgroup/cpu.stat 2>/dev/null)
  oom=$(sed -n 's/^oom_kill //p' /sys/fs/cgroup/memory/memory.oom_control \
    /sys/fs/cgroup/memory.events 2>/dev/null)
  set -- $(stat -f -c '%b %f %S' /tmp)
  printf '\nm1-sandbox-report %s %s %s\n' "${cpu:-0}" "${oom:-0}" $((($1 - $2) * $3)) >&2
}
"""
# One argument after another: seconds, 512-byte blocks, processes, bytes of input, folder, command.
_WRAPPER = (
    _REPORT
    + r"""
ulimit -c 0; ulimit -t "$1"; ulimit -f "$2"
(ulimit -u "$3") 2>/dev/null && limit=-u || limit=-p
size=$4; cd -- "$5" || exit 126
count=$3; shift 5
head -c "$size" | (ulimit $limit "$count"; exec env -i "$@")
code=$?
kill -9 -1 2>/dev/null
report
exit $code
"""
)
_SWEEP = _REPORT + "kill -9 -1 2>/dev/null; report"


@dataclass(frozen=True)
class PodAddress:
    """Where a sandbox's container is."""

    namespace: str
    pod: str
    container: str = "sandbox"


@dataclass(frozen=True)
class Usage:
    """What a pod has used since it started."""

    cpu_seconds: float = 0.0
    num_out_of_memory: int = 0
    scratch_bytes: int = 0


@dataclass
class _Streams:
    stdout: bytearray = field(default_factory=bytearray)
    stderr: bytearray = field(default_factory=bytearray)
    status: bytearray = field(default_factory=bytearray)
    stopped_by: str | None = None


class PodExecutor:
    """Runs commands in one pod, one at a time."""

    def __init__(self, configuration: Any, address: PodAddress) -> None:
        """Remember where; nothing is sent.

        Args:
            configuration: `kubernetes.client.Configuration`.
            address: The container.
        """
        self._configuration = configuration
        self._address = address
        self._usage = Usage()

    def run(
        self,
        command: Sequence[str],
        *,
        stdin: bytes,
        limits: Limits,
        environment: Mapping[str, str],
        folder: str,
        on_output: OutputSink | None,
    ) -> ExecResult:
        """Run a command; see `Sandbox.exec`."""
        started = time.monotonic()
        variables = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", **environment}
        numbers = [
            max(1, int(-(-limits.cpu_seconds // 1))),
            limits.scratch_mib * 2048,
            limits.num_processes + _OWN_PROCESSES,
            len(stdin),
        ]
        # Quoting is the shell's: the command is its arguments, never part of the script.
        arguments = [*map(str, numbers), folder]
        pairs = [f"{name}={value}" for name, value in variables.items()]
        wrapped = ["sh", "-c", _WRAPPER, "sh", *arguments, *pairs, *command]
        streams = self._exchange(wrapped, stdin, limits, on_output)
        before, usage = self._usage, _report(streams)
        if usage is None or streams.stopped_by:
            usage = _report(self._sweep()) or usage or before
        self._usage = usage
        cpu = max(0.0, usage.cpu_seconds - before.cpu_seconds)
        code = _exit_code(streams)
        return ExecResult(
            exit_code=code,
            stdout=bytes(streams.stdout[: limits.output_bytes]),
            stderr=_without_report(streams),
            seconds=time.monotonic() - started,
            cpu_seconds=cpu,
            stopped_by=streams.stopped_by or _limit_met(limits, before, usage, cpu, code),
        )

    def _sweep(self) -> _Streams:
        """Kill every process but the first."""
        limits = Limits(wall_seconds=_SWEEP_SECONDS)
        streams = self._exchange(["sh", "-c", _SWEEP], b"", limits, None)
        if streams.stopped_by or not streams.status:
            raise SandboxError(f"processes in pod {self._address.pod} could not be killed")
        return streams

    def _exchange(
        self, command: list[str], stdin: bytes, limits: Limits, on_output: OutputSink | None
    ) -> _Streams:
        """Drive the websocket until the command's status comes or a limit is met."""
        from websocket import WebSocketException

        streams = _Streams()
        deadline = time.monotonic() + limits.wall_seconds
        link = self._connect(command, has_input=bool(stdin))
        try:
            for channel, data in _frames(link, stdin, deadline):
                _keep(streams, channel, data, on_output)
                if len(streams.stdout) > limits.output_bytes:
                    streams.stopped_by = "output"
                    return streams
                if streams.status:
                    return streams
        except TimeoutError:
            streams.stopped_by = "wall"
        except (OSError, WebSocketException) as error:
            raise SandboxError(
                f"connection to pod {self._address.pod} was lost: {error}"
            ) from error
        finally:
            link.close()
        if streams.stopped_by is None and not streams.status:
            raise SandboxError(f"pod {self._address.pod} closed the connection without a status")
        return streams

    def _connect(self, command: list[str], *, has_input: bool) -> Any:
        """An open `websocket.WebSocket`; a client of its own, as `stream` changes the client."""
        from kubernetes import client
        from kubernetes.stream import stream

        core = client.CoreV1Api(client.ApiClient(self._configuration))
        try:
            link = stream(
                core.connect_get_namespaced_pod_exec,
                self._address.pod,
                self._address.namespace,
                container=self._address.container,
                command=command,
                stdin=has_input,
                stdout=True,
                stderr=True,
                tty=False,
                binary=True,
                _preload_content=False,
            )
        except client.ApiException as error:
            if "404" in str(error.reason) or error.status == 404:
                raise SandboxGone(f"pod {self._address.pod} does not exist any more") from error
            raise SandboxError(f"pod {self._address.pod} is out of reach: {error}") from error
        return link.sock


def _frames(link: Any, stdin: bytes, deadline: float) -> Iterator[tuple[int, bytes]]:
    """Pieces of the channels as they come, while input is sent as it is taken.

    Raises:
        TimeoutError: The deadline has passed.
    """
    from websocket import ABNF

    rest = memoryview(stdin)
    poll = select.poll()
    poll.register(link.sock, select.POLLIN | (select.POLLOUT if stdin else 0))
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        has_pending = getattr(link.sock, "pending", lambda: 0)() > 0
        events = poll.poll(0 if has_pending else 1000 * min(left, _SLICE_SECONDS))
        ready = events[0][1] if events else 0
        if len(rest) and ready & select.POLLOUT and not ready & select.POLLIN:
            link.send(b"\0" + rest[:_PIECE], opcode=ABNF.OPCODE_BINARY)
            rest = rest[_PIECE:]
            if not len(rest):
                poll.modify(link.sock, select.POLLIN)
        if has_pending or ready & ~select.POLLOUT:
            link.settimeout(max(1.0, left))
            operation, frame = link.recv_data_frame(True)
            if operation == ABNF.OPCODE_CLOSE:
                return
            if operation in (ABNF.OPCODE_BINARY, ABNF.OPCODE_TEXT) and len(frame.data) > 1:
                yield frame.data[0], frame.data[1:]


def _keep(streams: _Streams, channel: int, data: bytes, on_output: OutputSink | None) -> None:
    if channel == _STATUS:
        streams.status += data
        return
    if channel == _STDOUT:
        streams.stdout += data
    elif channel == _STDERR:
        streams.stderr += data
        # The report comes last: the middle of too much is dropped, not the end.
        if len(streams.stderr) > 2 * _STDERR_BYTES:
            del streams.stderr[_STDERR_BYTES:-1024]
    if on_output is not None and channel in (_STDOUT, _STDERR):
        shown = data.partition(_MARK)[0] if channel == _STDERR else data
        if shown:
            on_output("stdout" if channel == _STDOUT else "stderr", shown)


def _report(streams: _Streams) -> Usage | None:
    """The wrapper's last words, if they are there and make sense."""
    said = bytes(streams.stderr).rpartition(_MARK)[2].split()
    if not streams.stderr.count(_MARK) or len(said) != 3:
        return None
    try:
        return Usage(int(said[0]) / 1e9, int(said[1]), int(said[2]))
    except ValueError:
        return None


def _without_report(streams: _Streams) -> bytes:
    text = bytes(streams.stderr)
    if _MARK in text:
        text = text.rpartition(_MARK)[0]
    return text[:_STDERR_BYTES]


def _exit_code(streams: _Streams) -> int:
    """From the status object of the API; 137 for a command that was killed by us."""
    if not streams.status:
        return 137
    status = json.loads(bytes(streams.status))
    if status.get("status") == "Success":
        return 0
    for cause in status.get("details", {}).get("causes", []):
        if cause.get("reason") == "ExitCode":
            return int(cause["message"])
    message = str(status.get("message", ""))
    if "not found" in message and "container" in message:
        raise SandboxGone(message)
    raise SandboxError(f"the command could not start: {message[:300]}")


def _limit_met(
    limits: Limits, before: Usage, after: Usage, cpu: float, exit_code: int
) -> str | None:
    if after.num_out_of_memory > before.num_out_of_memory:
        return "memory"
    if met_cpu_limit(limits, cpu, exit_code):
        return "cpu"
    return "disk" if after.scratch_bytes > limits.scratch_mib << 20 else None
