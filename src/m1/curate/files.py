"""Curation from a settings file to an output folder."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from m1.curate.card import write_curated
from m1.curate.pass_rate import Sampler
from m1.curate.rate_store import RateStore
from m1.curate.run import curate
from m1.curate.settings import CurateConfig, InputConfig
from m1.data.tasks.loading import load_tasks
from m1.rewards.service.pool import RewardService
from m1.types import Task


def curate_files(
    config: CurateConfig,
    folder: Path,
    *,
    sampler: Sampler | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Read the inputs, curate, write the folder; the card.

    Pass rates are kept in the folder's pass_rates.jsonl as they are measured, and a run that was
    killed goes on from them.

    Args:
        config: What to do.
        folder: Where tasks, drops, card and chart go.
        sampler: In place of the model that `pass_rate.model` names.
        report: Hears of every step.

    Raises:
        M1Error: An input or the model is not there.
    """
    report("reading")
    tasks = read_inputs(config.inputs)
    sft, benchmarks = read_inputs(config.sft), read_inputs(config.benchmarks)
    if config.pass_rate is None:
        found = curate(tasks, config, sft=sft, benchmarks=benchmarks, report=report)
    else:
        known, model = None, config.pass_rate.model
        if sampler is None and model is not None:
            from m1.curate.samplers import open_sampler  # imports torch

            known = RateStore(folder / "pass_rates.jsonl", model, config.pass_rate.num_samples)
            sampler = open_sampler(model)
        with RewardService() as service:
            found = curate(
                tasks, config, sft=sft, benchmarks=benchmarks, sampler=sampler, judge=service,
                known_rates=known, report=report,
            )  # fmt: skip
    return write_curated(folder, found, config)


def curate_artifact(settings: str, output: Any) -> None:
    """Body of the KFP component: settings as JSON, the folder as the output's path."""
    config = CurateConfig.model_validate_json(settings)
    card = curate_files(config, Path(output.path))
    output.metadata.update({k: card[k] for k in ("num_kept", "num_dropped", "num_opened")})
    output.metadata["funnel"] = card["funnel"]


def read_inputs(inputs: Sequence[InputConfig]) -> list[Task]:
    """Tasks of all sets, in order."""
    sets = (load_tasks(x.uri, layout=x.layout, max_tasks=x.max_tasks) for x in inputs)
    return [task for tasks in sets for task in tasks]
