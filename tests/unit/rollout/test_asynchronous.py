"""Groups sampled ahead: each is trained on once, whatever dies in between."""

import threading
import time
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m1.config.schema import (
    DynamicSamplingConfig,
    OptimizerConfig,
    RewardConfig,
    RlConfig,
    RolloutConfig,
)
from m1.rollout.asynchronous import AsyncRollouts
from m1.rollout.journal import Journal, from_json, to_json
from m1.types import M1Error, RolloutGroup
from tests.unit.rollout.making import group, rollout, stream

PROMPTS, UPDATES = 3, 2


def config(*, dynamic=False, extra=2, **rollout_settings):
    return RlConfig(
        num_steps=9,
        prompts_per_step=PROMPTS,
        group_size=2,
        updates_per_step=UPDATES,
        optimizer=OptimizerConfig(lr=1e-3),
        reward=RewardConfig(),
        dynamic_sampling=DynamicSamplingConfig(enabled=dynamic, max_extra_batches=extra),
        rollout=RolloutConfig(mode="async", num_workers=1, **rollout_settings),
    )


class Engine:
    """Samples with the version it is at, and counts."""

    def __init__(self, accuracies=lambda ticket: (0, 1)):
        self.version, self.asked, self.accuracies = 0, Counter(), accuracies
        self.most_open, self._open = 0, 0
        self._lock = threading.Lock()

    def __call__(self, task, ticket):
        with self._lock:
            self.asked[ticket] += 1
            self._open += 1
            self.most_open = max(self.most_open, self._open)
        made = group(*self.accuracies(ticket), name=task.task_id)
        made = replace(made, rollouts=tuple(self._at_version(r) for r in made.rollouts))
        with self._lock:
            self._open -= 1
        return made

    def _at_version(self, made):
        versions = (self.version,) * len(made.completion.tokens)
        return replace(made, completion=replace(made.completion, policy_versions=versions))


def opened(engine, folder, *, state=None, tasks=None, **settings):
    return AsyncRollouts(
        engine,
        tasks or stream(7),
        config(**settings),
        journal=Journal(folder),
        state=state,
    )


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_groups_survive_the_journal_to_the_last_bit(tmp_path):
    made = RolloutGroup(group(0, 1).task, (rollout(1 / 3, total=0.1 + 0.2), rollout(0.0)))
    assert from_json(to_json(made)) == made
    journal = Journal(tmp_path)
    journal.write(7, made)
    assert journal.read(7, made.task) == made and journal.tickets() == [7]
    assert journal.read(7, replace(made.task, task_id="another")) is None
    assert journal.newest_version() == 0


def test_batches_come_in_the_order_of_their_tasks(tmp_path):
    def slow_first(task, ticket):
        time.sleep(0.05 if ticket == 0 else 0)
        return group(0, 1, name=task.task_id)

    rollouts = opened(slow_first, tmp_path)
    wait_for(lambda: len(rollouts._finished) == 6)
    expected = [task.task_id for task in stream(7).take(6)]
    found = [g.task.task_id for step in (0, 1) for g in rollouts.next(step=step, version=0).kept]
    assert found == expected


def test_no_more_than_the_window_is_sampled_ahead(tmp_path):
    engine = Engine()
    rollouts = opened(engine, tmp_path, queue_groups=1)
    time.sleep(0.2)
    assert rollouts.window == PROMPTS + 1 and sum(engine.asked.values()) == PROMPTS + 1
    rollouts.next(step=0, version=0)
    time.sleep(0.2)
    assert sum(engine.asked.values()) == 2 * PROMPTS + 1


def test_a_small_lag_bounds_the_window(tmp_path):
    rollouts = opened(Engine(), tmp_path, queue_groups=50, max_policy_lag=2 * UPDATES + 1)
    assert rollouts.window == 3 * PROMPTS


def test_groups_older_than_the_lag_are_dropped_and_counted(tmp_path):
    engine = Engine()
    rollouts = opened(engine, tmp_path, max_policy_lag=UPDATES)
    wait_for(lambda: len(rollouts._finished) == 6)  # by version 0
    engine.version = UPDATES + 1
    batch = rollouts.next(step=0, version=engine.version)
    assert batch.metrics["rl/groups_stale"] == 6.0
    assert len(batch.kept) == PROMPTS and batch.metrics["rl/policy_lag_of_batch"] == 0.0
    for made in batch.kept:
        for one in made.rollouts:
            assert engine.version - min(one.completion.policy_versions) <= UPDATES


def test_a_batch_of_stale_groups_alone_says_so(tmp_path):
    rollouts = opened(Engine(), tmp_path, max_policy_lag=UPDATES)
    batch = rollouts.next(step=0, version=100)
    assert not batch.kept and "more than 2 updates ago" in batch.reason


def test_uninformative_groups_are_replaced_up_to_a_bound(tmp_path):
    engine = Engine(lambda ticket: (1, 1) if ticket % 2 else (0, 1))
    rollouts = opened(engine, tmp_path, dynamic=True)
    wait_for(lambda: len(rollouts._finished) == rollouts.window)
    batch = rollouts.next(step=0, version=0)
    assert len(batch.kept) == PROMPTS and len(batch.all) == 5
    starved = opened(Engine(lambda _: (1, 1)), tmp_path / "starved", dynamic=True, extra=1)
    batch = starved.next(step=0, version=0)
    assert not batch.kept and len(batch.all) == 2 * PROMPTS and "none of 6" in batch.reason


def test_an_error_of_a_sampling_thread_reaches_the_trainer(tmp_path):
    def broken(task, ticket):
        raise M1Error("no worker is left")

    with pytest.raises(M1Error, match="no worker"):
        opened(broken, tmp_path).next(step=0, version=0)


@settings(max_examples=8)
@given(st.lists(st.tuples(st.integers(1, 3), st.booleans()), min_size=1, max_size=4))
def test_after_any_deaths_every_group_is_trained_on_once_and_no_finished_one_is_sampled_again(
    tmp_path_factory, lives
):
    """Each life makes some steps, maybe a checkpoint before the last, and dies."""
    folder = tmp_path_factory.mktemp("journal")
    finished = Counter()

    def sample(task, ticket):
        finished[ticket] += 1
        return group(0, 1, name=task.task_id)

    trained, saved = [], {"step": 0, "trained": [], "tasks": {"cursor": 0}, "rollouts": None}
    step = 0
    for num_steps, is_saved in [*lives, (2, True)]:
        tasks = stream(7)
        tasks.restore(saved["tasks"])
        step, trained = saved["step"], list(saved["trained"])
        journal = Journal(folder)
        journal.rewind(step)
        rollouts = opened(sample, folder, state=saved["rollouts"], tasks=tasks)
        for number in range(num_steps):
            batch = rollouts.next(step=step, version=0)
            trained += [g.task.task_id for g in batch.kept]
            step += 1
            if is_saved and number == max(0, num_steps - 2):
                saved = {
                    "step": step,
                    "trained": list(trained),
                    "tasks": tasks.state(),
                    "rollouts": rollouts.state(),
                }
        window = 2 * PROMPTS
        wait_for(lambda: len(rollouts._finished) == window)  # noqa: B023
        rollouts.close()
    taken = [task.task_id for task in stream(7).take(len(finished))]
    kept = [ticket for line in Journal(folder).steps() for ticket in line["kept"]]
    assert trained == [taken[ticket] for ticket in kept]
    assert len(kept) == len(set(kept)) and not set(kept) & set(rollouts._open)
    assert set(finished) == set(kept) | set(Journal(folder).tickets())
    assert set(finished.values()) == {1}
