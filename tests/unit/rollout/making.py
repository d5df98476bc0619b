"""Rollouts made by hand."""

from m1.config.schema import DynamicSamplingConfig, OptimizerConfig, RlConfig
from m1.rollout.tasks import TaskStream
from m1.types import Completion, Reward, Rollout, RolloutGroup, Task


def task(name):
    return Task(task_id=str(name), source="s", prompt="p", reference="r", verifier="v")


def rollout(
    accuracy, *, total=None, failed=False, prompt=(5, 6, 7), tokens=(8, 9), reason="stop", name="t"
):
    completion = Completion(
        prompt_tokens=prompt,
        tokens=tokens,
        logprobs=tuple(-0.1 * (i + 1) for i in range(len(tokens))),
        entropies=tuple(float(i) for i in range(len(tokens))),
        finish_reason=reason,
        policy_versions=(0,) * len(tokens),
    )
    reward = Reward(accuracy if total is None else total, accuracy, {"format": 1.0}, failed)
    return Rollout(task(name), completion, reward)


def group(*accuracies, name="t"):
    return RolloutGroup(task(name), tuple(rollout(a, name=name) for a in accuracies))


def config(*, prompts=2, **dynamic):
    return RlConfig(
        num_steps=1,
        prompts_per_step=prompts,
        group_size=2,
        updates_per_step=1,
        optimizer=OptimizerConfig(lr=1e-3),
        dynamic_sampling=DynamicSamplingConfig(**dynamic),
    )


def stream(count, seed=0):
    return TaskStream([task(number) for number in range(count)], seed=seed)


def names(tasks):
    return [each.task_id for each in tasks]
