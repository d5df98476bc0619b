"""What a programming task's reference holds: tests, how outputs are compared, limits."""

import json
import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from m1.config.base import Config, PositiveFloat, PositiveInt, refuse
from m1.types import M1Error

Language = Literal["python", "cpp"]


class Example(Config):
    """One test."""

    input: Any
    """Standard input as text; for function tests the list of arguments."""
    output: Any
    """Expected standard output as text; for function tests the value, in JSON's types."""


class Suite(Config):
    """All tests of a task; what a task's `reference` is in JSON."""

    kind: Literal["stdin", "function"] = "stdin"
    """Whether the program reads standard input, or has a function to be called."""
    function: str | None = None
    """Name of the function; `Solution.name` for a method of a class without arguments."""
    tests: Annotated[tuple[Example, ...], Field(min_length=1)]
    language: Language = "python"
    """What an answer without a language mark is written in."""
    comparison: Literal["tokens", "exact", "float", "checker"] = "tokens"
    """`tokens`: equal but for white space; `exact`: equal but for the last line end; `float`:
    tokens, numbers to `tolerance`; `checker`: a program decides."""
    tolerance: PositiveFloat = 1e-6
    """Absolute or relative difference that `float` allows."""
    checker: str | None = None
    """A Python program with `check(input, expected, actual) -> bool`. It runs in a sandbox of its
    own, after the program it judges has ended."""
    cpu_seconds: PositiveFloat = 4.0
    """Processor time of one test."""
    memory_mib: PositiveInt = 512
    """Memory of one test."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.kind == "function" and not re.fullmatch(r"(\w+\.)?\w+", self.function or ""):
            refuse([f"function is {self.function!r}, but kind 'function' needs its name; add it"])
        if self.kind == "function" and not all(isinstance(t.input, list) for t in self.tests):
            refuse(["a test's input is no list, but functions take a list of arguments"])
        if self.kind == "stdin" and not all(
            isinstance(text, str) for test in self.tests for text in (test.input, test.output)
        ):
            refuse(["a test's input or output is no text, but kind 'stdin' compares text"])
        if (self.comparison == "checker") != (self.checker is not None):
            refuse(["comparison 'checker' and the checker program go together; give both"])
        return self


def read_suite(reference: str) -> Suite:
    """The suite in a task's reference.

    Raises:
        M1Error: It is none; the message says where.
    """
    try:
        return Suite.model_validate(json.loads(reference))
    except (ValueError, ValidationError) as error:
        raise M1Error(f"the reference of a programming task is no test suite: {error}") from error
