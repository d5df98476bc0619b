"""Tasks of generators and of sets, unique by prompt, in disjoint splits for their uses."""

import difflib
import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from m1.config.schema import TaskSourceConfig
from m1.data.demonstrations import SOLVERS, require_solver
from m1.data.logic.catalogue import logic_task
from m1.data.tasks.loading import load_tasks
from m1.types import M1Error, Task

LOGIC_PREFIX = "logic:"


@dataclass(frozen=True)
class TaskSplits:
    """Tasks by use; no prompt occurs twice, within or across splits and sources."""

    sft: tuple[Task, ...] = ()
    rl: tuple[Task, ...] = ()
    heldout: tuple[Task, ...] = ()
    draws: dict[str, dict[str, int]] = field(default_factory=dict)
    """By source: how many draws were `kept`, and why the others were not."""


def make_tasks(configs: Sequence[TaskSourceConfig], seed: int) -> TaskSplits:
    """Draw the tasks of every entry (names differ); same entries and seed give the same tasks.

    All tasks of an entry are drawn first and shuffled before they are split. Uniqueness makes late
    draws harder than early ones, and shuffling gives every split the same mixture.
    """
    taken: set[str] = set()
    parts: dict[str, list[Task]] = {"sft": [], "rl": [], "heldout": []}
    draws: dict[str, dict[str, int]] = {}
    for config in configs:
        if config.num_sft:
            require_solver(config.name, config.dataset)
        outcomes: Counter[str] = Counter()
        tasks = _draw(config, seed, taken, outcomes)
        draws[config.name] = dict(sorted(outcomes.items()))
        random.Random(f"{seed}:{config.name}").shuffle(tasks)
        counts = (config.num_heldout, config.num_rl, config.num_sft)
        for split, count in zip(("heldout", "rl", "sft"), counts, strict=True):
            parts[split] += tasks[:count]
            del tasks[:count]
    return TaskSplits(tuple(parts["sft"]), tuple(parts["rl"]), tuple(parts["heldout"]), draws)


def num_shared_prompts(splits: TaskSplits) -> int:
    """Prompts that occur more than once over all splits, white space aside."""
    tasks = (*splits.sft, *splits.rl, *splits.heldout)
    return sum(count > 1 for count in Counter(_prompt_key(task.prompt) for task in tasks).values())


def _draw(
    config: TaskSourceConfig, seed: int, taken: set[str], outcomes: Counter[str]
) -> list[Task]:
    """Enough tasks with prompts not in `taken`, which grows; all outcomes are counted."""
    needed = config.num_sft + config.num_rl + config.num_heldout
    num_draws = 20 * needed + 1000
    if config.uri is not None:
        candidates = _given(config, seed)
    else:
        is_own = config.dataset.startswith(LOGIC_PREFIX)
        candidates = (_own if is_own else _reasoning_gym)(config, seed, num_draws)
    tasks: list[Task] = []
    for candidate in candidates:
        if len(tasks) == needed:
            break
        key = _prompt_key(candidate.prompt)
        if key in taken:
            outcomes["duplicate_prompt"] += 1
            continue
        taken.add(key)
        task, reason = candidate.make(f"{config.name}-{_digest(key)}")
        outcomes[reason or "kept"] += 1
        if not reason:
            tasks.append(task)
    if len(tasks) < needed:
        seen = ", ".join(f"{count} {reason}" for reason, count in sorted(outcomes.items()))
        if config.uri is not None:
            raise M1Error(
                f"data.tasks {config.name!r} needs {needed} unique tasks (num_rl + num_heldout), "
                f"but {config.uri} gave {len(tasks)} ({seen or 'it is empty'}); lower those counts"
            )
        raise M1Error(
            f"data.tasks {config.name!r} needs {needed} unique tasks (num_sft + num_rl + "
            f"num_heldout), but {config.dataset} gave {len(tasks)} in {num_draws} draws ({seen}); "
            f"lower those counts or widen its parameters {config.parameters} (more terms, digits)"
        )
    return tasks


@dataclass(frozen=True)
class _Candidate:
    """A drawn prompt, and how to make its task and name what is doubtful about it."""

    prompt: str
    make: Callable[[str], tuple[Task, str | None]]


def _reasoning_gym(config: TaskSourceConfig, seed: int, size: int) -> Iterator[_Candidate]:
    dataset = _open_dataset(config, seed, size)

    def make(entry: dict[str, Any], task_id: str) -> tuple[Task, str | None]:
        task = _task(config, task_id, entry)
        return task, _doubt(task, config.dataset, dataset, entry)

    for number in range(size):
        entry = dataset[number]
        yield _Candidate(entry["question"], partial(make, entry))


def _given(config: TaskSourceConfig, seed: int) -> Iterator[_Candidate]:
    """A set's tasks as they are, in the seed's order."""
    assert config.uri is not None
    tasks = load_tasks(config.uri, layout=config.layout)
    random.Random(_own_seed(config, seed)).shuffle(tasks)

    def make(task: Task, task_id: str) -> tuple[Task, str | None]:
        return replace(task, task_id=task_id, source=config.name), None

    for task in tasks:
        yield _Candidate(task.prompt, partial(make, task))


def _own(config: TaskSourceConfig, seed: int, size: int) -> Iterator[_Candidate]:
    """Our own logic tasks, `logic:<task>` with the parameter `difficulty`, 1 to 10 or several."""
    judge = logic_task(config.dataset.removeprefix(LOGIC_PREFIX))
    given = config.parameters.get("difficulty", 1)
    levels = given if isinstance(given, list | tuple) else [given]
    are_whole = bool(levels) and all(type(level) is int for level in levels)
    if set(config.parameters) - {"difficulty"} or not are_whole:
        raise M1Error(
            f"data.tasks {config.name!r}: {config.dataset} takes one parameter, a difficulty as an "
            f"integer or a list of them, but got {config.parameters}; correct data.tasks.parameters"
        )

    def make(task: Task, task_id: str) -> tuple[Task, str | None]:
        task = replace(task, task_id=task_id, source=config.name)
        is_sound = judge.verify(task, task.reference).accuracy == 1
        return task, None if is_sound else "own_answer_rejected"

    start = _own_seed(config, seed)
    for number in range(size):
        task = judge.generate(start + number, levels[number % len(levels)])
        yield _Candidate(task.prompt, partial(make, task))


def _open_dataset(config: TaskSourceConfig, seed: int, size: int) -> Any:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if config.dataset not in DATASETS:
        near = ", ".join(difflib.get_close_matches(config.dataset, DATASETS)) or "see reasoning-gym"
        raise M1Error(
            f"data.tasks {config.name!r} names dataset {config.dataset!r}, which reasoning-gym "
            f"does not have; close names: {near}"
        )
    own_seed = _own_seed(config, seed)
    try:
        return reasoning_gym.create_dataset(
            config.dataset, **{**config.parameters, "seed": own_seed, "size": size}
        )
    except (TypeError, ValueError, AssertionError) as error:
        raise M1Error(
            f"data.tasks {config.name!r}: {config.dataset} refuses parameters {config.parameters} "
            f"({error}); correct data.tasks.parameters"
        ) from error


def _own_seed(config: TaskSourceConfig, seed: int) -> int:
    """Item i is drawn from seed + i, so neighbouring seeds would share nearly all items."""
    digest = hashlib.sha256(f"{seed}:{config.name}:{config.dataset}".encode()).digest()
    return int.from_bytes(digest[:6], "big")


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:12]


def _task(config: TaskSourceConfig, task_id: str, entry: dict[str, Any]) -> Task:
    return Task(
        task_id=task_id,
        source=config.name,
        prompt=entry["question"],
        reference=str(entry["answer"]),
        verifier=f"reasoning_gym:{config.dataset}",
        metadata=_plain(entry["metadata"]),
    )


def _doubt(task: Task, name: str, dataset: Any, entry: dict[str, Any]) -> str | None:
    """Why a task's reference cannot be trusted, or None."""
    if entry["answer"] is None or dataset.score_answer(task.reference, entry) < 1:
        return "own_answer_rejected"
    if name in SOLVERS:
        solution = SOLVERS[name](task)
        if solution is None or solution.answer != task.reference:
            return "wrong_reference"
    return None


def _prompt_key(prompt: str) -> str:
    return " ".join(prompt.split())


def _plain(value: Any) -> Any:
    """`value` in the types that JSON has; what it lacks becomes text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
