"""Scores and updates one batch of completions under many layouts; for test_rl_layouts.py.

Imports once, then forks the processes of each layout in turn, over gloo. All start from one
checkpoint; the learning rate is 0, so that every loss sees the same weights.
"""

import gc
import json
import multiprocessing
import os
import sys
from pathlib import Path

from m1.model import cpu

cpu.without_compilation()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from m1.config.schema import (  # noqa: E402
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RlConfig,
)
from m1.model.parallel import initialize  # noqa: E402
from m1.train.batches import TrainSample  # noqa: E402
from m1.train.monitors import routing_metrics  # noqa: E402
from m1.train.trainer import Trainer  # noqa: E402
from m1.train.updates import Scored, score_samples, update  # noqa: E402

VOCAB = 64
LENGTHS = (9, 22, 13, 5, 17, 8)


def make_samples(model: ModelConfig, *, replays: bool) -> list[TrainSample]:
    """Six completions of three prompts, of lengths that only padding divides among ranks."""
    assert model.moe is not None
    experts = torch.Generator().manual_seed(7)
    generator = torch.Generator().manual_seed(5)
    made = []
    for number, length in enumerate(LENGTHS):
        ids = torch.randint(VOCAB, (length + 1,), generator=generator)
        mask = torch.arange(length) >= 2
        noise = torch.rand(length, model.num_layers, model.moe.num_experts, generator=experts)
        routed = noise.argsort(-1)[..., : model.moe.top_k].to(torch.int16)
        made.append(
            TrainSample(
                tokens=ids[:-1],
                targets=ids[1:],
                loss_mask=mask,
                behaviour_logprobs=-3 * torch.rand(length, generator=generator) * mask,
                advantage=(1.0, -1.0, 0.5, -0.5, -1.3, 1.3)[number],
                prompt=number // 2,
                routed_experts=routed if replays else None,
            )
        )
    return made


def learn(
    trainer: Trainer, loss: dict, max_tokens: int, samples: list[TrainSample]
) -> dict[str, float]:
    """Metrics of one update by a loss, the policy having moved since the batch was scored."""
    config = RlConfig(
        num_steps=1,
        prompts_per_step=3,
        group_size=2,
        updates_per_step=1,
        micro_batch_tokens=max_tokens,
        loss=LossConfig.model_validate(loss),
        optimizer=OptimizerConfig(lr=1e-30),
    )
    scores = score_samples(trainer, samples, config)
    routing = routing_metrics(trainer)
    generator = torch.Generator().manual_seed(6)
    moved = [x + 0.3 * torch.randn(x.shape, generator=generator) for x in scores]
    metrics = update(trainer, samples, Scored(moved, scores), config, step=0)
    total = sum(float(x[s.loss_mask].sum()) for x, s in zip(scores, samples, strict=True))
    return {**metrics, **routing, "scored": total}


def work(rank: int, name: str, job: dict) -> None:
    root, parallel = Path(job["root"]), ParallelConfig.model_validate(job["layouts"][name])
    store = f"file://{root}/store-{name}"
    dist.init_process_group("gloo", store, rank=rank, world_size=parallel.world_size)
    initialize(parallel)
    model = ModelConfig.model_validate(job["model"])
    trainer = Trainer(model, OptimizerConfig(lr=1e-30), vocab_size=VOCAB, seed=1, parallel=parallel)
    if name == "one":
        trainer.save(root / "start", {"step": 0})
    trainer.load(root / "start")
    found = {
        loss: {
            str(size): learn(
                trainer, config, size, make_samples(model, replays=loss in job["replayed"])
            )
            for size in job["sizes"]
        }
        for loss, config in job["losses"].items()
    }
    if rank == 0:
        (root / f"{name}.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # gloo's threads may outlive an orderly end


def main(job: dict) -> None:
    """Run every layout, one after the other; the first failure ends it all."""
    torch.set_num_threads(1)
    gc.freeze()
    context = multiprocessing.get_context("fork")
    for name in job["layouts"]:
        world = ParallelConfig.model_validate(job["layouts"][name]).world_size
        ranks = [context.Process(target=work, args=(rank, name, job)) for rank in range(world)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(300)
        if any(rank.exitcode != 0 for rank in ranks):
            for rank in ranks:
                rank.kill()
            sys.exit(f"layout {name} failed")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
