"""20 updates in BF16 under one layout, from a common checkpoint; run by torchrun.

`layout_worker.py FOLDER NAME LAYOUT_JSON`: writes NAME.json and the checkpoint NAME; the layout
named `one` also writes the common checkpoint, and the others read the one it ended with.
`layout_worker.py FOLDER read NAMES_JSON`: loss of every named checkpoint on one GPU.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from gpu_workers import MODEL, VOCAB

from m1.config.schema import OptimizerConfig, ParallelConfig
from m1.model.parallel import initialize
from m1.train.microbatch import MicroBatch
from m1.train.trainer import Trainer, cross_entropy

STEPS = 20


def micro_batch(seed: int) -> MicroBatch:
    """Pieces of one text of 97 tokens that repeats itself, so that there is something to learn."""
    lengths = torch.tensor([700, 130, 1024])
    text = torch.randint(VOCAB, (97,), generator=torch.Generator().manual_seed(1)).repeat(21)
    tokens = text[seed % 97 : seed % 97 + 1855]
    return MicroBatch(tokens[:-1], tokens[1:], lengths, torch.full((1854,), 1 / (4 * 1854)))


def make_trainer(parallel: ParallelConfig) -> Trainer:
    initialize(parallel)
    return Trainer(MODEL, OptimizerConfig(lr=1e-3), vocab_size=VOCAB, seed=1, parallel=parallel)


def loss_of(trainer: Trainer, checkpoint: Path) -> float:
    assert trainer.load(checkpoint) == {"step": STEPS}
    batches = [micro_batch(7 + i) for i in range(4)]
    return trainer.evaluate(trainer.share(batches), cross_entropy)["loss"]


def read(folder: Path, names: list[str]) -> None:
    trainer = make_trainer(ParallelConfig())
    found = {name: loss_of(trainer, folder / name) for name in names}
    (folder / "read.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def main(folder: Path, name: str, layout: dict) -> None:
    trainer = make_trainer(ParallelConfig.model_validate(layout))
    if name == "one":
        trainer.save(folder / "start", {"step": 0})
    trainer.load(folder / "start")
    losses, norms = [], []
    for step in range(STEPS):
        batches = [micro_batch(100 * step + i) for i in range(4)]
        result = trainer.update(trainer.share(batches), cross_entropy, lr=1e-3)
        losses.append(result.sums["loss"])
        norms.append(result.grad_norm)
    trainer.save_in_background(folder / name, {"step": STEPS}, then=lambda: None)
    trainer.finish_saves(wait=True)
    found = {"losses": losses, "norms": norms, "own": loss_of(trainer, folder / name)}
    found["one"] = loss_of(trainer, folder / "one")
    if dist.get_rank() == 0:
        (folder / f"{name}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    where, name, given = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    if name == "read":
        read(where, given)
    else:
        main(where, name, given)
