"""What an RL stage begins with: its length's values, its tasks, the model it starts from."""

from pathlib import Path

from m1.config.schema import Recipe, RlConfig
from m1.config.stages import model_stages, rl_config, stage_kind
from m1.data.tasks import read_tasks
from m1.stage import StageContext
from m1.train.gate import LengthGate
from m1.train.task_filter import read_tallies, select_tasks
from m1.types import Task


def at_length(context: StageContext, recipe: Recipe) -> Recipe:
    """The recipe with the rl table that is in force in this stage."""
    return recipe.model_copy(update={"rl": rl_config(context.name, recipe)})


def parent_of(context: StageContext) -> str:
    """The stage whose model this one starts from: the length before, else SFT, else pretraining."""
    return model_stages(context.inputs)[-1]


def earlier_length(context: StageContext) -> Path | None:
    """Output of the length stage before this one."""
    parent = parent_of(context)
    return context.path_of(parent) if stage_kind(parent) == "rl" else None


def tasks_at_length(context: StageContext, config: RlConfig) -> list[Task]:
    """RL tasks of the data stage, filtered for this length by the pass rates of earlier ones."""
    tasks = read_tasks(context.path_of("data") / "tasks" / "rl.jsonl")
    if not config.lengths:
        return tasks
    before = earlier_length(context)
    return select_tasks(tasks, config.lengths[0], read_tallies(before) if before else {})


def gate_of(config: RlConfig) -> LengthGate:
    """The stage's gate; without lengths one that never ends a stage."""
    return LengthGate(config.gate, config.lengths[0] if config.lengths else None)
