"""Which sandbox this machine can offer."""

from m1.sandbox import bubblewrap, prepared
from m1.sandbox.base import Limits, Sandbox, SandboxError
from m1.sandbox.bubblewrap import BubblewrapSandbox
from m1.sandbox.prepared import PreparedSandbox
from m1.sandbox.unprotected import UnprotectedProcess


def open_sandbox(
    *,
    limits: Limits | None = None,
    is_trusted: bool = False,
    is_strict: bool = False,
    purpose: str | None = None,
) -> Sandbox:
    """A sandbox for untrusted programs, or where there is none a plain process for trusted ones.

    Args:
        limits: Defaults of every `exec`.
        is_trusted: Whether the programs are the caller's own.
        is_strict: Refuse what is weaker than the full sandbox (no control group, no filter).
        purpose: For many short commands: boxes prepared for this purpose, where they work.

    Raises:
        SandboxError: The programs are untrusted and cannot be isolated as asked.
    """
    reason = bubblewrap.failure()
    if reason is None and is_strict and bubblewrap.weaknesses():
        reason = "; ".join(bubblewrap.weaknesses())
    if reason is None and purpose is not None and prepared.failure() is None:
        return PreparedSandbox(limits=limits, purpose=purpose)
    if reason is None:
        return BubblewrapSandbox(limits=limits)
    if is_trusted:
        return UnprotectedProcess(limits=limits)
    raise SandboxError(f"untrusted programs cannot be isolated here: {reason}")
