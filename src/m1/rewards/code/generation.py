"""Making a test suite for a problem that has none (paper sec. 4.1, competitive programming).

A model writes an input generator, an input validator and a slow but simple solution. Everything
runs in the sandbox. Inputs count when the validator accepts them; where they are small, the slow
solution must agree with the reference, or the model is shown the difference and writes again. The
suite that results is scored by the faults it finds in the reference with one change each.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from m1.rewards.code.chat_model import ChatModel, Message
from m1.rewards.code.comparing import same_output
from m1.rewards.code.mutants import mutants
from m1.rewards.code.programs import Program, install, run_on
from m1.rewards.code.suite import Example, Suite
from m1.sandbox.base import ExecResult, SealedSandbox
from m1.sandbox.opening import open_sealed
from m1.types import M1Error, Task

_BLOCK = re.compile(r"```python\s+#\s*(generator|validator|brute)\.py\s*\n(.*?)```", re.DOTALL)
_PARTS = ("generator", "validator", "brute")
_REQUEST = """Write three Python 3 programs for testing solutions of the problem below.

generator.py: reads one line "seed size" from standard input, where size is small, medium or large,
and prints one random valid input that depends on both alone. Small inputs are tiny and full of
corner cases; large ones reach the limits of the problem.
validator.py: reads an input from standard input and exits with status 0 exactly when it is valid
in form and within all limits.
brute.py: solves the problem as simply as possible, however slowly.

Give each in its own block that begins with its name:
```python
# generator.py
...
```

Problem:
"""


@dataclass(frozen=True)
class GenerationConfig:
    """How many of what."""

    num_small: int = 30
    """Inputs on which the slow solution must agree."""
    num_large: int = 10
    """Medium and large inputs; the reference alone decides them."""
    num_rounds: int = 3
    """Times the model is asked."""
    num_mutants: int = 40
    """Faulty programs the suite is scored against."""
    num_extra: int = 10
    """Tests kept beside those that find a fault no other kept test finds."""


@dataclass(frozen=True)
class GeneratedSuite:
    """A suite and how good it is."""

    suite: Suite
    mutation_score: float | None
    """Share of the faulty programs that some test finds; None where none could be made."""
    num_mutants: int
    num_inputs: int
    """Valid inputs before the suite was reduced."""
    num_rounds: int
    """Times the model was asked."""


def generate_suite(
    task: Task,
    reference: str,
    chat: ChatModel,
    *,
    config: GenerationConfig | None = None,
    limits: Suite | None = None,
) -> GeneratedSuite:
    """Make tests of standard input and output for a problem with a Python reference solution.

    Args:
        task: Its prompt states the problem.
        reference: A solution that is trusted to be right, not to be harmless: it is sandboxed.
        chat: Who writes the programs.
        config: Numbers.
        limits: A suite whose time, memory and comparison the new one gets.

    Raises:
        M1Error: After all rounds no valid inputs are left on which both solutions agree.
    """
    config = config or GenerationConfig()
    base = limits or Suite(tests=(Example(input="", output=""),))
    messages = [Message("user", _REQUEST + task.prompt)]
    complaint = ""
    for number in range(1, config.num_rounds + 1):
        reply = chat.complete(messages)
        programs = {name: text for name, text in _BLOCK.findall(reply)}
        missing = [name for name in _PARTS if name not in programs]
        if missing:
            complaint = f"There is no block for {', '.join(missing)}."
        else:
            examples, complaint = _examples(programs, reference, base, config)
            if not complaint:
                return _scored(examples, reference, base, config, number)
        messages += [Message("assistant", reply), Message("user", f"{complaint} Write all again.")]
    raise M1Error(f"no test suite for {task.task_id} after {config.num_rounds} rounds: {complaint}")


def mutation_score(suite: Suite, source: str, max_count: int) -> tuple[list[set[int]], int]:
    """For each test the faulty programs it finds, and how many faulty programs there are."""
    faulty = mutants(source, max_count=max_count)
    found: list[set[int]] = [set() for _ in suite.tests]
    for number, text in enumerate(faulty):
        with open_sealed() as sandbox:
            program = Program(text, "python")
            install(sandbox, program)
            for index, test in enumerate(suite.tests):
                result = run_on(sandbox, program, suite, test.input)
                if not _is_clean(result) or not same_output(suite, test.output, _text(result)):
                    found[index].add(number)
    return found, len(faulty)


def _examples(
    programs: dict[str, str], reference: str, base: Suite, config: GenerationConfig
) -> tuple[list[Example], str]:
    """Valid inputs with the reference's outputs, or what is wrong with the programs."""
    sizes = ["small"] * config.num_small
    sizes += [("medium", "large")[i % 2] for i in range(config.num_large)]
    names = {**{name: programs[name] for name in _PARTS}, "reference": reference}
    boxes = {name: open_sealed() for name in names}
    try:
        for name, text in names.items():
            install(boxes[name], Program(text, "python"))
        return _collect(boxes, sizes, base, config)
    finally:
        for box in boxes.values():
            box.close()


def _collect(
    boxes: dict[str, SealedSandbox], sizes: Sequence[str], base: Suite, config: GenerationConfig
) -> tuple[list[Example], str]:
    def run(name: str, given: str) -> ExecResult:
        return run_on(boxes[name], Program("", "python"), base, given)

    examples: dict[str, Example] = {}
    for seed, size in enumerate(sizes):
        made = run("generator", f"{seed} {size}\n")
        if not _is_clean(made):
            return [], f"generator.py fails on '{seed} {size}': {_why(made)}"
        given = _text(made)
        if not _is_clean(run("validator", given)):
            continue
        wanted = run("reference", given)
        if not _is_clean(wanted):
            return [], f"the reference solution fails on this input: {given[:300]!r}"
        if size == "small":
            slow = run("brute", given)
            if not _is_clean(slow) or not same_output(base, _text(wanted), _text(slow)):
                return [], (
                    f"brute.py and a right solution differ on {given[:300]!r}: brute.py gives "
                    f"{(_text(slow) or _why(slow))[:200]!r}, right is {_text(wanted)[:200]!r}."
                )
        examples[given] = Example(input=given, output=_text(wanted))
    if len(examples) < max(2, config.num_small // 4):
        return [], f"validator.py accepts only {len(examples)} different inputs of generator.py."
    return list(examples.values()), ""


def _scored(
    examples: list[Example], reference: str, base: Suite, config: GenerationConfig, rounds: int
) -> GeneratedSuite:
    """Keep the tests that find faults first, then some more."""
    whole = base.model_copy(update={"tests": tuple(examples)})
    found, count = mutation_score(whole, reference, config.num_mutants)
    kept: list[int] = []
    covered: set[int] = set()
    rest = set(range(len(examples)))
    while rest:
        best = max(sorted(rest), key=lambda i: len(found[i] - covered))
        if not found[best] - covered:
            break
        kept.append(best)
        rest.discard(best)
        covered |= found[best]
    # The longest inputs are the ones that a slow solution fails on.
    kept += sorted(rest, key=lambda i: -len(examples[i].input))[: config.num_extra]
    suite = base.model_copy(update={"tests": tuple(examples[i] for i in kept)})
    score = len(covered) / count if count else None
    return GeneratedSuite(suite, score, count, len(examples), rounds)


def suite_reference(generated: GeneratedSuite) -> str:
    """The suite as a task's `reference`."""
    return json.dumps(generated.suite.model_dump(mode="json"))


def _is_clean(result: ExecResult) -> bool:
    return result.exit_code == 0 and result.stopped_by is None


def _text(result: ExecResult) -> str:
    return result.stdout.decode(errors="replace")


def _why(result: ExecResult) -> str:
    tail = result.stderr.decode(errors="replace")[-300:]
    return f"stopped by {result.stopped_by}" if result.stopped_by else tail
