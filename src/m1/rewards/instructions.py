"""The verifier `instructions:ifeval` and `instructions:ifbench`: stated constraints, checked."""

import importlib
import json
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError, model_validator

from m1.config.base import Config, refuse
from m1.rewards.answers import final_text
from m1.types import M1Error, Task, Verdict


class Constraints(Config):
    """What a task's reference is in JSON; the layout of IFEval and IFBench."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    instruction_id_list: tuple[str, ...]
    """Names of checkers, such as `length_constraints:number_words`."""
    parameters: Annotated[tuple[dict[str, Any], ...], Field(alias="kwargs")]
    """Parameters of each; None values mean absent."""
    mode: Literal["strict", "loose"] = "strict"
    """`loose` also tries the text without first and last line and without asterisks."""

    @model_validator(mode="after")
    def _lengths_agree(self) -> "Constraints":
        if not self.instruction_id_list or len(self.instruction_id_list) != len(self.parameters):
            refuse(
                [
                    f"{len(self.instruction_id_list)} instructions have {len(self.parameters)} "
                    f"kwargs; "
                    "give one each, and at least one"
                ]
            )
        return self


def verify(task: Task, completion: str) -> Verdict:
    """1 when all constraints hold for the text after the thinking; parts say which share does.

    Raises:
        M1Error: The reference names an unknown checker, or one whose language data is missing.
    """
    constraints = _read(task.reference)
    registry = _registry(task.verifier.partition(":")[2])
    unknown = sorted(set(constraints.instruction_id_list) - set(registry))
    if unknown:
        raise M1Error(f"unknown instructions {unknown}; known: {', '.join(sorted(registry))}")
    text = final_text(completion)
    if text is None or not text:
        return Verdict(0.0, "no_answer", {"share": 0.0})
    followed = _followed(task, constraints, registry, text)
    share = sum(followed) / len(followed)
    broken = [n for n, ok in zip(constraints.instruction_id_list, followed, strict=True) if not ok]
    reason = "all_followed" if not broken else "broken: " + ", ".join(broken)
    return Verdict(float(not broken), reason, {"share": share})


def _followed(
    task: Task, constraints: Constraints, registry: dict[str, Any], text: str
) -> list[bool]:
    from if_verifiable.common import evaluate_instructions

    try:
        results, _ = evaluate_instructions(
            response=text,
            instruction_id_list=list(constraints.instruction_id_list),
            kwargs_list=[dict(kwargs) for kwargs in constraints.parameters],
            prompt=task.prompt,
            instruction_registry=registry,
        )
    except LookupError as error:  # how nltk says that a resource is not installed
        raise M1Error(
            "a checker needs language data that is not installed; python -m nltk.downloader "
            f"punkt punkt_tab stopwords averaged_perceptron_tagger_eng ({str(error)[:80]!r})"
        ) from error
    is_loose = constraints.mode == "loose"
    return [result.loose_pass if is_loose else result.strict_pass for result in results]


def _read(reference: str) -> Constraints:
    try:
        return Constraints.model_validate(json.loads(reference))
    except (ValueError, ValidationError) as error:
        raise M1Error(f"the reference of an instruction task is not understood: {error}") from error


@cache
def _registry(benchmark: str) -> dict[str, Any]:
    modules = {
        name: f"if_verifiable.{name}.instructions_registry" for name in ("ifeval", "ifbench")
    }
    if benchmark not in modules:
        raise M1Error(f"instructions:{benchmark} is not known; use instructions:ifeval or :ifbench")
    found: dict[str, Any] = importlib.import_module(modules[benchmark]).INSTRUCTION_DICT
    return found
