"""Off-policy updates on one batch of completions (paper sec. 3.1): score, then several updates."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from m1.config.schema import LossConfig, RlConfig
from m1.train.batches import TrainSample, pack_samples, plan_micro_batches
from m1.train.losses import Sequences, policy_loss, settings_of, token_weights
from m1.train.microbatch import MicroBatch
from m1.train.schedule import learning_rate
from m1.train.trainer import LossFunction, Trainer, UpdateResult


@dataclass(frozen=True)
class Scored:
    """What the trainer says of a batch before its first update, float32 [T] for each sample."""

    old_logprobs: list[torch.Tensor]
    reference_logprobs: list[torch.Tensor] | None = None
    """Under the reference weights, where the loss has a KL term."""


def score_samples(
    trainer: Trainer,
    samples: Sequence[TrainSample],
    config: RlConfig,
    *,
    replays_routing: bool = True,
) -> list[torch.Tensor]:
    """Log-probabilities under the trainer's weights, float32 [T] a sample; replicas share the work.

    Before the first update of a batch these are old_logprobs: the engine computes in other orders
    and precisions, and in asynchronous mode sampled with older weights. Experts that the samples
    name are used, unless `replays_routing` is False.
    """
    if not replays_routing:
        samples = [replace(sample, routed_experts=None) for sample in samples]
    sizes = [s.tokens.numel() for s in samples]
    plan = plan_micro_batches(
        sizes, max_tokens=config.micro_batch_tokens, num_replicas=trainer.parallel.data
    )
    no_weights = [torch.zeros(size) for size in sizes]
    shared = trainer.share(pack_samples(samples, no_weights, plan=plan))
    of_replicas = _gather_over_replicas(trainer.logprobs(shared))
    found: dict[int, torch.Tensor] = {}
    for number, group in enumerate(plan):
        replica, place = number % len(of_replicas), number // len(of_replicas)
        parts = torch.split(of_replicas[replica][place], [sizes[i] for i in group])
        found.update(zip(group, parts, strict=True))
    return [found[i] for i in range(len(samples))]


def _gather_over_replicas(values: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    group = parallel_state.get_data_parallel_group()
    if group.size() == 1:
        return [values]
    gathered: list[Any] = [None] * group.size()
    dist.all_gather_object(gathered, values, group=group)
    return gathered


def loss_function(config: LossConfig) -> LossFunction:
    """The recipe's objective on micro-batches of `pack_samples`."""

    def loss(
        logprobs: torch.Tensor, batch: MicroBatch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        extras = batch.extras
        result = policy_loss(
            config,
            logprobs=logprobs,
            old_logprobs=extras["old_logprobs"],
            advantages=extras["advantages"],
            loss_mask=extras["loss_mask"],
            weights=batch.weights,
            behaviour_logprobs=extras["behaviour_logprobs"],
            reference_logprobs=extras.get("reference_logprobs"),
            sequences=Sequences(extras["sequence"], batch.lengths.numel(), _sum_over_context),
        )
        return result.loss, {"loss": result.loss.detach(), **result.sums}

    return loss


def _sum_over_context(values: torch.Tensor) -> torch.Tensor:
    """A sequence lies cut up over the context ranks."""
    group = parallel_state.get_context_parallel_group()
    if group.size() > 1:
        dist.all_reduce(values, group=group)
    return values


def update(
    trainer: Trainer,
    samples: Sequence[TrainSample],
    scored: Scored,
    config: RlConfig,
    *,
    step: int,
) -> dict[str, float]:
    """Make `updates_per_step` updates, each on its share of the prompts.

    An update whose gradient is not finite, or larger than `skip_grad_norm`, is left out.

    Returns:
        Metrics of the updates that were made: token means, and means over updates.
    """
    num_prompts = max(s.prompt for s in samples) + 1
    num_updates = min(config.updates_per_step, num_prompts)
    results = []
    for number, prompts in enumerate(np.array_split(np.arange(num_prompts), num_updates)):
        chosen = [i for i, s in enumerate(samples) if prompts[0] <= s.prompt <= prompts[-1]]
        lr = learning_rate(
            config.schedule,
            peak=config.optimizer.lr,
            step=step * config.updates_per_step + number,
            num_steps=config.num_steps * config.updates_per_step,
        )
        results.append(_update_once(trainer, samples, scored, config, chosen, lr=lr))
    return {"rl/learning_rate": lr, **_update_metrics(results)}


def _update_once(
    trainer: Trainer,
    samples: Sequence[TrainSample],
    scored: Scored,
    config: RlConfig,
    chosen: Sequence[int],
    *,
    lr: float,
) -> UpdateResult:
    mini_batch = [samples[i] for i in chosen]
    weights = token_weights(
        settings_of(config.loss).aggregation,
        [s.loss_mask for s in mini_batch],
        [s.prompt for s in mini_batch],
        sample_share=config.loss.sample_share,
    )
    plan = plan_micro_batches(
        [s.tokens.numel() for s in mini_batch],
        max_tokens=config.micro_batch_tokens,
        num_replicas=trainer.parallel.data,
    )
    extras = {"old_logprobs": [scored.old_logprobs[i] for i in chosen]}
    if scored.reference_logprobs is not None:
        extras["reference_logprobs"] = [scored.reference_logprobs[i] for i in chosen]
    batches = pack_samples(mini_batch, weights, plan=plan, extras=extras)
    return trainer.update(
        trainer.share(batches),
        loss_function(config.loss),
        lr=lr,
        skip_above=config.skip_grad_norm or float("inf"),
    )


def _update_metrics(results: Sequence[UpdateResult]) -> dict[str, float]:
    made = [result for result in results if result.is_made]
    metrics = {
        "rl/updates": float(len(made)),
        "rl/updates_skipped": float(len(results) - len(made)),
        "rl/policy_lag_max_updates": float(max(len(made) - 1, 0)),
        "rl/policy_lag_mean_updates": max(len(made) - 1, 0) / 2,
    }
    if not made:
        return metrics
    totals: dict[str, float] = {}
    for result in made:
        for name, value in result.sums.items():
            totals[name] = totals.get(name, 0.0) + value
    tokens = max(totals["tokens"], 1.0)
    metrics |= {
        "rl/loss": totals["loss"] / len(made),
        "rl/surrogate": totals["surrogate"] / len(made),
        "rl/grad_norm": sum(result.grad_norm for result in made) / len(made),
        "rl/grad_norm_max": max(result.grad_norm for result in made),
        "rl/importance_ratio": totals["importance_ratio"] / tokens,
        "rl/clip_fraction": totals["clipped"] / tokens,
        "rl/kl_nats": totals["kl"] / tokens,
        "rl/gradient_share_rare": totals["gradient_rare"] / max(totals["gradient"], 1e-30),
    }
    optional = {
        "behaviour_ratio": "rl/behaviour_ratio",
        "truncated": "rl/behaviour_truncated_fraction",
        "reference_kl": "rl/reference_kl_nats",
    }
    return metrics | {to: totals[name] / tokens for name, to in optional.items() if name in totals}
