"""Verifiers by name: where each one's code is, and what it may use."""

import importlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from m1.types import M1Error, Task, Verdict

Verifier = Callable[[Task, str], Verdict]
"""A pure function of a task and a completion's text. It raises only when it, not the completion, is
at fault."""


@dataclass(frozen=True)
class VerifierSpec:
    """One kind of verifier."""

    module: str
    """Imported only where the verifier runs; has a function `verify`."""
    timeout_seconds: float
    """Wall time of one verdict. Twice this much where the verifier itself bounds what it runs."""
    memory_mib: int | None
    """Address space of a verdict beyond what the idle worker has; None where the verifier bounds
    what it runs."""
    purpose: str


_OWN_DEFAULTS = {"timeout_seconds": 10.0, "memory_mib": 1024, "purpose": "from M1_VERIFIERS"}
VERIFIERS = {
    "maths": VerifierSpec("m1.rewards.maths.verifier", 10.0, 2048, "a final answer in mathematics"),
    "logic": VerifierSpec("m1.rewards.logic", 10.0, 1024, "our logic tasks, `logic:<task>`"),
    "synlogic": VerifierSpec(
        "m1.rewards.synlogic", 10.0, 1024, "SynLogic's rows of our logic tasks, `synlogic:<task>`"
    ),
    "reasoning_gym": VerifierSpec(
        "m1.rewards.reasoning_gym", 10.0, 2048, "`reasoning_gym:<dataset>`"
    ),
    "code": VerifierSpec("m1.rewards.code.verifier", 300.0, None, "programs against tests"),
    "instructions": VerifierSpec(
        "m1.rewards.instructions", 10.0, 2048, "stated constraints, `instructions:ifeval|ifbench`"
    ),
}


def spec_of(verifier: str) -> VerifierSpec:
    """What is known of a task's verifier.

    Raises:
        M1Error: Nothing is.
    """
    kind = kind_of(verifier)
    known = {**VERIFIERS, **_own_verifiers(os.environ.get("M1_VERIFIERS", ""))}
    if kind not in known:
        raise M1Error(
            f"verifier {verifier!r} is not known; known: {', '.join(sorted(known))}; own ones are "
            "named by M1_VERIFIERS"
        )
    return known[kind]


def kind_of(verifier: str) -> str:
    """The part before the colon."""
    return verifier.partition(":")[0]


@cache
def _own_verifiers(text: str) -> dict[str, VerifierSpec]:
    """Verifiers that the user adds: M1_VERIFIERS='{"mine": {"module": "my.module"}}'.

    They come from the environment and never from a task, because data must not name code to import.
    """
    if not text:
        return {}
    try:
        return {
            name: VerifierSpec(**{**_OWN_DEFAULTS, **fields})
            for name, fields in json.loads(text).items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise M1Error(
            f"M1_VERIFIERS is {text!r}, but should be JSON such as "
            f'{{"mine": {{"module": "my.module", "timeout_seconds": 5}}}}: {error}'
        ) from error


def load(verifier: str) -> Verifier:
    """Import a verifier; takes up to seconds the first time."""
    found: Verifier = importlib.import_module(spec_of(verifier).module).verify
    return found
