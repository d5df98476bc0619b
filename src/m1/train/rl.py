"""RL with CISPO (paper sec. 3): sample, score, advantage, batch, update, publish."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from m1.config.layout import padded_vocab
from m1.config.schema import ParallelConfig, Recipe, RlConfig
from m1.data.tasks import read_tasks
from m1.data.tokenizer import Tokenizer
from m1.inference.engine import LocalEngine
from m1.model import checkpoint
from m1.model.parallel import initialize
from m1.rollout.groups import sample_groups
from m1.stage import PROBABILITIES, StageContext, StageOutput
from m1.storage import atomic_write
from m1.train.advantage import group_advantages, is_informative
from m1.train.batches import TrainSample, pack_samples, row_order
from m1.train.losses import policy_loss, token_weights
from m1.train.microbatch import MicroBatch
from m1.train.schedule import learning_rate
from m1.train.supervised import publish, resume, save
from m1.train.trainer import Trainer
from m1.types import M1Error, RolloutGroup, Task

SCATTER_POINTS = 2000
MIN_SCORED = 2
"""Scored completions below which a group has no relative advantage."""
Sampler = Callable[[Sequence[Task], int], list[RolloutGroup]]


def rl(context: StageContext, recipe: Recipe) -> StageOutput:
    """Train the SFT model (or the pretrained one) by RL on the recipe's tasks.

    One step: sample a group of completions for each prompt, keep the groups whose accuracy tells
    something, and make several off-policy updates on them. The next step samples from the updated
    weights. Synchronous, and a function of weights, optimizer state, step and cursor: an
    interrupted run ends with the same weights as an uninterrupted one.
    """
    config = recipe.rl
    assert config is not None
    _require_samplable(config.parallel)
    initialize(config.parallel, seed=recipe.seed)
    data = context.path_of("data")
    tokenizer = Tokenizer(data / "tokenizer")
    tasks = TaskStream(read_tasks(data / "tasks" / "rl.jsonl"), seed=recipe.seed)
    trainer = Trainer(
        recipe.model,
        config.optimizer,
        vocab_size=padded_vocab(recipe.model, tokenizer.vocab_size),
        seed=recipe.seed,
        parallel=config.parallel,
    )
    engine = LocalEngine(
        trainer.model,
        stop_token=tokenizer.end,
        num_tokens=tokenizer.vocab_size,
        repetition_stop=config.repetition_stop,
    )
    parent = "sft" if "sft" in context.inputs else "pretrain"
    state = resume(context, trainer, start=lambda: checkpoint.inside(context.path_of(parent)))
    step, version, tasks.cursor = (int(state.get(k, 0)) for k in ("step", "version", "cursor"))
    while step < config.num_steps:
        started = time.perf_counter()

        def sample(batch: Sequence[Task], seed: int) -> list[RolloutGroup]:
            return sample_groups(
                engine,
                batch,
                tokenizer=tokenizer,
                group_size=config.group_size,
                sampling=config.sampling,
                reward=config.reward,
                seed=seed,
            )

        engine.policy_version = version
        sampled = sample_informative(sample, tasks, config, seed=recipe.seed * 1_000_003 + step)
        generated = time.perf_counter()
        samples = train_samples(sampled.kept)
        old_logprobs = score_samples(trainer, samples, config)
        scored = time.perf_counter()
        metrics = update(trainer, samples, old_logprobs, config, step=step)
        step += 1
        version += int(metrics["rl/updates"])
        metrics |= rollout_metrics(sampled)
        metrics |= mismatch_metrics(samples, old_logprobs)
        num_tokens = sum(len(r.completion.tokens) for g in sampled.all for r in g.rollouts)
        metrics |= {
            "rl/generate_seconds": generated - started,
            "rl/score_seconds": scored - generated,
            "rl/update_seconds": time.perf_counter() - scored,
            "rl/tokens_per_second": num_tokens / (time.perf_counter() - started),
        }
        context.log(metrics, step=step, total=config.num_steps)
        if step == config.num_steps:
            _keep_scatter(context, samples, old_logprobs)
        elif step % config.checkpoint_every_steps == 0:
            position = {"cursor": tasks.cursor, "version": version}
            save(context, trainer, config, step, **position)
        trainer.finish_saves(wait=False)
    return publish(context, trainer, version)


def _require_samplable(parallel: ParallelConfig) -> None:
    if parallel.pipeline > 1:
        raise M1Error(
            f"rl.parallel has pipeline {parallel.pipeline}, but the engine in the trainer's "
            "process needs every layer on every rank; set it to 1 and use tensor or expert ranks"
        )


class TaskStream:
    """Tasks in shuffled epochs; its whole state is how many were taken."""

    def __init__(self, tasks: Sequence[Task], *, seed: int) -> None:
        if not tasks:
            raise M1Error("there are no RL tasks; set num_rl in data.tasks")
        self._tasks, self._seed, self.cursor = tasks, seed, 0

    def take(self, count: int) -> list[Task]:
        """The next tasks."""
        size, end = len(self._tasks), self.cursor + count
        taken: list[Task] = []
        while self.cursor < end:
            epoch, index = divmod(self.cursor, size)
            order = row_order(size, seed=self._seed, epoch=epoch)[index : index + end - self.cursor]
            taken += [self._tasks[number] for number in order]
            self.cursor += len(order)
        return taken


@dataclass(frozen=True)
class SampledBatch:
    """Groups sampled for one step."""

    kept: list[RolloutGroup]
    """Groups to train on."""
    all: list[RolloutGroup]
    """Every group that was sampled, for unbiased metrics."""


def sample_informative(
    sample: Sampler, tasks: TaskStream, config: RlConfig, *, seed: int
) -> SampledBatch:
    """Sample groups until enough have an accuracy strictly between 0 and 1 (dynamic sampling).

    At most `max_extra_batches` further batches are drawn; then the step goes on with the
    informative groups it has.

    Raises:
        M1Error: No group at all is informative after the last extra batch.
    """
    wanted = config.prompts_per_step
    everything: list[RolloutGroup] = []
    kept: list[RolloutGroup] = []
    dynamic = config.dynamic_sampling
    num_batches = 1 + (dynamic.max_extra_batches if dynamic.enabled else 0)
    for attempt in range(num_batches):
        groups = sample(tasks.take(wanted), seed * num_batches + attempt)
        everything += groups
        usable = [g for g in groups if _num_scored(g) >= MIN_SCORED]
        kept += [g for g in usable if not dynamic.enabled or _is_informative(g)]
        if len(kept) >= wanted:
            break
    failed = sum(r.reward.is_failed for g in everything for r in g.rollouts)
    if not kept and failed:
        raise M1Error(
            f"no group could be scored: the verifier failed on {failed} of "
            f"{sum(len(g.rollouts) for g in everything)} completions. Failed rollouts are never "
            "scored 0, so there is nothing to learn from; mend the verifier of these tasks"
        )
    if not kept:
        accuracy = np.mean([r.reward.accuracy for g in everything for r in g.rollouts])
        raise M1Error(
            f"none of {len(everything)} sampled groups had completions both right and wrong (mean "
            f"accuracy {accuracy:.3f}), so there is nothing to learn from. Use easier or harder "
            "tasks, a larger rl.group_size, or more rl.dynamic_sampling.max_extra_batches"
        )
    return SampledBatch(kept=kept[:wanted], all=everything)


def _num_scored(group: RolloutGroup) -> int:
    return sum(not r.reward.is_failed for r in group.rollouts)


def _is_informative(group: RolloutGroup) -> bool:
    return is_informative(
        [r.reward.accuracy for r in group.rollouts], [r.reward.is_failed for r in group.rollouts]
    )


def train_samples(groups: Sequence[RolloutGroup]) -> list[TrainSample]:
    """Join prompts and completions and give every rollout its group-relative advantage (Eq. 2)."""
    samples = []
    for prompt, group in enumerate(groups):
        advantages = group_advantages(
            [r.reward.total for r in group.rollouts], [r.reward.is_failed for r in group.rollouts]
        )
        for rollout, advantage in zip(group.rollouts, advantages, strict=True):
            if rollout.reward.is_failed:
                continue
            completion = rollout.completion
            ids = torch.tensor(completion.prompt_tokens + completion.tokens)
            num_prompt = len(completion.prompt_tokens)
            logprobs = torch.zeros(len(ids) - 1)
            logprobs[num_prompt - 1 :] = torch.tensor(completion.logprobs)
            samples.append(
                TrainSample(
                    tokens=ids[:-1],
                    targets=ids[1:],
                    loss_mask=torch.arange(len(ids) - 1) >= num_prompt - 1,
                    behaviour_logprobs=logprobs,
                    advantage=advantage,
                    prompt=prompt,
                )
            )
    return samples


def score_samples(
    trainer: Trainer, samples: Sequence[TrainSample], config: RlConfig
) -> list[torch.Tensor]:
    """old_logprobs: the trainer's own, before the first update; float32 [T] a sample."""
    no_weights = [torch.zeros(s.tokens.numel()) for s in samples]
    batches = pack_samples(samples, no_weights, max_tokens=config.micro_batch_tokens)
    joined = torch.cat(trainer.logprobs(batches))
    return list(torch.split(joined, [s.tokens.numel() for s in samples]))


def update(
    trainer: Trainer,
    samples: Sequence[TrainSample],
    old_logprobs: Sequence[torch.Tensor],
    config: RlConfig,
    *,
    step: int,
) -> dict[str, float]:
    """Make `updates_per_step` CISPO updates, each on its share of the prompts (Eq. 4 and 5)."""

    def loss(
        logprobs: torch.Tensor, batch: MicroBatch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        result = policy_loss(
            config.loss,
            logprobs=logprobs,
            old_logprobs=batch.extras["old_logprobs"],
            advantages=batch.extras["advantages"],
            loss_mask=batch.extras["loss_mask"],
            weights=batch.weights,
        )
        return result.loss, {"loss": result.loss.detach(), **result.sums}

    num_prompts = max(s.prompt for s in samples) + 1
    num_updates = min(config.updates_per_step, num_prompts)
    total_updates = config.num_steps * config.updates_per_step
    totals: dict[str, float] = {}
    for number, prompts in enumerate(np.array_split(np.arange(num_prompts), num_updates)):
        chosen = [i for i, s in enumerate(samples) if prompts[0] <= s.prompt <= prompts[-1]]
        mini_batch = [samples[i] for i in chosen]
        weights = token_weights(
            config.loss.aggregation,
            [s.loss_mask for s in mini_batch],
            [s.prompt for s in mini_batch],
        )
        batches = pack_samples(
            mini_batch,
            weights,
            max_tokens=config.micro_batch_tokens,
            old_logprobs=[old_logprobs[i] for i in chosen],
        )
        lr = learning_rate(
            config.schedule,
            peak=config.optimizer.lr,
            step=step * config.updates_per_step + number,
            num_steps=total_updates,
        )
        result = trainer.update(trainer.share(batches), loss, lr=lr)
        for name, value in {**result.sums, "grad_norm": result.grad_norm}.items():
            totals[name] = totals.get(name, 0.0) + value
    return {
        "rl/loss": totals["loss"] / num_updates,
        "rl/grad_norm": totals["grad_norm"] / num_updates,
        "rl/learning_rate": lr,
        "rl/updates": float(num_updates),
        "rl/importance_ratio": totals["importance_ratio"] / totals["tokens"],
        "rl/clip_fraction": totals["clipped"] / totals["tokens"],
        "rl/kl_nats": totals["kl"] / totals["tokens"],
        "rl/policy_lag_max_updates": float(num_updates - 1),
        "rl/policy_lag_mean_updates": (num_updates - 1) / 2,
    }


def rollout_metrics(sampled: SampledBatch) -> dict[str, float]:
    """Means over every sampled rollout, before dynamic sampling chose."""
    rollouts = [r for g in sampled.all for r in g.rollouts if not r.reward.is_failed]
    lengths = [len(r.completion.tokens) for r in rollouts]
    entropies = np.concatenate([r.completion.entropies for r in rollouts])
    reasons = [r.completion.finish_reason for r in rollouts]
    return {
        "rl/reward": float(np.mean([r.reward.total for r in rollouts])),
        "rl/accuracy": float(np.mean([r.reward.accuracy for r in rollouts])),
        "rl/format": float(np.mean([r.reward.parts.get("format", 0.0) for r in rollouts])),
        "rl/completion_length_tokens": float(np.mean(lengths)),
        "rl/entropy_nats": float(entropies.mean()),
        "rl/truncated_fraction": reasons.count("length") / len(reasons),
        "rl/repetition_fraction": reasons.count("repetition") / len(reasons),
        "rl/failed_rollouts": float(sum(len(g.rollouts) for g in sampled.all) - len(rollouts)),
        "rl/groups_sampled": float(len(sampled.all)),
        "rl/groups_kept": float(len(sampled.kept)),
    }


def mismatch_metrics(
    samples: Sequence[TrainSample], old_logprobs: Sequence[torch.Tensor]
) -> dict[str, float]:
    """Agreement of training- and inference-mode probabilities of sampled tokens (Fig. 3)."""
    training, inference = _sampled_logprobs(samples, old_logprobs)
    gap = training - inference
    probabilities = torch.stack([training, inference]).exp()
    metrics = {
        "rl/probability_max_difference": float(probabilities.diff(dim=0).abs().max()),
        "rl/mismatch_kl_nats": float((gap.exp() - 1 - gap).mean()),
    }
    if bool((probabilities.std(dim=1) > 0).all()):  # else the correlation is not defined
        metrics["rl/probability_correlation"] = float(torch.corrcoef(probabilities)[0, 1])
    return metrics


def _sampled_logprobs(
    samples: Sequence[TrainSample], old_logprobs: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """float64, of the sampled tokens: by the trainer, and by the engine."""
    pairs = zip(samples, old_logprobs, strict=True)
    training = torch.cat([old[s.loss_mask] for s, old in pairs]).double()
    inference = torch.cat([s.behaviour_logprobs[s.loss_mask] for s in samples]).double()
    return training, inference


def _keep_scatter(
    context: StageContext, samples: Sequence[TrainSample], old_logprobs: Sequence[torch.Tensor]
) -> None:
    pair = _sampled_logprobs(samples, old_logprobs)
    training, inference = (x[:SCATTER_POINTS].exp().tolist() for x in pair)
    atomic_write(
        context.folder / PROBABILITIES,
        json.dumps({"training": training, "inference": inference}).encode(),
    )
