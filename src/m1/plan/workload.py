"""What a stage of a recipe asks of its GPUs: layout, batches, tokens of a step, decoding."""

from dataclasses import dataclass
from math import ceil

from m1.config.schema import ParallelConfig, Recipe, RlConfig, TrainConfig
from m1.config.stages import model_stages, rl_config, stage_kind, stages_of
from m1.plan.cost import StepWork
from m1.plan.memory import Batch, Decoding
from m1.types import M1Error

MAX_SEQUENCES = 512
"""Completions that `m1.inference.engine.LocalEngine` decodes together by default."""


@dataclass(frozen=True)
class Workload:
    """One stage."""

    stage: str
    parallel: ParallelConfig
    batch: Batch
    work: StepWork
    num_steps: int
    sequence_length: int
    decoding: Decoding
    is_sampling: bool
    """Whether decoding is part of the stage, on the GPUs that train."""


def workload_of(
    recipe: Recipe, stage: str, *, num_sequences: int | None = None, length: int | None = None
) -> Workload:
    """The workload of `pretrain`, `sft`, `rl` or one length of it, such as `rl_40960`.

    Where RL has several lengths, `rl` is the longest.

    Args:
        recipe: The recipe.
        stage: Name of the stage.
        num_sequences: Sequences decoded together on one replica; absent: as the engine does in RL,
            else 1.
        length: Tokens of each; absent: the longest completion in RL, else a packed row.

    Raises:
        M1Error: The recipe lacks the stage, or a number is not positive.
    """
    for name, value in (("sequences", num_sequences), ("length", length)):
        if value is not None and value < 1:
            raise M1Error(f"{name} is {value}, but must be at least 1; raise it")
    present = model_stages(stages_of(recipe))
    if stage == "rl" and recipe.rl is not None:
        stage = present[-1]
    if stage not in present:
        raise M1Error(
            f"stage is {stage!r}, but this recipe trains in {', '.join(present)}; choose one"
        )
    if stage_kind(stage) == "rl":
        return _rl(stage, rl_config(stage, recipe), num_sequences, length)
    table: TrainConfig = getattr(recipe, stage)
    row = recipe.data.sequence_length
    return _supervised(stage, table, row, Decoding(num_sequences or 1, length or row))


def _supervised(stage: str, config: TrainConfig, row: int, decoding: Decoding) -> Workload:
    """Packed rows count as one sequence each: the documents inside are shorter."""
    rows_at_once = config.micro_batch_rows * config.parallel.data
    return Workload(
        stage=stage,
        parallel=config.parallel,
        batch=Batch(config.micro_batch_rows * row, config.global_batch_rows // rows_at_once),
        work=StepWork(sampled=0, scored=0, trained=config.global_batch_rows * row),
        num_steps=config.num_steps,
        sequence_length=row,
        decoding=decoding,
        is_sampling=False,
    )


def _rl(stage: str, config: RlConfig, num_sequences: int | None, length: int | None) -> Workload:
    """One generation batch, every completion at its longest: sampled, scored and trained once.

    Prompts and the extra batches of dynamic sampling are not counted.
    """
    longest = config.sampling.max_new_tokens
    completions = config.prompts_per_step * config.group_size
    tokens = completions * longest
    tokens_of_update = tokens / config.updates_per_step / config.parallel.data
    at_once = min(MAX_SEQUENCES, ceil(completions / config.parallel.data))
    return Workload(
        stage=stage,
        parallel=config.parallel,
        batch=Batch(config.micro_batch_tokens, ceil(tokens_of_update / config.micro_batch_tokens)),
        work=StepWork(sampled=tokens, scored=tokens, trained=tokens),
        num_steps=config.num_steps,
        sequence_length=longest,
        decoding=Decoding(num_sequences or at_once, length or longest),
        is_sampling=True,
    )
