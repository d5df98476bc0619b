import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m1.config.schema import (
    CurriculumConfig,
    CurriculumSourceConfig,
    DifficultyConfig,
    LengthStageConfig,
    WeightPoint,
)
from m1.train.batches import row_order
from m1.train.curriculum import Curriculum, weight_at
from m1.train.task_filter import read_tallies, select_tasks, write_tallies
from m1.types import Completion, M1Error, Reward, Rollout, RolloutGroup, Task


def tasks_of(source, count, *, levels=(None,)):
    return [
        Task(f"{source}-{level}-{i}", source, "p", "r", "v", difficulty=level)
        for level in levels
        for i in range(count)
    ]


def source(name, *points, **more):
    weights = [WeightPoint(step=s, weight=w) for s, w in points or [(0, 1.0)]]
    return CurriculumSourceConfig(source=name, weights=tuple(weights), **more)


def curriculum(tasks, *sources, **more):
    return Curriculum(tasks, CurriculumConfig(sources=sources, **more), seed=3)


def group(task, accuracy, *, is_failed=False):
    completion = Completion((1,), (2,), (-1.0,), (0.0,), "stop", (0,))
    reward = Reward(accuracy, accuracy, {}, is_failed)
    return RolloutGroup(task, (Rollout(task, completion, reward),))


def sources_of(tasks):
    return Counter(task.source for task in tasks)


def test_without_sources_tasks_come_in_shuffled_epochs():
    tasks = tasks_of("a", 5) + tasks_of("b", 4)
    taken = curriculum(tasks).take(18)
    expected = [tasks[i] for epoch in (0, 1) for i in row_order(9, seed=3, epoch=epoch)]
    assert taken == expected


def test_sources_take_turns_exactly_by_weight():
    made = curriculum(tasks_of("a", 50) + tasks_of("b", 50), source("a", (0, 3.0)), source("b"))
    assert [task.source for task in made.take(8)] == ["a", "a", "b", "a"] * 2
    assert sources_of(made.take(4000)) == {"a": 3000, "b": 1000}


def test_a_source_is_mixed_in_over_steps():
    general = source("general", (2, 0.0), (6, 1.0))
    made = curriculum(tasks_of("maths", 9) + tasks_of("general", 9), source("maths"), general)
    shares = []
    for _ in range(8):
        shares.append(made.shares()["general"])
        made.take(10)
        made.observe([])
    assert shares[:3] == [0, 0, 0]
    assert shares[4] == pytest.approx(0.5 / 1.5)
    assert shares[6] == shares[7] == 0.5


def test_weights_are_linear_between_points_and_constant_outside():
    points = source("a", (10, 1.0), (20, 3.0)).weights
    assert [weight_at(points, step) for step in (0, 10, 15, 20, 99)] == [1, 1, 2, 3, 3]


def test_a_source_of_weight_0_is_never_taken_though_it_is_owed():
    b = source("b", (0, 1.0), (1, 0.0), (9, 0.0))
    made = curriculum(tasks_of("a", 9) + tasks_of("b", 9), source("a"), b)
    made.take(1)  # b is owed half a task
    made.observe([])
    assert sources_of(made.take(50)) == {"a": 50}


def test_dynamic_weights_favour_what_is_neither_easy_nor_hopeless():
    tasks = tasks_of("easy", 1) + tasks_of("apt", 1) + tasks_of("hard", 1)
    made = curriculum(tasks, *map(source, ("easy", "apt", "hard")), pass_rate_strength=1.0)
    made.observe([group(tasks[0], 1.0), group(tasks[1], 0.5), group(tasks[2], 0.0)])
    shares = made.shares()
    assert shares["apt"] == pytest.approx(1 / 1.2)  # 1 against two floors of 0.1
    assert shares["easy"] == shares["hard"] == pytest.approx(0.1 / 1.2)


def test_pass_rates_are_running_means_over_steps_without_failed_rollouts():
    (task,) = tasks = tasks_of("a", 1)
    made = curriculum(tasks, source("a"), pass_rate_decay=0.75)
    made.observe([group(task, 1.0), group(task, 0.0), group(task, 0.0, is_failed=True)])
    made.observe([group(task, 1.0)])
    made.observe([])
    assert made.metrics()["rl/source_accuracy/a"] == 0.75 * 0.5 + 0.25


LADDER = DifficultyConfig(raise_at=0.7, lower_at=0.2, min_groups=4, rehearsal_fraction=0.25)


def climb(made, accuracy, *, batch=4):
    taken = made.take(batch)
    made.observe([group(task, accuracy) for task in taken])
    return taken


def test_difficulty_rises_with_ability_and_falls_back():
    made = curriculum(tasks_of("a", 20, levels=(1, 2, 5)), source("a", difficulty=LADDER))
    levels = []
    for accuracy in (0.5, 0.9, 0.9, 0.9, 0.9, 0.1, 0.1, 0.5, 0.5):
        climb(made, accuracy, batch=8)
        levels.append(made.state()["levels"]["a"]["level"])
    assert levels == [1, 2, 5, 5, 5, 2, 1, 1, 1]


def test_a_level_is_judged_on_enough_groups_of_its_own():
    made = curriculum(tasks_of("a", 20, levels=(1, 2)), source("a", difficulty=LADDER))
    climb(made, 1.0, batch=3)
    assert made.state()["levels"]["a"]["level"] == 1
    climb(made, 1.0, batch=1)
    assert made.state()["levels"]["a"]["level"] == 2
    made.observe([group(tasks_of("a", 1)[0], 0.0) for _ in range(9)])  # none is of level 2
    assert made.state()["levels"]["a"]["level"] == 2


def test_easier_levels_are_rehearsed_in_turn():
    ladder = LADDER.model_copy(update={"min_groups": 1})
    made = curriculum(tasks_of("a", 20, levels=(1, 2, 3)), source("a", difficulty=ladder))
    climb(made, 1.0)
    climb(made, 1.0)
    taken = Counter(task.difficulty for task in made.take(80))
    assert taken == {3: 60, 1: 10, 2: 10}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0, 1)), max_size=12), st.integers(0, 11))
def test_resumed_anywhere_it_takes_the_same_tasks(steps, cut):
    tasks = tasks_of("a", 5, levels=(1, 2, 3)) + tasks_of("b", 7)
    b = source("b", (0, 0.2), (5, 2.0))
    ladder = LADDER.model_copy(update={"min_groups": 2})

    def make():
        a = source("a", difficulty=ladder)
        return curriculum(tasks, a, b, pass_rate_strength=1.0)

    whole, resumed = make(), make()
    for number, (batch, accuracy) in enumerate(steps):
        if number == cut:
            state = json.loads(json.dumps(resumed.state()))
            resumed = make()
            resumed.restore(state)
        assert climb(whole, accuracy, batch=batch) == climb(resumed, accuracy, batch=batch)
    assert whole.state() == resumed.state()


@pytest.mark.parametrize(
    ("tasks", "sources", "message"),
    [
        ([], (), "num_rl"),
        (tasks_of("a", 1), (source("b"),), "no RL task is from there"),
        (tasks_of("a", 1), (source("a", difficulty=LADDER),), "has difficulty None"),
        (
            tasks_of("a", 1, levels=(1, 2)),
            (source("a", difficulty=LADDER.model_copy(update={"start": 3})),),
            "lower difficulty.start",
        ),
    ],
)
def test_what_cannot_be_sampled_is_refused(tasks, sources, message):
    with pytest.raises(M1Error, match=message):
        curriculum(tasks, *sources)


def test_weights_that_all_reach_0_are_named():
    made = curriculum(tasks_of("a", 1), source("a", (0, 1.0), (1, 0.0)))
    made.observe([])
    with pytest.raises(M1Error, match="is 0 at step 1"):
        made.take(1)


def length(**more):
    return LengthStageConfig(max_new_tokens=10, min_steps=1, max_steps=1, **more)


def test_tasks_are_filtered_by_pass_rate_and_unknown_ones_stay(tmp_path):
    tasks = tasks_of("a", 5)
    rates = [(0.0, 4), (1.0, 4), (3.6, 4), (4.0, 4)]
    tallies = {task.task_id: rate for task, rate in zip(tasks, rates, strict=False)}
    write_tallies(tmp_path, tallies)
    kept = select_tasks(tasks, length(min_pass_rate=0.1, max_pass_rate=0.9), read_tallies(tmp_path))
    assert kept == [tasks[1], tasks[2], tasks[4]]
    assert select_tasks(tasks, length(), tallies) == tasks


def test_downsampling_keeps_about_the_share_and_is_nested():
    tasks = tasks_of("synthetic", 2000) + tasks_of("maths", 10)
    half = select_tasks(tasks, length(keep_fraction={"synthetic": 0.5}), {})
    quarter = select_tasks(tasks, length(keep_fraction={"synthetic": 0.25}), {})
    assert sources_of(half)["maths"] == sources_of(quarter)["maths"] == 10
    assert sources_of(half)["synthetic"] == pytest.approx(1000, abs=100)  # 4.5 sigma
    assert {t.task_id for t in quarter} <= {t.task_id for t in half}


def test_a_filter_that_leaves_nothing_is_refused():
    tasks = tasks_of("a", 2)
    with pytest.raises(M1Error, match="none of 2 RL tasks is left at 10 tokens"):
        select_tasks(tasks, length(keep_fraction={"a": 0.0}), {})
