"""Trains one model under many parallel layouts; started by tests/parity/test_layouts.py.

Imports once, then forks the processes of each layout in turn, over gloo: first every layout makes
three updates from a common checkpoint and saves; then every layout loads what each other one saved,
and saves it again.
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

from m1.config.schema import ModelConfig, OptimizerConfig, ParallelConfig  # noqa: E402
from m1.model.parallel import initialize  # noqa: E402
from m1.train.microbatch import MicroBatch  # noqa: E402
from m1.train.trainer import Trainer, cross_entropy  # noqa: E402

VOCAB, STEPS = 64, 3


def micro_batch(seed: int) -> MicroBatch:
    """Three sequences whose lengths only padding divides among ranks; one of two in its batch."""
    lengths = torch.tensor([9, 22, 13])
    tokens = torch.randint(VOCAB, (45,), generator=torch.Generator().manual_seed(seed))
    return MicroBatch(tokens[:-1], tokens[1:], lengths, torch.full((44,), 1 / 88))


def train(trainer: Trainer) -> list[dict[str, float]]:
    """Loss, gradient norm, and the loss by scoring before it, of each update."""
    found = []
    for step in range(STEPS):
        batches = [micro_batch(10 * step + i) for i in range(2)]
        scored = trainer.logprobs(batches)
        result = trainer.update(trainer.share(batches), cross_entropy, lr=1e-2)
        score = -float(sum((b.weights * x).sum() for b, x in zip(batches, scored, strict=True)))
        found.append({"loss": result.sums["loss"], "norm": result.grad_norm, "scored": score})
    return found


def work(rank: int, name: str, job: dict, is_reloading: bool) -> None:
    root, parallel = Path(job["root"]), ParallelConfig.model_validate(job["layouts"][name])
    store = f"file://{root}/store-{name}-{int(is_reloading)}"
    dist.init_process_group("gloo", store, rank=rank, world_size=parallel.world_size)
    initialize(parallel)
    model, optimizer = ModelConfig.model_validate(job["model"]), OptimizerConfig(lr=1e-2)
    trainer = Trainer(model, optimizer, vocab_size=VOCAB, seed=1, parallel=parallel)
    if is_reloading:
        for other in set(job["reload"]) - {name}:
            assert trainer.load(root / other) == {"step": STEPS}
            trainer.save(root / f"{other}-as-{name}", {"step": STEPS})
    else:
        if name == "one":
            trainer.save(root / "start", {"step": 0})
        trainer.load(root / "start")
        found = train(trainer)
        trainer.save(root / name, {"step": STEPS})
        if rank == 0:
            (root / f"{name}.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # gloo's threads may outlive an orderly end


def main(job: dict) -> None:
    """Run every layout, one after the other; the first failure ends it all."""
    torch.set_num_threads(1)
    gc.freeze()  # megatron collects garbage with every checkpoint
    context = multiprocessing.get_context("fork")
    for is_reloading in (False, True):
        for name in job["reload"] if is_reloading else job["layouts"]:
            world = ParallelConfig.model_validate(job["layouts"][name]).world_size
            arguments = [(rank, name, job, is_reloading) for rank in range(world)]
            ranks = [context.Process(target=work, args=a) for a in arguments]
            for rank in ranks:
                rank.start()
            for rank in ranks:
                rank.join(300)
            if any(rank.exitcode != 0 for rank in ranks):
                for rank in ranks:
                    rank.kill()
                sys.exit(f"layout {name} failed; is_reloading: {is_reloading}")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
