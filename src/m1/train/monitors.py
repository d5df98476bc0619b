"""What is watched in RL (paper sec. 3.2 and 5), and what happens when it leaves its bounds."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from m1.config.schema import AlarmConfig
from m1.model.routing import take_difference
from m1.rollout.filtering import SampledBatch
from m1.train.batches import TrainSample
from m1.train.trainer import Trainer
from m1.types import Completion, M1Error, Rollout


def rollout_metrics(sampled: SampledBatch) -> dict[str, float]:
    """Means over every sampled rollout, before dynamic sampling chose; reward parts kept apart."""
    rollouts = [r for g in sampled.all for r in g.rollouts if not r.reward.is_failed]
    num_all = sum(len(g.rollouts) for g in sampled.all)
    metrics = {
        "rl/failed_rollouts": float(num_all - len(rollouts)),
        "rl/failed_fraction": 1.0 - len(rollouts) / max(num_all, 1),
        "rl/groups_sampled": float(len(sampled.all)),
        "rl/groups_kept": float(len(sampled.kept)),
        **sampled.metrics,
    }
    if not rollouts:
        return metrics
    lengths = [len(r.completion.tokens) for r in rollouts]
    entropies = np.concatenate([_sampled_entropies(r.completion) for r in rollouts])
    reasons = [r.completion.finish_reason for r in rollouts]
    metrics |= {
        "rl/reward": float(np.mean([r.reward.total for r in rollouts])),
        "rl/accuracy": float(np.mean([r.reward.accuracy for r in rollouts])),
        "rl/format": float(np.mean([r.reward.parts.get("format", 0.0) for r in rollouts])),
        "rl/completion_length_tokens": float(np.mean(lengths)),
        "rl/completion_length_p99_tokens": float(np.percentile(lengths, 99)),
        "rl/truncated_fraction": reasons.count("length") / len(reasons),
        "rl/repetition_fraction": reasons.count("repetition") / len(reasons),
    }
    if np.isfinite(entropies).all():  # some engines tell none
        metrics["rl/entropy_nats"] = float(entropies.mean())
    penalties = [r.reward.parts["overlong"] for r in rollouts if "overlong" in r.reward.parts]
    if penalties:
        metrics["rl/overlong"] = float(np.mean(penalties))
    return metrics | _episode_metrics(rollouts)


def _sampled_entropies(completion: Completion) -> np.ndarray:
    """Of the tokens that the policy sampled."""
    entropies = np.asarray(completion.entropies, dtype=np.float64)
    return (
        entropies if completion.loss_mask is None else entropies[np.asarray(completion.loss_mask)]
    )


def _episode_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Means over episodes of software engineering; nothing where there are none."""
    parts = [r.reward.parts for r in rollouts if "exploits" in r.reward.parts]
    if not parts:
        return {}
    names = ("resolved", "f2p_rate", "p2p_rate", "turns")
    return {
        "rl/episodes": float(len(parts)),
        "rl/episodes_with_exploits_fraction": float(np.mean([p["exploits"] > 0 for p in parts])),
        **{f"rl/episode_{name}": float(np.mean([p[name] for p in parts])) for name in names},
    }


def mismatch_metrics(
    samples: Sequence[TrainSample], old_logprobs: Sequence[torch.Tensor]
) -> dict[str, float]:
    """Agreement of training- and inference-mode probabilities of sampled tokens (Fig. 3).

    In asynchronous mode the gap also holds what the weights have changed since the tokens were
    sampled. `mismatch_ratio_max` is the largest of pi_train / pi_engine and its inverse;
    `perplexity` that of the sampled text under the trainer.
    """
    training, inference = sampled_logprobs(samples, old_logprobs)
    gap = training - inference
    probabilities = torch.stack([training, inference]).exp()
    metrics = {
        "rl/probability_max_difference": float(probabilities.diff(dim=0).abs().max()),
        "rl/mismatch_kl_nats": float((gap.exp() - 1 - gap).mean()),
        "rl/mismatch_ratio_max": float(gap.abs().max().exp()),
        "rl/perplexity": float((-training.mean()).exp()),
    }
    if bool((probabilities.std(dim=1) > 0).all()):  # else the correlation is not defined
        metrics["rl/probability_correlation"] = float(torch.corrcoef(probabilities)[0, 1])
    return metrics


def routing_metrics(trainer: Trainer) -> dict[str, float]:
    """Of what was scored by the engine's experts; nothing where none were replayed.

    `routing_difference_fraction` is the share of tokens, prompts among them, and layers for which
    the trainer by itself would have chosen other experts.
    """
    found = take_difference(trainer.model)
    return {} if found is None else {"rl/routing_difference_fraction": found}


def sampled_logprobs(
    samples: Sequence[TrainSample], old_logprobs: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """float64, of the sampled tokens: by the trainer, and by the engine."""
    pairs = zip(samples, old_logprobs, strict=True)
    training = torch.cat([old[s.loss_mask] for s, old in pairs]).double()
    inference = torch.cat([s.behaviour_logprobs[s.loss_mask] for s in samples]).double()
    return training, inference


@dataclass(frozen=True)
class Alarm:
    """A monitor out of its bounds for as long as its patience."""

    action: str
    message: str


class Alarms:
    """The recipe's alarms over the steps of a run; the state is how long each has been out."""

    def __init__(self, configs: Sequence[AlarmConfig], warn: Callable[[str], None]) -> None:
        """Watch.

        Args:
            configs: The alarms.
            warn: Told of every alarm that goes off.
        """
        self._configs, self._warn = configs, warn
        self._streaks = [0] * len(configs)
        self.num_raised = 0
        """In this process."""

    def check(self, metrics: Mapping[str, float]) -> bool:
        """Look at the metrics that are there, each once a step.

        A value that is not finite is out of any bounds.

        Returns:
            Whether the step's updates are to be left out.

        Raises:
            M1Error: An alarm says stop.
        """
        raised = [
            alarm
            for number in range(len(self._configs))
            if (alarm := self._look(number, metrics)) is not None
        ]
        for alarm in raised:
            self.num_raised += 1
            self._warn(alarm.message)
        stops = [alarm.message for alarm in raised if alarm.action == "stop"]
        if stops:
            raise M1Error(f"{'; '.join(stops)}. The last checkpoint is intact")
        return any(alarm.action == "skip" for alarm in raised)

    def state(self) -> list[int]:
        """For the checkpoint."""
        return list(self._streaks)

    def restore(self, state: Sequence[int]) -> None:
        """Continue from a checkpoint's state."""
        if len(state) == len(self._streaks):
            self._streaks = list(state)

    def _look(self, number: int, metrics: Mapping[str, float]) -> Alarm | None:
        config = self._configs[number]
        value = metrics.get(f"rl/{config.monitor}")
        if value is None:
            return None
        bounds = []
        if config.above is not None and not value <= config.above:
            bounds.append(f"above {config.above:g}")
        if config.below is not None and not value >= config.below:
            bounds.append(f"below {config.below:g}")
        self._streaks[number] = self._streaks[number] + 1 if bounds else 0
        if not bounds or self._streaks[number] < config.patience:
            return None
        shown = f"{value:.4g}" if math.isfinite(value) else str(value)
        since = f" for {self._streaks[number]} steps" if self._streaks[number] > 1 else ""
        return Alarm(
            config.action,
            f"rl/{config.monitor} is {shown}, {bounds[0]}{since} (action: {config.action})",
        )


class Patience:
    """Steps in a row without an update, and an end to them."""

    def __init__(self, limit: int, warn: Callable[[str], None]) -> None:
        self._limit, self._warn, self.num_bad = limit, warn, 0

    def good(self) -> None:
        """A step made updates."""
        self.num_bad = 0

    def bad(self, reason: str) -> None:
        """A step made none.

        Raises:
            M1Error: The last of as many as the recipe allows.
        """
        self.num_bad += 1
        if self.num_bad >= self._limit:
            raise M1Error(
                f"{self.num_bad} steps in a row made no update (rl.max_bad_steps); the last one: "
                f"{reason}. The last checkpoint is intact"
            )
        self._warn(f"no update in this step: {reason}")
