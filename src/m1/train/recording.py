"""What an RL stage keeps of its rollouts: files, and samples shown in MLflow."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from m1.config.schema import TraceConfig
from m1.data.tokenizer import Tokenizer
from m1.rollout import traces
from m1.rollout.groups import completion_text
from m1.stage import ROLLOUTS, StageContext
from m1.tracking.rollout_traces import RolloutTrace
from m1.train.task_filter import add_tallies, read_tallies, write_tallies
from m1.types import Rollout, RolloutGroup


def record_rollouts(
    context: StageContext,
    config: TraceConfig,
    tokenizer: Tokenizer,
    *,
    step: int,
    groups: Sequence[RolloutGroup],
    kept: Sequence[RolloutGroup],
) -> None:
    """Keep what a step (from 1) sampled, as `rl.traces` says. Ranks but the first keep nothing."""
    if not context.is_recording:
        return
    decode = partial(completion_text, tokenizer)
    if config.every_steps and step % config.every_steps == 0:
        traces.write_step(context.folder / ROLLOUTS, step, groups, decode=decode, kept=kept)
    if config.mlflow_every_steps and step % config.mlflow_every_steps == 0:
        chosen = spread(groups, config.mlflow_rollouts)
        context.run.log_rollouts([_shown(r, decode(r.completion)) for r in chosen], step=step)


def rewind_rollouts(context: StageContext, step: int) -> None:
    """After a resume at `step`: drop files of later steps."""
    if context.is_recording:
        traces.rewind(context.folder / ROLLOUTS, step)


def publish_pass_rates(context: StageContext, *, earlier: Path | None) -> None:
    """Write every task's pass rate so far into the stage's output, for the next length's filter.

    Args:
        context: The stage, whose output exists.
        earlier: Output of the length stage before, whose rates stand for tasks not sampled here.
    """
    if not context.is_recording:
        return
    before = read_tallies(earlier) if earlier is not None else {}
    own = traces.tally_accuracy(context.folder / ROLLOUTS)
    write_tallies(context.output, add_tallies(before, own))


def spread(groups: Sequence[RolloutGroup], count: int) -> list[Rollout]:
    """About `count` rollouts from all over a step: of groups in turn a right and a wrong one."""
    stride = max(1, len(groups) // max(1, -(-count // 2)))
    chosen: list[Rollout] = []
    for group in groups[::stride]:
        scored = [r for r in group.rollouts if not r.reward.is_failed]
        by_accuracy = sorted(scored, key=lambda r: r.reward.accuracy)
        chosen += by_accuracy[-1:] + (by_accuracy[:1] if len(by_accuracy) > 1 else [])
    return chosen[:count]


def _shown(rollout: Rollout, text: str) -> RolloutTrace:
    completion, reward = rollout.completion, rollout.reward
    versions = completion.policy_versions or (0,)
    return RolloutTrace(
        task_id=rollout.task.task_id,
        source=rollout.task.source,
        prompt=rollout.task.prompt,
        text=text,
        finish_reason=completion.finish_reason,
        reward=reward.total,
        accuracy=reward.accuracy,
        parts=reward.parts,
        num_tokens=len(completion.tokens),
        first_policy_version=versions[0],
        last_policy_version=versions[-1],
    )
