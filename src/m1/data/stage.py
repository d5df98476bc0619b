"""The data stage: sources and task generators in, packed tokens and tasks out."""

import shutil

from m1.config.schema import Recipe
from m1.data.build import build
from m1.stage import StageContext, StageOutput


def data(context: StageContext, recipe: Recipe) -> StageOutput:
    """Build everything anew: the stage takes seconds to minutes and has no state worth resuming."""
    shutil.rmtree(context.output, ignore_errors=True)
    card = build(recipe.data, seed=recipe.seed, folder=context.output, report=context.phase)
    names = ("tokenizer", "pretrain", "sft", "tasks")
    return StageOutput(
        datasets=tuple(n for n in names if (context.output / n).is_dir()),
        metadata={"card": card},
    )
