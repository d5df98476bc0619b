"""Which sandbox this machine can offer."""

from m1.sandbox import bubblewrap
from m1.sandbox.base import Limits, SandboxError, SealedSandbox
from m1.sandbox.sealed import SealedBubblewrap
from m1.sandbox.unprotected import UnprotectedProcess


def open_sealed(
    *, limits: Limits | None = None, is_trusted: bool = False, is_strict: bool = False
) -> SealedSandbox:
    """A sandbox for untrusted programs, or where there is none a plain process for trusted ones.

    Args:
        limits: Defaults of every `exec`.
        is_trusted: Whether the programs are the caller's own.
        is_strict: Refuse what is weaker than the full sandbox (no control group, no filter).

    Raises:
        SandboxError: The programs are untrusted and cannot be isolated as asked.
    """
    reason = bubblewrap.failure()
    if reason is None and is_strict and bubblewrap.weaknesses():
        reason = "; ".join(bubblewrap.weaknesses())
    if reason is None:
        return SealedBubblewrap(limits=limits)
    if is_trusted:
        return UnprotectedProcess(limits=limits)
    raise SandboxError(f"untrusted programs cannot be isolated here: {reason}")
