"""`m1 grade` as a function: lines with completions in, the same lines with rewards out."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from m1.rewards.format import is_well_formed
from m1.rewards.service.pool import Judgement, RewardService, ServiceConfig
from m1.types import M1Error, Task

_TASK_FIELDS = frozenset(field.name for field in fields(Task))


@dataclass(frozen=True)
class GradeSummary:
    """What became of a file's lines."""

    num_lines: int
    num_infra_errors: int
    mean_reward: float | None
    """Over the lines that have a reward."""
    reasons: dict[str, int]
    metrics: dict[str, float]


def grade(
    rows: Iterable[dict[str, Any]], service: RewardService, *, format_weight: float = 0.0
) -> Iterator[dict[str, Any]]:
    """Each row with `reward`, `parts`, `reason`, `seconds` and `infra_error` added, in order.

    Args:
        rows: With `completion`, and `task` (an object) or `verifier`, `reference` and what else a
            task has, at the top level.
        service: Where verdicts come from.
        format_weight: reward = accuracy + format_weight * format, where format says whether the
            completion is `<think>...</think><answer>...</answer>` and nothing else.

    Yields:
        The row. After an infrastructure failure `reward` is null and `infra_error` its name.
    """
    kept: list[dict[str, Any]] = []

    def jobs() -> Iterator[tuple[Task, str]]:
        for row in rows:
            task = task_of(row)
            kept.append(row)
            yield task, row["completion"]

    for judgement in service.judge_all(jobs()):
        row = kept.pop(0)
        yield {**row, **_columns(judgement, row["completion"], format_weight)}


def grade_file(
    source: Path,
    target: Path,
    *,
    config: ServiceConfig | None = None,
    format_weight: float = 0.0,
) -> GradeSummary:
    """Grade a JSONL file into another, which appears only when complete.

    Raises:
        M1Error: A line cannot be graded; the message has its number.
    """
    reasons: Counter[str] = Counter()
    rewards: list[float] = []
    num_lines = num_failed = 0
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    with RewardService(config) as service, partial.open("w", encoding="utf-8") as stream:
        for row in grade(_rows(source), service, format_weight=format_weight):
            stream.write(json.dumps(row) + "\n")
            num_lines += 1
            if row["infra_error"] is None:
                rewards.append(row["reward"])
                reasons[row["reason"].partition(":")[0]] += 1
            else:
                num_failed += 1
                reasons[f"infra: {row['infra_error'].partition(':')[0]}"] += 1
        metrics = service.metrics()
    partial.replace(target)
    mean = sum(rewards) / len(rewards) if rewards else None
    return GradeSummary(num_lines, num_failed, mean, dict(reasons.most_common()), metrics)


def task_of(row: dict[str, Any]) -> Task:
    """The task of a row, from its `task` object or its own fields.

    Raises:
        M1Error: The row lacks what grading needs.
    """
    given = row.get("task", row)
    if not isinstance(given, dict):
        raise M1Error(f"task is {type(given).__name__}, but should be an object")
    if not isinstance(row.get("completion"), str):
        raise M1Error("completion is absent or no string; add the text to grade")
    missing = [name for name in ("verifier", "reference") if not isinstance(given.get(name), str)]
    if missing:
        raise M1Error(f"{' and '.join(missing)} absent or no string; add them, or a task object")
    defaults = {"task_id": "", "source": "", "prompt": ""}
    return Task(**{**defaults, **{k: v for k, v in given.items() if k in _TASK_FIELDS}})


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise M1Error(f"{path} is not a file; give a JSONL file with completions")
    with path.open(encoding="utf-8", errors="surrogateescape") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise M1Error(f"the line is {type(row).__name__}, but should be an object")
                task_of(row)
            except (ValueError, M1Error) as error:
                raise M1Error(f"{path}, line {number}: {error}") from error
            yield row


def _columns(judgement: Judgement, completion: str, format_weight: float) -> dict[str, Any]:
    seconds = round(judgement.seconds, 6)
    if judgement.verdict is None:
        return {
            "reward": None,
            "parts": {},
            "reason": None,
            "seconds": seconds,
            "infra_error": judgement.infra_error,
        }
    accuracy = judgement.verdict.accuracy
    formatted = float(is_well_formed(completion))
    return {
        "reward": accuracy + format_weight * formatted,
        "parts": {"accuracy": accuracy, "format": formatted, **judgement.verdict.parts},
        "reason": judgement.verdict.reason,
        "seconds": seconds,
        "infra_error": None,
    }


def grade_artifact(completions: Any, graded: Any, *, format_weight: float = 0.0) -> None:
    """Body of the KFP component: artifacts with a `path`; counts go into the output's metadata."""
    target = Path(graded.path)
    summary = grade_file(Path(completions.path), target, format_weight=format_weight)
    graded.metadata["num_lines"] = summary.num_lines
    graded.metadata["num_infra_errors"] = summary.num_infra_errors
    graded.metadata["mean_reward"] = summary.mean_reward
    graded.metadata["reasons"] = summary.reasons
