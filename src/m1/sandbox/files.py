"""Files in and out of a sandbox through commands that run inside it.

Nothing of a sandbox's filesystem is ever opened from outside, so a link, a device or a folder that
is swapped in between can only mislead the sandbox itself. What comes out is bytes.
"""

import io
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from m1.sandbox.base import MIB, WORK, ExecResult, Limits, OutputSink, SandboxError

_WRITE = """
case "$1" in */*) mkdir -p -- "${1%/*}" || exit;; esac
if [ -d "$1" ]; then echo "$1 is a folder" >&2; exit 1; fi
head -c "$2" > "$1" && chmod "$3" -- "$1"
"""
_READ = """
if [ ! -f "$1" ]; then echo "$1 is no plain file" >&2; exit 1; fi
exec head -c "$2" -- "$1"
"""
_UNPACK = 'mkdir -p -- "$1" && head -c "$2" | tar -x --no-same-owner -C "$1" -f -'


class _Executes(Protocol):
    _limits: Limits

    def exec(
        self,
        command: Sequence[str],
        *,
        stdin: bytes = b"",
        limits: Limits | None = None,
        environment: Mapping[str, str] | None = None,
        folder: str = WORK,
        on_output: OutputSink | None = None,
    ) -> ExecResult: ...


class FilesByCommands:
    """`write_file`, `read_file` and `write_folder` of `base.Sandbox`, given its `exec`."""

    def write_file(self: _Executes, path: str, data: bytes, *, is_executable: bool = False) -> None:
        """Create or replace a file; see `Sandbox.write_file`."""
        mode = "755" if is_executable else "644"
        _checked(path, _script(self, _WRITE, path, str(len(data)), mode, stdin=data))

    def read_file(self: _Executes, path: str, *, max_bytes: int = 8 * MIB) -> bytes:
        """What a file holds; see `Sandbox.read_file`."""
        limits = replace(self._limits, output_bytes=max_bytes + 1)
        result = _script(self, _READ, path, str(max_bytes + 1), limits=limits)
        if len(result.stdout) > max_bytes:
            raise SandboxError(f"{path} is larger than max_bytes ({max_bytes})")
        return _checked(path, result).stdout

    def write_folder(self: _Executes, path: str, source: Path) -> None:
        """Copy a folder of this machine; see `Sandbox.write_folder`."""
        packed = pack(source)
        _checked(path, _script(self, _UNPACK, path, str(len(packed)), stdin=packed))


def pack(source: Path) -> bytes:
    """A folder's content as a tar archive, owned by nobody in particular."""

    def anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        return entry

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path in sorted(source.iterdir()):
            archive.add(path, arcname=path.name, filter=anonymous)
    return buffer.getvalue()


def _script(
    sandbox: _Executes,
    script: str,
    *arguments: str,
    stdin: bytes = b"",
    limits: Limits | None = None,
) -> ExecResult:
    return sandbox.exec(["sh", "-c", script, "sh", *arguments], stdin=stdin, limits=limits)


def _checked(path: str, result: ExecResult) -> ExecResult:
    if result.exit_code or result.stopped_by:
        said = result.stderr.decode(errors="replace").strip()[-300:]
        reason = said or f"stopped by {result.stopped_by or f'status {result.exit_code}'}"
        raise SandboxError(f"file {path!r} in the sandbox: {reason}")
    return result
