"""The DAG: data -> pretrain -> sft -> rl -> evaluate -> register, as far as the recipe has them.

Beside data, `sandbox` builds environments for rl and evaluate.
"""

from collections.abc import Callable
from typing import Any

from kfp import dsl

from components.data import data
from components.evaluate import evaluate
from components.pretrain import pretrain
from components.register import register
from components.rl import rl
from components.sandbox import sandbox
from components.sft import sft
from m1.config.schema import Recipe
from m1.config.stages import rl_config, stage_kind, stages_of
from m1.launch import stage_recipe

TITLES = {
    "data": "Data",
    "sandbox": "Environments",
    "pretrain": "Continual pretraining",
    "sft": "SFT",
    "rl": "RL (CISPO)",
    "evaluate": "Evaluation",
    "register": "Registration",
}


def build_pipeline(recipe: Recipe) -> Callable[..., Any]:
    """The KFP pipeline of a recipe.

    Stages are chosen here, while the DAG is built, so that it is flat: what the recipe leaves out
    is not in it. Each task gets the part of the recipe that it depends on and the pointers of
    earlier stages. RL in several lengths is a chain of tasks, each with its own checkpoint.
    """

    def task(component: Any, name: str, **inputs: Any) -> Any:
        resolved = stage_recipe(name, recipe).model_dump_json(by_alias=True)
        made = component(recipe=resolved, **inputs)
        return made.set_container_image(recipe.image).set_display_name(_title(name))

    def reinforce(**inputs: Any) -> Any:
        made: Any = None
        for name in stages_of(recipe):
            if stage_kind(name) == "rl":
                chain = {"stage": name, "previous": made} if made is not None else {"stage": name}
                made = task(rl, name, **inputs, **chain).outputs["output"]
        return made

    def _title(name: str) -> str:
        title = TITLES[stage_kind(name)]
        if name == stage_kind(name):
            return title
        return f"{title}, {rl_config(name, recipe).sampling.max_new_tokens:,} tokens"

    @dsl.pipeline(name=f"m1-{recipe.name}", description="MiniMax-M1 training")  # type: ignore[untyped-decorator]
    def m1() -> None:
        corpus = task(data, "data").outputs["output"]
        environments = {}
        if recipe.sandbox is not None:
            environments["sandbox"] = task(sandbox, "sandbox").outputs["output"]
        models = {"pretrain": task(pretrain, "pretrain", data=corpus).outputs["output"]}
        if recipe.sft is not None:
            models["sft"] = task(sft, "sft", data=corpus, **models).outputs["output"]
        if recipe.rl is not None:
            models["rl"] = reinforce(data=corpus, **environments, **models)
        if recipe.evaluate is not None:
            task(evaluate, "evaluate", data=corpus, **environments, **models)
        if recipe.register_ is not None:
            task(register, "register", data=corpus, **models)

    return m1  # type: ignore[no-any-return]
