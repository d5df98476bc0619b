"""The local sandbox: a writable root over environments that never change.

With an image its folder is the root, copy-on-write. Without one the root is read-only and shows
this machine's /usr; /work, /tmp and the layers can be written. All that is written lies on one
bounded filesystem. Images and layers are the lower side of overlays where the
sandbox's user owns them (`store.give_to_sandbox`) and bubblewrap is 0.11 or newer; they are copied
otherwise. Each `exec` is a bubblewrap of its own, so no process, mount or socket survives it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path, PurePosixPath

from m1.sandbox import bubblewrap, cgroup, store
from m1.sandbox.base import (
    WORK,
    ClosedAtExit,
    Environment,
    ExecResult,
    Limits,
    OutputSink,
    SandboxError,
    SandboxGone,
)
from m1.sandbox.files import FilesByCommands


class BubblewrapBackend:
    """Sandboxes on this machine; see `base.Backend`."""

    name = "bubblewrap"

    def __init__(self, *, is_strict: bool = False) -> None:
        """Find out what this machine can do.

        Args:
            is_strict: Refuse what is weaker than the full sandbox (no control group, no filter).

        Raises:
            SandboxError: Nothing can be isolated here, or not as asked.
        """
        reason = bubblewrap.failure()
        if reason is None and is_strict and bubblewrap.weaknesses():
            reason = "; ".join(bubblewrap.weaknesses())
        if reason is not None:
            raise SandboxError(f"untrusted programs cannot be isolated here: {reason}")

    def open(
        self, environment: Environment | None = None, *, limits: Limits | None = None
    ) -> "BubblewrapSandbox":
        """A fresh sandbox; a layer that is copied takes its part of `scratch_mib`."""
        return BubblewrapSandbox(environment or Environment(), limits or Limits())

    def collect_garbage(self) -> int:
        """Remove what sandboxes of dead processes left: groups, mounts, folders."""
        return cgroup.sweep() + store.sweep()


class BubblewrapSandbox(ClosedAtExit, FilesByCommands):
    """One bounded filesystem and the mounts that show it; see `base.Sandbox`."""

    def __init__(
        self, environment: Environment, limits: Limits, *, written: Path | None = None
    ) -> None:
        """Lay out the filesystem.

        Args:
            environment: What it begins with.
            limits: Defaults of `exec`, and the size of the filesystem.
            written: What another sandbox of this environment wrote, to begin with too.
        """
        self._limits = limits
        self._environment = environment
        _check_paths(environment)
        self._store = store.Store(limits)
        self._is_closed = False
        try:
            self._written = self._store.make("written")
            self._store.make("work")
            if written is not None:
                self._store.copy_in(written, self._written)
            self._mounts = self._lay_out(is_fresh=written is None)
        except BaseException:
            self._store.remove()
            raise

    @property
    def name(self) -> str:
        """The folder's name."""
        return self._store.folder.name

    def exec(
        self,
        command: Sequence[str],
        *,
        stdin: bytes = b"",
        limits: Limits | None = None,
        environment: Mapping[str, str] | None = None,
        folder: str = WORK,
        on_output: OutputSink | None = None,
    ) -> ExecResult:
        """Run a command; see `Sandbox.exec`."""
        if self._is_closed:
            raise SandboxError("the sandbox is closed")
        if not self._store.folder.exists():
            raise SandboxGone(f"{self._store.folder} was removed")
        damaged = self._damaged_root()
        if damaged:
            message = f"{damaged} of this sandbox was replaced; no command can start\n".encode()
            return ExecResult(126, b"", message, 0.0, 0.0)
        result = bubblewrap.launch(
            self._mounts,
            command,
            limits=limits or self._limits,
            stdin=stdin,
            environment=environment,
            folder=folder,
            on_output=on_output,
        )
        if self._store.is_over():
            return replace(result, stopped_by=result.stopped_by or "disk")
        return result

    def renew(self, seconds: float) -> None:
        """Nothing to do: what this process leaves is known by its being dead."""

    def fork(self) -> "BubblewrapSandbox":
        """Another sandbox with all this one's files."""
        if self._is_closed:
            raise SandboxError("the sandbox is closed")
        return BubblewrapSandbox(self._environment, self._limits, written=self._written)

    def close(self) -> None:
        """Unmount and remove everything."""
        self._is_closed = True
        self._store.remove()

    def _lay_out(self, *, is_fresh: bool) -> list[str]:
        """Bubblewrap's arguments; folders that are written get their place in the store."""
        given = self._environment
        writable = {"/tmp": None, WORK: None, **given.layers}
        mounts = [*bubblewrap.system_mounts()]
        if given.image:
            mounts = self._writable("/", Path(given.image), is_fresh=is_fresh)
        mounts += bubblewrap.DEVICES
        for path in sorted({*writable, *given.read_only}, key=lambda path: path.count("/")):
            if path in given.read_only:
                mounts += ["--ro-bind", str(given.read_only[path]), path]
            else:
                mounts += self._writable(path, writable[path], is_fresh=is_fresh)
        return mounts if given.image else [*mounts, "--remount-ro", "/"]

    def _writable(self, path: str, source: Path | None, *, is_fresh: bool) -> list[str]:
        """Mount a folder that can be written: over a source, a copy of it, or empty."""
        name = _name(path)
        upper = self._written / name
        if is_fresh:
            self._store.make(f"written/{name}", mode=0o1777 if path == "/tmp" else 0o755)
        if source is None:
            return ["--bind", str(upper), path]
        if store.is_shared(source) and can_overlay():
            work = self._store.make(f"work/{name}")
            return ["--overlay-src", str(source), "--overlay", str(upper), str(work), path]
        if is_fresh:
            self._store.copy_in(source, upper)
            self._store.adopt(upper)
        return ["--bind", str(upper), path]

    def _damaged_root(self) -> str | None:
        """A folder that must be mounted on and that a command replaced by something else."""
        if not self._environment.image:
            return None
        root = self._written / _name("/")
        for name in ("proc", "dev", "tmp", "work"):
            path = root / name
            if path.is_symlink() or (path.exists() and not path.is_dir()):
                return f"/{name}"
        return None


@cache
def can_overlay() -> bool:
    """Whether this bubblewrap and this kernel mount overlays for the sandbox's user."""
    place = store.Store(Limits(scratch_mib=1, num_files=64))
    try:
        lower, upper, work = (str(place.make(name)) for name in ("lower", "upper", "work"))
        mounts = [*bubblewrap.system_mounts(), *bubblewrap.DEVICES]
        mounts += ["--overlay-src", lower, "--overlay", upper, work, WORK]
        # Replacing a folder is what fails where the filesystem keeps no attributes.
        command = ["sh", "-c", "mkdir a && rmdir a && mkdir a"]
        return bubblewrap.launch(mounts, command, limits=Limits()).exit_code == 0
    except SandboxError:
        return False
    finally:
        place.remove()


def _name(path: str) -> str:
    return path.strip("/").replace("/", "+") or "root"


def _check_paths(environment: Environment) -> None:
    """Refuse layouts in which a command could swap a mount's parent for a link."""
    mounted = {"/", "/tmp", WORK, *environment.layers, *environment.read_only}
    sources = {**environment.layers, **environment.read_only}
    for path, source in sources.items():
        place = PurePosixPath(path)
        if not place.is_absolute() or ".." in place.parts or str(place) != path or path == "/":
            raise SandboxError(f"layer path {path!r} must be absolute, plain and below the root")
        if not source.is_dir():
            raise SandboxError(f"the layer of {path} is {source}, which is no folder")
        for parent in place.parents:
            is_fixed = str(parent) in mounted or not _is_written(parent, environment)
            if not is_fixed:
                raise SandboxError(
                    f"layer {path} lies in {parent}, which commands can rename; "
                    f"make {parent} a layer too, or mount it directly below one"
                )
        for outer, folder in sources.items():
            if place != PurePosixPath(outer) and place.is_relative_to(outer):
                inner = folder / place.relative_to(outer)
                if inner.is_symlink():
                    raise SandboxError(f"layer {path} would be mounted on {inner}, which is a link")
    if environment.image and not Path(environment.image).is_dir():
        raise SandboxError(f"image {environment.image!r} is no folder of this machine")


def _is_written(folder: PurePosixPath, environment: Environment) -> bool:
    if environment.image:
        return True
    tops = [top for top in ("/tmp", WORK, *environment.layers) if folder.is_relative_to(top)]
    return bool(tops) and not any(folder.is_relative_to(top) for top in environment.read_only)
