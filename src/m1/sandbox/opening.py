"""Which sandbox this machine or cluster can offer."""

from collections.abc import Callable

from m1.sandbox import bubblewrap, prepared
from m1.sandbox.base import Backend, Limits, SandboxError, SealedSandbox
from m1.sandbox.pods import ClusterConfig
from m1.sandbox.prepared import PreparedSandbox
from m1.sandbox.sealed import SealedBubblewrap
from m1.sandbox.unprotected import UnprotectedProcess

BACKENDS = ("bubblewrap", "kubernetes", "agent-sandbox")


def open_sealed(
    *,
    limits: Limits | None = None,
    is_trusted: bool = False,
    is_strict: bool = False,
    purpose: str | None = None,
) -> SealedSandbox:
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
        return SealedBubblewrap(limits=limits)
    if is_trusted:
        return UnprotectedProcess(limits=limits)
    raise SandboxError(f"untrusted programs cannot be isolated here: {reason}")


def open_backend(
    name: str, *, cluster: ClusterConfig | None = None, is_strict: bool = True
) -> Backend:
    """A backend by its name.

    Args:
        name: One of `BACKENDS`.
        cluster: Where and how, for those of a cluster.
        is_strict: Refuse a machine or a namespace that isolates less than it should.

    Raises:
        SandboxError: There is no such backend, or it cannot be used here.
    """

    def local() -> Backend:
        from m1.sandbox.local import BubblewrapBackend

        return BubblewrapBackend(is_strict=is_strict)

    def kubernetes() -> Backend:
        from m1.sandbox.kubernetes import KubernetesBackend

        return KubernetesBackend(cluster, is_strict=is_strict)

    def agent_sandbox() -> Backend:
        from m1.sandbox.agent_sandbox import AgentSandboxBackend

        return AgentSandboxBackend(cluster, is_strict=is_strict)

    openers: dict[str, Callable[[], Backend]] = dict(
        zip(BACKENDS, (local, kubernetes, agent_sandbox), strict=True)
    )
    if name not in openers:
        raise SandboxError(f"no backend {name!r}; there are {', '.join(BACKENDS)}")
    return openers[name]()
