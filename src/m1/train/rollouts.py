"""Who samples for the trainer: its own engine, or workers, waited for or not."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from m1.config.schema import Recipe
from m1.data.tokenizer import Tokenizer
from m1.inference.engine import LocalEngine
from m1.rewards.service.pool import RewardService, ServiceConfig
from m1.rollout.groups import needs_service
from m1.rollout.replicas import Replicas
from m1.rollout.swe import SWE, SweTasks
from m1.rollout.tasks import TaskSource
from m1.stage import StageContext
from m1.train.sampling import Parts, Rollouts, synchronous
from m1.train.trainer import Trainer
from m1.train.worker_rollouts import with_workers
from m1.types import M1Error, Task


def open_rollouts(
    context: StageContext,
    recipe: Recipe,
    trainer: Trainer,
    tasks: TaskSource,
    all_tasks: Sequence[Task],
    parent: Path,
    *,
    phase: Callable[[str], None],
    state: Mapping[str, Any],
    swe: SweTasks | None = None,
) -> Rollouts:
    """Make ready whoever samples.

    Args:
        context: Of the stage.
        recipe: The whole.
        trainer: Whose weights sample, with a checkpoint loaded.
        tasks: Where prompts come from.
        all_tasks: Any that may come, by which it is decided whether verifiers need processes.
        parent: Checkpoint that the stage began with, for workers to start from.
        phase: Told when sampling and scoring begin.
        state: What was saved with the checkpoint, `rollouts` among it; a fresh stage's has none.
        swe: What tasks of software engineering need, where there are some.

    Raises:
        M1Error: The layout cannot sample, or a worker does not come up.
    """
    config = recipe.rl
    assert config is not None
    has_workers = config.rollout.has_workers
    if config.parallel.pipeline > 1 and not has_workers:
        raise M1Error(
            f"rl.parallel has pipeline {config.parallel.pipeline}, but the engine in the trainer's "
            "process needs every layer on every rank; set it to 1 and use tensor or expert ranks, "
            "or let workers sample (rl.rollout)"
        )
    replicas = Replicas.on_first_rank() if has_workers else Replicas.of(config.parallel)
    with ExitStack() as stack:
        service = None
        if replicas.is_first and needs_service(task for task in all_tasks if task.verifier != SWE):
            settings = config.reward_service
            service = stack.enter_context(
                RewardService(
                    ServiceConfig(
                        num_workers=settings.num_workers,
                        num_retries=settings.num_retries,
                        timeout_scale=settings.timeout_scale,
                    )
                )
            )
        parts = Parts(
            context=context,
            recipe=recipe,
            config=config,
            trainer=trainer,
            tokenizer=Tokenizer(context.path_of("data") / "tokenizer"),
            tasks=tasks,
            service=service,
            replicas=replicas,
            phase=phase,
            swe=swe,
        )
        saved = state.get("rollouts", {})
        if not has_workers:
            return _local(parts, saved, stack)
        return with_workers(parts, saved, parent, stack, step=int(state["step"]))


def _local(parts: Parts, saved: Mapping[str, Any], stack: ExitStack) -> Rollouts:
    """The trainer's own weights sample."""
    engine = LocalEngine(
        parts.trainer.model,
        stop_token=parts.tokenizer.end,
        num_tokens=parts.tokenizer.vocab_size,
        repetition_stop=parts.config.repetition_stop,
        record_experts=parts.config.routing_replay == "rollout",
    )

    def load(version: int) -> None:
        engine.policy_version = version

    version = int(saved.get("version", 0))
    load(version)
    source = synchronous(parts, engine)
    return Rollouts(
        lambda step, _: source.next(step=step),
        load,
        version=version,
        state=dict,
        stack=stack.pop_all(),
    )
