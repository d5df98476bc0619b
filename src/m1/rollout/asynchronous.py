"""Rollouts that are sampled while the trainer updates, each by weights of a bounded age."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from m1.config.schema import RlConfig
from m1.rollout.filtering import SampledBatch, is_kept, why_none
from m1.rollout.journal import Journal
from m1.rollout.tasks import TaskSource
from m1.rollout.workers import PoolClosedError
from m1.types import RolloutGroup, Task

_KEPT_STATES = 2
"""Checkpoints from which a run may have to go on: one may still be being written."""
SampleOne = Callable[[Task, int], RolloutGroup]
"""(task, ticket) -> its group, scored and screened; called from many threads."""


class AsyncRollouts:
    """A window of tasks that are being sampled, or wait for the trainer.

    Every task taken gets a ticket. Its group is written to the journal when it is scored, and is
    trained on once, dropped as uninformative or too old, or still open. The window is as large as
    one batch and what may wait, and no larger than what `max_policy_lag` lets train in time.
    Of the finished groups the one with the lowest ticket comes first.
    """

    def __init__(
        self,
        sample: SampleOne,
        tasks: TaskSource,
        config: RlConfig,
        *,
        journal: Journal,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """Begin to sample.

        Args:
            sample: Makes one group.
            tasks: Where prompts come from; only the thread that calls `next` touches it.
            config: The RL table.
            journal: Where finished groups are kept.
            state: From `state()`, to go on from a checkpoint.
        """
        self._sample, self._tasks, self._config = sample, tasks, config
        self._journal = journal
        self._wanted = config.prompts_per_step
        self.max_policy_lag = config.rollout.max_policy_lag or 2 * config.updates_per_step
        self.window = self._wanted + min(
            config.rollout.queue_groups or self._wanted,
            self._wanted * (self.max_policy_lag // config.updates_per_step),
        )
        self._changed = threading.Condition()
        self._next_ticket = 0
        self._open: dict[int, Task] = {}
        self._finished: dict[int, RolloutGroup] = {}
        self._used: list[list[int]] = [[]]
        """Tickets used up since each of the last states, the newest last."""
        self._failure: BaseException | None = None
        self._is_closed = False
        if state:
            self._next_ticket = int(state["next_ticket"])
            known = {int(number): Task(**task) for number, task in state["open"]}
            stale = [t for t in journal.tickets() if t < self._next_ticket and t not in known]
            journal.drop(stale)  # trained on before the checkpoint
            for ticket, task in known.items():
                self._issue(ticket, task)
        self._fill()

    def next(self, *, step: int, version: int) -> SampledBatch:
        """A batch of groups that tell something, none older than `max_policy_lag`.

        Args:
            step: Which will train on it.
            version: Of the weights that will be trained.

        Raises:
            M1Error: A group could not be sampled.
        """
        config = self._config.dynamic_sampling
        bound = self._wanted * (1 + (config.max_extra_batches if config.enabled else 0))
        kept: list[RolloutGroup] = []
        everything: list[RolloutGroup] = []
        fate: dict[str, list[int]] = {"kept": [], "uninformative": [], "stale": []}
        oldest = version
        while len(kept) < self._wanted and len(everything) < bound:
            ticket, group = self._take()
            everything.append(group)
            sampled_at = oldest_version(group, version)
            if version - sampled_at > self.max_policy_lag:
                fate["stale"].append(ticket)
                bound += len(fate["stale"]) <= self.window
            elif is_kept(group, config):
                kept.append(group)
                fate["kept"].append(ticket)
                oldest = min(oldest, sampled_at)
            else:
                fate["uninformative"].append(ticket)
            self._fill()
        num_stale = len(fate["stale"])
        self._used[-1] += [ticket for tickets in fate.values() for ticket in tickets]
        self._journal.note(step, **fate)
        metrics = {
            "rl/groups_stale": float(num_stale),
            "rl/policy_lag_of_batch": float(version - oldest),
            "rl/queue_groups": float(len(self._finished)),
        }
        reason = "" if kept else self._why_none(everything, num_stale)
        return SampledBatch(kept=kept, all=everything, reason=reason, metrics=metrics)

    def state(self) -> dict[str, Any]:
        """Tickets that are neither trained on nor dropped, for the checkpoint."""
        self._used.append([])
        if len(self._used) > _KEPT_STATES + 1:
            self._journal.drop(self._used.pop(0))
        with self._changed:
            found = [(ticket, asdict(task)) for ticket, task in sorted(self._open.items())]
        return {"next_ticket": self._next_ticket, "open": found}

    def close(self) -> None:
        """Take no more; threads that wait for the engine end with it, or with this process."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _why_none(self, groups: list[RolloutGroup], num_stale: int) -> str:
        if num_stale <= len(groups) / 2:
            return why_none(groups)
        return (
            f"{num_stale} of {len(groups)} groups were sampled more than {self.max_policy_lag} "
            "updates ago; raise rl.rollout.max_policy_lag, or add workers"
        )

    def _take(self) -> tuple[int, RolloutGroup]:
        """The finished group with the lowest ticket, waited for."""
        with self._changed:
            self._changed.wait_for(lambda: self._finished or self._failure or self._is_closed)
            if self._failure is not None:
                raise self._failure
            if not self._finished:
                raise PoolClosedError("the rollouts were closed")
            ticket = min(self._finished)
            del self._open[ticket]
            return ticket, self._finished.pop(ticket)

    def _fill(self) -> None:
        while len(self._open) < self.window:
            (task,) = self._tasks.take(1)
            ticket, self._next_ticket = self._next_ticket, self._next_ticket + 1
            self._issue(ticket, task)

    def _issue(self, ticket: int, task: Task) -> None:
        known = self._journal.read(ticket, task)
        with self._changed:
            self._open[ticket] = task
            if known is not None:
                self._finished[ticket] = known
        if known is None:
            # Not a pool's thread, for which the interpreter would wait at its end.
            threading.Thread(target=self._work, args=(ticket, task), daemon=True).start()

    def _work(self, ticket: int, task: Task) -> None:
        try:
            group = self._sample(task, ticket)
            self._journal.write(ticket, group)
        except PoolClosedError:
            return  # the stage is over
        except BaseException as error:  # raised where the trainer asks for the next batch
            with self._changed:
                self._failure = self._failure or error
                self._changed.notify_all()
            return
        with self._changed:
            self._finished[ticket] = group
            self._changed.notify_all()


def oldest_version(group: RolloutGroup, default: int) -> int:
    """Version of the weights that made the oldest token of a group."""
    versions = [
        min(r.completion.policy_versions)
        for r in group.rollouts
        if not r.reward.is_failed and r.completion.policy_versions
    ]
    return min(versions, default=default)
