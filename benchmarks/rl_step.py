"""Seconds of an RL step beside TRL's GRPOTrainer, from the same SFT model on the same cores.

    python -m benchmarks.rl_step --root FOLDER --json OUT [--rounds 3] [--threads 2]
                                 [--recipe pipelines/recipes/one_gpu.toml]

Both train the recipe's SFT model, ours from its checkpoint, TRL's from the same weights exported
for transformers: the same prompts, group size, lengths and CISPO updates, AdamW; no dynamic
sampling and no curriculum, which TRL lacks; the same rewards in this process; no files, checkpoints
or tracking inside what is timed; both sample, then train. TRL generates with transformers, a batch
of an update at a time, and pads; gradient checkpointing, its default, is off, which is faster.

`laptop.toml`, the default: 32 prompts of 8 completions of at most 32 tokens, two updates, FP32 on
the CPU. With a recipe in BF16 both run on the GPU; TRL's weights and optimizer are BF16 there, as
its users have them, ours keep FP32 copies.
Completions are sampled, so the two differ in tokens: tokens/s stands beside seconds.

Rounds take turns, each in a process of its own, and the first step of a round is left out. TRL is
in the `dev` extra (1.16.0 was used).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.machine import write
from m1.config.layout import padded_vocab
from m1.config.loading import load_recipe
from m1.config.schema import CurriculumConfig, Recipe, RlConfig
from m1.data.tasks import read_tasks
from m1.data.tokenizer import Tokenizer
from m1.launch import run_stage
from m1.rewards.rules import score
from m1.stage import METRICS, read_metrics, stage_folder

LAPTOP = Path(__file__).parents[1] / "pipelines/recipes/laptop.toml"
BASE = ("data", "pretrain", "sft")
PHASES = ("generate", "score", "old_logprobs", "update", "sync")
OURS = {
    "generate": "rl/generate_seconds",
    "score": "rl/reward_seconds",
    "old_logprobs": "rl/old_logprobs_seconds",
    "update": "rl/update_seconds",
    "sync": "rl/publish_seconds",
}


def recipe_of(options: argparse.Namespace, *, seed: int, num_steps: int) -> Recipe:
    """The recipe with nothing in its RL that TRL lacks."""
    overrides = {
        "storage.root": options.root,
        "seed": seed,
        "rl.rollout.mode": "sync",
        "rl.rollout.num_workers": 0,
        "rl.num_steps": num_steps,
        "rl.dynamic_sampling.enabled": "false",
        "rl.checkpoint_every_steps": 1000,
        "rl.traces.every_steps": 0,
        "rl.traces.mlflow_every_steps": 0,
        "rl.repetition_stop.num_tokens": 3000,
    }
    texts = [f"{k}={v}" for k, v in overrides.items()] + list(options.set)
    recipe = load_recipe([options.recipe], overrides=texts)
    assert recipe.rl is not None
    plain = {"curriculum": CurriculumConfig()}
    return recipe.model_copy(update={"rl": recipe.rl.model_copy(update=plain)})


def base_outputs(options: argparse.Namespace) -> dict[str, Any]:
    """Pointers of data, pretraining and SFT, which run where they are missing."""
    texts = [f"storage.root={options.root}", *options.set]
    recipe = load_recipe([options.recipe], overrides=texts)
    return {stage: run_stage(stage, recipe) for stage in BASE}


def measure_ours(options: argparse.Namespace) -> list[dict[str, float]]:
    """Steps of the RL stage, without the first; a step lasts from one log line to the next."""
    recipe = recipe_of(options, seed=1000 + options.round, num_steps=options.steps + 1)
    shutil.rmtree(stage_folder("rl", recipe), ignore_errors=True)  # of an earlier measurement
    run_stage("rl", recipe, inputs=base_outputs(options))
    rows = read_metrics(stage_folder("rl", recipe) / METRICS)
    found = []
    for before, row in pairwise(rows):
        metrics = row["metrics"]
        tokens = metrics["rl/completion_length_tokens"] * completions_of(recipe.rl)
        phases = {phase: metrics.get(name, 0.0) for phase, name in OURS.items()}
        found.append({"step": row["time"] - before["time"], "tokens": tokens, **phases})
    return found


def completions_of(config: RlConfig | None) -> int:
    """Completions of a step."""
    assert config is not None
    return config.prompts_per_step * config.group_size


def export(options: argparse.Namespace, folder: Path) -> None:
    """The SFT model for transformers."""
    from m1.model import checkpoint
    from m1.model.build import build_model
    from m1.model.hf import export_hf
    from m1.model.parallel import initialize

    recipe = recipe_of(options, seed=1, num_steps=1)
    outputs = base_outputs(options)
    initialize(seed=1)
    files = Path(outputs["data"].uri) / "tokenizer"
    tokenizer = Tokenizer(files)
    vocab = padded_vocab(recipe.model, tokenizer.vocab_size)
    model = build_model(recipe.model, vocab_size=vocab, seed=1)
    checkpoint.load_weights(Path(outputs["sft"].uri) / "checkpoint", model)
    export_hf(model, recipe.model, folder, eos_token_id=tokenizer.end, pad_token_id=tokenizer.pad)
    shutil.copytree(files, folder, dirs_exist_ok=True)


def measure_trl(options: argparse.Namespace) -> list[dict[str, float]]:
    """Steps of TRL's trainer, without the first; a step is one generation and two updates."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(options.threads)
    recipe = recipe_of(options, seed=1, num_steps=1)
    assert recipe.rl is not None
    rl, data = recipe.rl, Path(base_outputs(options)["data"].uri)
    on_gpu = recipe.model.precision != "fp32"
    tokenizer = Tokenizer(data / "tokenizer")
    tasks = {task.task_id: task for task in read_tasks(data / "tasks" / "rl.jsonl")}
    seconds = dict.fromkeys(PHASES, 0.0)
    tokens = [0]

    def reward(completion_ids: list[list[int]], task_id: list[str], **_: Any) -> list[float]:
        tokens[0] += sum(map(len, completion_ids))
        texts = [tokenizer.decode([i for i in ids if i != tokenizer.end]) for ids in completion_ids]
        pairs = zip(task_id, texts, strict=True)
        return [score(tasks[name], text, rl.reward).total for name, text in pairs]

    def timed(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            result = function(*arguments, **named)
            seconds[phase] += time.perf_counter() - started
            return result

        return run

    found: list[dict[str, float]] = []

    class Timed(GRPOTrainer):  # type: ignore[misc]
        """Times the phases of generating and scoring; the rest of a step is the update."""

        started = 0.0

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            now = time.perf_counter()
            if self.started:
                spent = sum(seconds[phase] for phase in PHASES if phase != "update")
                whole = now - self.started
                found.append(
                    {**seconds, "step": whole, "tokens": tokens[0], "update": whole - spent}
                )
            self.started, tokens[0] = now, 0
            seconds.update(dict.fromkeys(PHASES, 0.0))
            return super()._generate_and_score_completions(inputs)

        def _get_per_token_logps_and_entropies(self, *arguments: Any, **named: Any) -> Any:
            run = super()._get_per_token_logps_and_entropies
            if torch.is_grad_enabled():
                return run(*arguments, **named)
            return timed("old_logprobs", run)(*arguments, **named)

    num_updates = rl.updates_per_step
    settings = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=not on_gpu,
        bf16=on_gpu,
        gradient_checkpointing=False,
        per_device_train_batch_size=completions_of(rl) // num_updates,
        steps_per_generation=num_updates,
        num_generations=rl.group_size,
        max_completion_length=rl.sampling.max_new_tokens,
        max_steps=num_updates * (options.steps + 2),
        loss_type="cispo",
        epsilon_high=5.0,  # TRL clamps there, ours at 1 + eps_high
        beta=0.0,
        learning_rate=rl.optimizer.lr,
        adam_beta2=rl.optimizer.beta2,
        adam_epsilon=rl.optimizer.epsilon,
        weight_decay=0.0,
        lr_scheduler_type="constant",
        temperature=rl.sampling.temperature,
        shuffle_dataset=False,
        save_strategy="no",
        report_to="none",
        logging_steps=10_000,
        disable_tqdm=True,
        seed=options.round,
    )
    rows = [
        {"prompt": [{"role": "user", "content": t.prompt}], "task_id": t.task_id}
        for t in tasks.values()
    ]
    folder = exported(options)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    trainer = Timed(
        # SDPA refuses the mask that transformers makes for a hybrid on a GPU.
        model=AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager" if on_gpu else "sdpa"
        ),
        reward_funcs=reward,
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    trainer._generate_single_turn = timed("generate", trainer._generate_single_turn)
    trainer._calculate_rewards = timed("score", trainer._calculate_rewards)
    trainer.train()
    return found[1:]


def exported(options: argparse.Namespace) -> Path:
    """Where the SFT model for transformers is."""
    return Path(options.root) / f"hf-{options.recipe.stem}"


def run_round(side: str, number: int, options: argparse.Namespace) -> list[dict[str, float]]:
    """One side's steps, in a process of its own with the threads that both get."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "steps.json"
        command = [sys.executable, "-m", "benchmarks.rl_step", *sys.argv[1:]]
        command += ["--side", side, "--round", str(number), "--json", str(path)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        found: list[dict[str, float]] = json.loads(path.read_text())
        return found


def table(steps: list[dict[str, float]]) -> dict[str, float]:
    """Medians over steps: seconds, their phases, and tokens a second."""
    names = ("step", *PHASES)
    found = {f"{name}_seconds": median(step[name] for step in steps) for name in names}
    found["other_seconds"] = median(
        step["step"] - sum(step[phase] for phase in PHASES) for step in steps
    )
    found["tokens_per_second"] = median(step["tokens"] / step["step"] for step in steps)
    found["tokens"] = median(step["tokens"] for step in steps)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--recipe", type=Path, default=LAPTOP)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", choices=("base", "m1", "trl"), help="used by itself")
    parser.add_argument("--round", type=int, default=0, help="used by itself")
    options = parser.parse_args()
    if options.side == "base":
        export(options, exported(options))
        return
    if options.side:
        measured = measure_ours(options) if options.side == "m1" else measure_trl(options)
        options.json.write_text(json.dumps(measured))
        return
    base = [sys.executable, "-m", "benchmarks.rl_step", *sys.argv[1:], "--side", "base"]
    subprocess.run(base, check=True)
    steps: dict[str, list[dict[str, float]]] = {"m1": [], "trl": []}
    ratios, loads = [], []
    for number in range(options.rounds):
        for side in ("m1", "trl"):
            made = run_round(side, number, options)
            loads.append(os.getloadavg()[0])
            steps[side] += made
            print(number, side, json.dumps(table(made)), flush=True)
        last = {side: steps[side][-options.steps :] for side in steps}
        ratios.append(table(last["trl"])["step_seconds"] / table(last["m1"])["step_seconds"])
    results = {side: table(found) for side, found in steps.items()}
    print("times as fast, by round:", [round(ratio, 2) for ratio in ratios])
    write(
        options.json,
        {
            "recipe": options.recipe.stem,
            "threads": options.threads,
            **results,
            "times_as_fast_by_round": ratios,
            "load_average_after_each": loads,
            "steps": steps,
        },
    )


if __name__ == "__main__":
    main()
