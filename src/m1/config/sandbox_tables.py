"""The recipe's table of software engineering tasks."""

from typing import Annotated

from pydantic import Field

from m1.config.base import Config, PositiveInt


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
    num_parallel: PositiveInt = 1
    """Pairs worked on at once."""
    test_seconds: Annotated[float, Field(gt=0)] = 60.0
    """After which a single test is killed."""
