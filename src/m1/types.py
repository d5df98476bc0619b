"""What the rooms of the house pass to each other. Standard library only, frozen."""

from dataclasses import dataclass, field
from typing import Any


class M1Error(Exception):
    """A condition the user can mend; the message says what was given, why it fails, the remedy."""


@dataclass(frozen=True)
class Task:
    """An immutable dataset row with a checkable answer."""

    task_id: str
    source: str
    prompt: str
    reference: str
    verifier: str
    metadata: dict[str, Any] = field(default_factory=dict)
    domain: str = ""
    """`maths`, `logic`, `code`, `instructions`, or empty where the source does not say."""
    difficulty: float | None = None
    """Larger is harder, comparable within a source only; None when unknown."""


@dataclass(frozen=True)
class Verdict:
    """What a verifier says of a completion."""

    accuracy: float
    """1 right, 0 wrong."""
    reason: str
    """Why, a short name such as `equal`, `no_answer` or `timeout`; detail may follow a colon."""
    parts: dict[str, float] = field(default_factory=dict)
    """Measurements beside the accuracy, such as the share of tests passed."""


@dataclass(frozen=True)
class RoutedExperts:
    """Experts that computed every token but the last (which no model has read), in each layer."""

    values: str
    """Base64 of little-endian int16 [prompt + completion tokens - 1, layers, k]."""
    num_layers: int
    top_k: int
    """k."""


@dataclass(frozen=True)
class Completion:
    """Tokens that a policy sampled after a prompt, with what the sampler knew about them."""

    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Natural log-probability of each token under the sampling engine before temperature and
    top-p."""
    entropies: tuple[float, ...]
    """Entropy in nats of each next-token distribution before temperature and top-p."""
    finish_reason: str
    """`stop`, `length` or `repetition`."""
    policy_versions: tuple[int, ...]
    """Version of the weights that made each token."""
    routed_experts: RoutedExperts | None = None
    """Experts by token and layer, where the engine was asked to record them."""
    loss_mask: tuple[bool, ...] | None = None
    """True where the policy sampled, of a conversation of several turns, whose other tokens (what
    the environment said) have log-probability and entropy 0; None: everywhere."""


@dataclass(frozen=True)
class Reward:
    """A training reward and its parts; `accuracy` is the unshaped correctness for filtering."""

    total: float
    accuracy: float
    parts: dict[str, float]
    is_failed: bool = False
    """True after an infrastructure failure: the rollout is left out, never scored zero."""


@dataclass(frozen=True)
class Rollout:
    """One episode: a completion of a task and its reward."""

    task: Task
    completion: Completion
    reward: Reward


@dataclass(frozen=True)
class RolloutGroup:
    """The G rollouts of one task."""

    task: Task
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True)
class Pointer:
    """What passes between stages: where a finished output lies and its digest. Written last."""

    stage: str
    stage_hash: str
    uri: str
    digest: str
    """sha256 over the sorted (relative path, size, sha256) of every file below `uri`."""
    step: int | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
