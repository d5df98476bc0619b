"""Evaluation of every checkpoint of a run on the same held-out tasks."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m1.config.layout import padded_vocab
from m1.config.schema import BenchmarkConfig, EvaluateConfig, ParallelConfig, Recipe, RewardConfig
from m1.config.stages import model_stages
from m1.data.tasks import read_tasks
from m1.data.tokenizer import Tokenizer
from m1.evaluate.statistics import mean_with_interval, pass_at_k
from m1.inference.engine import LocalEngine
from m1.model import checkpoint
from m1.model.build import build_model
from m1.model.parallel import initialize
from m1.rollout.groups import completion_text, sample_groups
from m1.rollout.swe import SWE, SweTasks, handed_over, sample_episodes
from m1.stage import StageContext, StageOutput
from m1.storage import atomic_write, folder_digest
from m1.types import M1Error, RolloutGroup, Task


def evaluate(context: StageContext, recipe: Recipe) -> StageOutput:
    """Sample k completions of every held-out task from each checkpoint, and score (paper sec. 6).

    Finished (checkpoint, benchmark) pairs are kept, so that an interrupted evaluation goes on where
    it stopped.
    """
    config = recipe.evaluate
    assert config is not None
    initialize(ParallelConfig(), seed=recipe.seed)
    data = context.path_of("data")
    tokenizer = Tokenizer(data / "tokenizer")
    heldout = read_tasks(data / "tasks" / "heldout.jsonl")
    swe = _swe_tasks(context, recipe, heldout)
    if swe is not None:
        heldout += swe.tasks()
    models = model_stages(context.inputs)
    partial = context.folder / "partial"
    partial.mkdir(exist_ok=True)
    total, done = len(models) * len(config.benchmarks), 0
    scores: dict[str, dict[str, Any]] = {b.name: {} for b in config.benchmarks}
    for name in models:
        engine = None
        for benchmark in config.benchmarks:
            tasks = select_tasks(benchmark, heldout)
            path = partial / f"{name}-{benchmark.name}.jsonl"
            if not path.exists():
                engine = engine or _load_engine(context, recipe, name, tokenizer)
                groups = _sample(engine, tasks, config, tokenizer, swe, seed=recipe.seed)
                _write_samples(path, groups, tokenizer)
            scores[benchmark.name][name] = _score(path, config, seed=recipe.seed)
            done += 1
            context.phase(f"{name} on {benchmark.name}", done, total)
            _log(
                context,
                benchmark.name,
                name,
                scores[benchmark.name][name],
                folder_digest(_folder_of(tasks, context, data)),
            )
    shutil.rmtree(context.output, ignore_errors=True)
    shutil.copytree(partial, context.output / "samples")
    atomic_write(context.output / "scores.json", json.dumps(scores, indent=1).encode())
    return StageOutput(metadata={"scores": scores})


def _swe_tasks(context: StageContext, recipe: Recipe, heldout: Sequence[Task]) -> SweTasks | None:
    """Held-out tasks of software engineering, where a benchmark asks for them."""
    config = recipe.evaluate
    assert config is not None
    names = {benchmark.task for benchmark in config.benchmarks}
    if SWE not in names or any(task.source == SWE for task in heldout):
        return None
    return handed_over(context, recipe, config.episodes, is_heldout=True)


def _sample(
    engine: LocalEngine,
    tasks: Sequence[Task],
    config: EvaluateConfig,
    tokenizer: Tokenizer,
    swe: SweTasks | None,
    *,
    seed: int,
) -> list[RolloutGroup]:
    """Groups of a benchmark's tasks: completions, or episodes of software engineering."""
    if swe is not None and tasks[0].verifier == SWE:
        return sample_episodes(
            engine,
            tasks,
            swe,
            tokenizer=tokenizer,
            group_size=config.num_samples,
            sampling=config.sampling,
            seed=seed,
        )
    return sample_groups(
        engine,
        tasks,
        tokenizer=tokenizer,
        group_size=config.num_samples,
        sampling=config.sampling,
        reward=RewardConfig(),
        seed=seed,
    )


def _folder_of(tasks: Sequence[Task], context: StageContext, data: Path) -> Path:
    """Where the tasks of a benchmark are written down."""
    is_swe = tasks[0].verifier == SWE
    return context.path_of("sandbox") / "instances" if is_swe else data / "tasks"


def select_tasks(benchmark: BenchmarkConfig, heldout: Sequence[Task]) -> list[Task]:
    """The benchmark's tasks, in stored order."""
    tasks = [task for task in heldout if task.source == benchmark.task]
    if not tasks:
        raise M1Error(
            f"benchmark {benchmark.name} uses task source {benchmark.task!r}, which has no "
            "held-out tasks; raise its num_heldout"
        )
    return tasks[: benchmark.num_tasks]


def _load_engine(
    context: StageContext, recipe: Recipe, name: str, tokenizer: Tokenizer
) -> LocalEngine:
    model = build_model(
        recipe.model, vocab_size=padded_vocab(recipe.model, tokenizer.vocab_size), seed=recipe.seed
    )
    checkpoint.load_weights(context.path_of(name) / "checkpoint", model)
    return LocalEngine(model, stop_token=tokenizer.end, num_tokens=tokenizer.vocab_size)


def _write_samples(path: Path, groups: Sequence[RolloutGroup], tokenizer: Tokenizer) -> None:
    lines = [
        json.dumps(
            {
                "task_id": group.task.task_id,
                "prompt": group.task.prompt,
                "reference": group.task.reference,
                "accuracies": [r.reward.accuracy for r in group.rollouts],
                "formats": [r.reward.parts.get("format", 0.0) for r in group.rollouts],
                "completions": [completion_text(tokenizer, r.completion) for r in group.rollouts],
                "lengths": [len(r.completion.tokens) for r in group.rollouts],
                "failed": [r.reward.is_failed for r in group.rollouts],
            }
        )
        for group in groups
    ]
    atomic_write(path, ("\n".join(lines) + "\n").encode())


def _score(path: Path, config: EvaluateConfig, *, seed: int) -> dict[str, Any]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    failed = sum(sum(row["failed"]) for row in rows)
    if failed:
        raise M1Error(
            f"{failed} completions in {path} could not be verified because the verifier itself "
            "failed; a score without them would mislead. Delete that file and run again"
        )
    n = config.num_samples
    means = [sum(row["accuracies"]) / n for row in rows]
    estimate = mean_with_interval(
        means, confidence=config.confidence, num_bootstrap=config.num_bootstrap, seed=seed
    )
    passed = [pass_at_k(n, round(sum(row["accuracies"])), n) for row in rows]
    at_k = mean_with_interval(
        passed, confidence=config.confidence, num_bootstrap=config.num_bootstrap, seed=seed
    )
    lengths = [length for row in rows for length in row["lengths"]]
    formats = [value for row in rows for value in row["formats"]]
    return {
        "mean": estimate.mean,
        "low": estimate.low,
        "high": estimate.high,
        "n": len(rows),
        "k": n,
        "pass_at_k": {"mean": at_k.mean, "low": at_k.low, "high": at_k.high},
        "format": sum(formats) / len(formats),
        "mean_length_tokens": sum(lengths) / len(lengths),
    }


def _log(
    context: StageContext, benchmark: str, name: str, score: dict[str, Any], digest: str
) -> None:
    model_id = context.inputs[name].metadata.get("model_id")
    if model_id is None:
        return
    metrics = {
        f"{benchmark}/mean_at_{score['k']}": score["mean"],
        f"{benchmark}/low": score["low"],
        f"{benchmark}/high": score["high"],
        f"{benchmark}/pass_at_{score['k']}": score["pass_at_k"]["mean"],
    }
    context.run.log_scores(model_id, dataset_name=benchmark, dataset_digest=digest, metrics=metrics)
