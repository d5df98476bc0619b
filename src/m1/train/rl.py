"""RL with CISPO (paper sec. 3): sample, score, advantage, batch, update, publish."""

import contextlib
import json
import time
from collections.abc import Iterator, Sequence

import torch

from m1.config.layout import padded_vocab
from m1.config.schema import Recipe, RlConfig
from m1.data.tokenizer import Tokenizer
from m1.model import checkpoint
from m1.model.parallel import initialize
from m1.rollout.filtering import SampledBatch, faults
from m1.rollout.swe import handed_over
from m1.stage import PROBABILITIES, StageContext, StageOutput
from m1.storage import atomic_write
from m1.train.batches import TrainSample
from m1.train.curriculum import Curriculum
from m1.train.lengths import (
    at_length,
    earlier_length,
    gate_of,
    parent_of,
    tasks_at_length,
)
from m1.train.monitors import (
    Alarms,
    Patience,
    mismatch_metrics,
    rollout_metrics,
    routing_metrics,
    sampled_logprobs,
)
from m1.train.recording import publish_pass_rates, record_rollouts, rewind_rollouts
from m1.train.reference import Reference
from m1.train.rollouts import open_rollouts
from m1.train.samples import train_samples
from m1.train.supervised import publish, resume, save
from m1.train.trainer import Trainer
from m1.train.updates import Scored, score_samples, update

SCATTER_POINTS = 2000


def rl(context: StageContext, recipe: Recipe) -> StageOutput:
    """Train the SFT model (or the pretrained one) by RL on the recipe's tasks.

    One step: take groups of completions, each of one prompt, that tell something; make several
    off-policy updates on them; hand the new weights to whoever samples. In synchronous mode a step
    is a function of weights, optimizer state, step and task source: an interrupted run ends with
    the same weights as an uninterrupted one. In asynchronous mode groups were sampled meanwhile, by
    weights at most `max_policy_lag` updates old.
    """
    recipe = at_length(context, recipe)
    config = recipe.rl
    assert config is not None
    initialize(config.parallel, seed=recipe.seed)
    tokenizer = Tokenizer(context.path_of("data") / "tokenizer")
    all_tasks = tasks_at_length(context, config)
    swe = None
    if config.episodes is not None:
        swe = handed_over(context, recipe, config.episodes, is_heldout=False)
        all_tasks += swe.tasks()
    tasks = Curriculum(all_tasks, config.curriculum, seed=recipe.seed)
    gate = gate_of(config)
    trainer = Trainer(
        recipe.model,
        config.optimizer,
        vocab_size=padded_vocab(recipe.model, tokenizer.vocab_size),
        seed=recipe.seed,
        parallel=config.parallel,
    )
    parent = checkpoint.inside(context.path_of(parent_of(context)))
    reference = _reference(trainer, config, parent)
    state = resume(context, trainer, start=lambda: parent)
    step, num_updates = int(state["step"]), int(state.get("updates", 0))
    alarms = Alarms(config.alarms, context.warn)
    patience = Patience(config.max_bad_steps, context.warn)
    if step:
        tasks.restore(state["tasks"])
        gate.restore(state["gate"])
        alarms.restore(state["alarms"])
        patience.num_bad = state["num_bad"]
    rewind_rollouts(context, step)
    watch = _Watch(context, config)
    rollouts = open_rollouts(
        context, recipe, trainer, tasks, all_tasks, parent, phase=watch.phase, state=state, swe=swe
    )
    with rollouts:
        while step < config.num_steps and not gate.is_done:
            watch.begin(step)
            sampled = rollouts.next(step=step)
            metrics = rollout_metrics(sampled) | tasks.metrics()
            _name_faults(context, sampled)
            tasks.observe(sampled.all)
            metrics |= gate.step(sampled.all)
            samples = train_samples(
                sampled.kept,
                scale=config.advantage.scale,
                replayed_experts=_replayed_experts(recipe, config),
            )
            if samples:
                scored = _score(trainer, samples, config, reference, watch)
                metrics |= mismatch_metrics(samples, scored.old_logprobs)
                metrics |= routing_metrics(trainer)
            is_skipped = alarms.check(metrics)
            if samples and not is_skipped:
                with watch("update"):
                    made = update(trainer, samples, scored, config, step=step)
                made["rl/policy_lag_max_updates"] += metrics.get("rl/policy_lag_of_batch", 0.0)
                alarms.check(made)
                metrics |= made
                num_updates += int(made["rl/updates"])
            step += 1
            if metrics.get("rl/updates"):
                patience.good()
                with watch("publish"):
                    rollouts.publish(int(metrics["rl/updates"]))
            else:
                patience.bad(_why_bad(sampled, metrics, is_skipped=is_skipped))
            metrics |= watch.metrics(sampled)
            metrics["rl/alarms"] = float(alarms.num_raised)
            context.log(metrics, step=step, total=config.num_steps)
            record_rollouts(
                context,
                config.traces,
                tokenizer,
                step=step,
                groups=sampled.all,
                kept=sampled.kept,
            )
            is_last = step == config.num_steps or gate.is_done
            if is_last and samples:
                _keep_scatter(context, samples, scored.old_logprobs)
            elif not is_last and step % config.checkpoint_every_steps == 0:
                watch.phase("save")
                save(
                    context,
                    trainer,
                    config,
                    step,
                    updates=num_updates,
                    tasks=tasks.state(),
                    gate=gate.state(),
                    alarms=alarms.state(),
                    num_bad=patience.num_bad,
                    rollouts=rollouts.state(),
                )
            trainer.finish_saves(wait=False)
    watch.phase("export")
    output = publish(context, trainer, num_updates, **gate.facts())
    publish_pass_rates(context, earlier=earlier_length(context))
    return output


def _replayed_experts(recipe: Recipe, config: RlConfig) -> int | None:
    """How many experts there are, where their choice is replayed."""
    if config.routing_replay == "off":
        return None
    assert recipe.model.moe is not None
    return recipe.model.moe.num_experts


def _reference(trainer: Trainer, config: RlConfig, parent: object) -> Reference | None:
    if not config.loss.kl_coefficient:
        return None
    trainer.load_weights(parent)  # type: ignore[arg-type]
    return Reference(trainer.model)


def _score(
    trainer: Trainer,
    samples: Sequence[TrainSample],
    config: RlConfig,
    reference: Reference | None,
    watch: "_Watch",
) -> Scored:
    """old_logprobs: the trainer's own, before the first update; and the reference's."""
    with watch("old_logprobs"):
        old = score_samples(trainer, samples, config)
        if reference is None:
            return Scored(old)
        with reference.in_place():
            # The reference is a policy of its own, with its own routing.
            return Scored(old, score_samples(trainer, samples, config, replays_routing=False))


class _Watch:
    """Names and times the phases of a step."""

    def __init__(self, context: StageContext, config: RlConfig) -> None:
        self._context, self._total = context, config.num_steps
        self.begin(0)

    def begin(self, step: int) -> None:
        self._step, self._started = step, time.perf_counter()
        self._seconds = {"old_logprobs": 0.0, "update": 0.0, "publish": 0.0}

    def phase(self, name: str) -> None:
        self._context.phase(name, self._step, self._total)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.phase(name)
        started = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - started

    def metrics(self, sampled: SampledBatch) -> dict[str, float]:
        num_tokens = sum(len(r.completion.tokens) for g in sampled.all for r in g.rollouts)
        seconds = time.perf_counter() - self._started
        found = {f"rl/{name}_seconds": value for name, value in self._seconds.items()}
        return {**found, "rl/step_seconds": seconds, "rl/tokens_per_second": num_tokens / seconds}


def _name_faults(context: StageContext, sampled: SampledBatch) -> None:
    found = faults(sampled.all)
    if found:
        causes = ", ".join(f"{name} {count}" for name, count in sorted(found.items()))
        context.warn(f"rollouts that failed and are left out: {causes}")


def _why_bad(sampled: SampledBatch, metrics: dict[str, float], *, is_skipped: bool) -> str:
    if not sampled.kept:
        return sampled.reason
    if is_skipped:
        return "an alarm left the updates out"
    skipped = int(metrics.get("rl/updates_skipped", 0))
    return (
        f"the gradient norm of {skipped} updates was not finite, or above rl.skip_grad_norm; lower "
        "the learning rate, or look for log-probabilities that are not finite"
    )


def _keep_scatter(
    context: StageContext, samples: Sequence[TrainSample], old_logprobs: Sequence[torch.Tensor]
) -> None:
    pair = sampled_logprobs(samples, old_logprobs)
    training, inference = (x[:SCATTER_POINTS].exp().tolist() for x in pair)
    atomic_write(
        context.folder / PROBABILITIES,
        json.dumps({"training": training, "inference": inference}).encode(),
    )
