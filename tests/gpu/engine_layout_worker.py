"""Completions of an engine under one layout; run by torchrun.

`engine_layout_worker.py FOLDER NAME LAYOUT_JSON` writes NAME.json; the layout named `one` writes
the weights that the others read. In FP32 greedy tokens and log-probabilities; in BF16 the
correlation of the engine's probabilities with the trainer's under the same layout.
"""

import json
import sys
from pathlib import Path

import gpu_workers
import torch
import torch.distributed as dist
from gpu_workers import VOCAB

from m1.config.schema import OptimizerConfig, ParallelConfig
from m1.inference.core import EngineCore
from m1.inference.limits import EngineLimits
from m1.inference.params import SamplingParams
from m1.model.parallel import initialize
from m1.train.microbatch import MicroBatch
from m1.train.trainer import Trainer

NEW = 60
MODEL = gpu_workers.MODEL.model_copy(update={"init_std": 0.05})


def sample(model: torch.nn.Module, *, temperature: float) -> list:
    limits = EngineLimits(num_slots=32, num_pages=800)
    core = EngineCore(model, num_tokens=VOCAB, limits=limits)
    generator = torch.Generator().manual_seed(1)
    found = []
    for number in range(12):
        prompt = torch.randint(VOCAB, (5 + 17 * number,), generator=generator)
        params = SamplingParams(max_new_tokens=NEW, temperature=temperature)
        found += core.add(tuple(prompt.tolist()), params, (number,))
    while not core.is_idle:
        core.step()
    return found


def correlation(trainer: Trainer, sequences: list) -> float:
    ours, theirs = [], []
    for sequence in sequences:
        ids = torch.tensor(sequence.prompt + tuple(sequence.tokens))
        size = len(ids) - 1
        batch = MicroBatch(ids[:-1], ids[1:], torch.tensor([size]), torch.zeros(size))
        ours.append(torch.tensor(sequence.logprobs))
        theirs.append(trainer.logprobs([batch])[0][len(sequence.prompt) - 1 :].cpu())
    pair = torch.stack([torch.cat(x).double().exp() for x in (ours, theirs)])
    return float(torch.corrcoef(pair)[0, 1])


def main(folder: Path, name: str, layout: dict) -> None:
    parallel = ParallelConfig.model_validate(layout)
    initialize(parallel)
    found = {}
    for precision in ("fp32", "bf16"):
        config = MODEL.model_copy(update={"precision": precision})
        trainer = Trainer(
            config, OptimizerConfig(lr=1e-3), vocab_size=VOCAB, seed=1, parallel=parallel
        )
        if name == "one" and precision == "fp32":
            trainer.save(folder / "start", {"step": 0})
        if precision == "fp32":
            trainer.load(folder / "start")
            torch.backends.cuda.matmul.allow_tf32 = False
            greedy = sample(trainer.model, temperature=0)
            found["fp32"] = {
                "tokens": [list(s.tokens) for s in greedy],
                "logprobs": [list(s.logprobs) for s in greedy],
            }
        else:
            found["bf16"] = {
                "correlation": correlation(trainer, sample(trainer.model, temperature=1))
            }
    if dist.get_rank() == 0:
        (folder / f"{name}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
