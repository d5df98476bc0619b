"""The recipe's table of software engineering tasks."""

from typing import Annotated, Literal

from pydantic import Field

from m1.config.base import Config, NonNegativeInt, PositiveFloat, PositiveInt

SWE = "swe"
"""Task source and verifier of software engineering tasks."""


class PairConfig(Config):
    """Two source releases of a package; the newer one mends a fault of the older one."""

    package: str
    """Name on the package index."""
    base_version: str
    """Release with the fault."""
    fix_version: str
    """Release without it, whose tests show it."""
    base_sha256: str = ""
    """Of the older release's source archive; empty: what the index says."""
    fix_sha256: str = ""
    """Of the newer one's."""


class SandboxConfig(Config):
    """The sandbox stage: environments for software engineering tasks, built and validated."""

    pairs: tuple[PairConfig, ...] = ()
    """Pairs to build; without any, or with no package index in reach, a small project of our own
    serves."""
    num_runs: PositiveInt = 3
    """Runs of the faulty tree and of the solution, all of which must agree."""
    num_heldout: NonNegativeInt = 0
    """Instances kept for evaluation, at least; whole repositories, so that none is in RL too."""
    num_parallel: PositiveInt = 1
    """Pairs worked on at once."""
    test_seconds: Annotated[float, Field(gt=0)] = 60.0
    """After which a single test is killed."""


class EpisodesConfig(Config):
    """Software engineering tasks of the sandbox stage: budgets of an episode, and its reward."""

    max_turns: PositiveInt = 40
    """Commands and edits of an episode."""
    max_reply_tokens: PositiveInt = 2048
    """Of one turn, in place of `sampling.max_new_tokens`."""
    max_tokens: PositiveInt = 32_768
    """Of a whole conversation."""
    max_seconds: PositiveFloat = 1800.0
    """Wall time of an episode, the model's share included."""
    command_seconds: PositiveFloat = 60.0
    """Wall time of a command."""
    max_observation_characters: PositiveInt = 8_000
    """Longer output is shortened in the middle."""
    num_parallel: PositiveInt = 8
    """Sandboxes at once."""
    test_seconds: PositiveFloat = 60.0
    """After which a single test of the grading is killed."""
    policy: Literal["all_or_nothing", "regressions_negative", "partial_credit"] = "all_or_nothing"
    """Reward of a graded patch (paper sec. 4.1: all or nothing)."""
    deny_exploits: bool = True
    """Whether an episode with signs of going for the reward earns none, solved or not."""


def episode_mistakes(**others: bool) -> list[str]:
    """Settings of [rl], by name and whether they are in use, that episodes do not go with."""
    return [
        f"episodes is present, but {name} asks for what only completions of one turn can do; "
        f"leave out {name} or episodes"
        for name, is_used in others.items()
        if is_used
    ]
