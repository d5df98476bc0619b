"""Probabilities of sampled tokens in training and in inference mode (the paper's Fig. 3).

    python -m benchmarks.logprob_parity --json OUT [--plot OUT.png] [--steps 200]

A model is trained for a while on the Python standard library's source, so that its distributions
are those of a language model. The engine samples from it, the trainer scores the same tokens, once
with the FP32 head and once with the head in the trunk's arithmetic on both sides. On a GPU the
model has 0.5 B parameters in BF16 and passes through Transformer Engine in training; on a CPU it is
the laptop recipe's in FP32, where both heads are the same.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.machine import write
from benchmarks.precision import LENGTH, MODEL, ROWS, VOCAB, batches, text_tokens
from m1.config.loading import load_recipe
from m1.config.schema import ModelConfig, OptimizerConfig, ParallelConfig
from m1.inference.core import EngineCore
from m1.inference.loading import limits_for
from m1.inference.params import SamplingParams
from m1.inference.sequences import Sequence
from m1.model.parallel import initialize
from m1.train.microbatch import MicroBatch
from m1.train.trainer import Trainer, cross_entropy

LAPTOP = Path(__file__).parents[1] / "pipelines" / "recipes" / "laptop.toml"


def chosen_model() -> ModelConfig:
    if torch.cuda.is_available():
        return MODEL
    laptop = load_recipe([LAPTOP]).model
    return laptop.model_copy(update={"max_position": LENGTH})


def sample(
    trainer: Trainer, prompts: list[tuple[int, ...]], new_tokens: int, *, float_head: bool
) -> list[Sequence]:
    limits = limits_for(
        trainer.model,
        max_sequences=len(prompts),
        max_position=len(prompts[0]) + new_tokens,
        page_size=16,
    )
    core = EngineCore(trainer.model, num_tokens=VOCAB, limits=limits)
    core.runner.float_head = float_head
    params = SamplingParams(max_new_tokens=new_tokens)
    found = [core.add(prompt, params, (i,))[0] for i, prompt in enumerate(prompts)]
    while not core.is_idle:
        core.step()
    return found


def score(trainer: Trainer, sequences: list[Sequence], *, float_head: bool) -> torch.Tensor:
    """float64, the trainer's log-probabilities of the sampled tokens."""
    head: Any = trainer.model.output_layer
    if not float_head:

        def plain(x: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
            return F.linear(x, head.weight.to(x.dtype)).float(), None

        head.forward = plain
    found = []
    for sequence in sequences:
        ids = torch.tensor(sequence.prompt + tuple(sequence.tokens))
        size = len(ids) - 1
        batch = MicroBatch(ids[:-1], ids[1:], torch.tensor([size]), torch.zeros(size))
        found.append(trainer.logprobs([batch])[0][len(sequence.prompt) - 1 :].cpu())
    if not float_head:
        del head.forward
    return torch.cat(found).double()


def compare(training: torch.Tensor, inference: torch.Tensor) -> dict[str, float]:
    gap = training - inference
    pair = torch.stack((training, inference)).exp()
    return {
        "tokens": len(training),
        "correlation": float(torch.corrcoef(pair)[0, 1]),
        "max_probability_difference": float(pair.diff(dim=0).abs().max()),
        "max_logprob_difference": float(gap.abs().max()),
        "mean_logprob_difference": float(gap.abs().mean()),
        "mismatch_kl_nats": float((gap.exp() - 1 - gap).mean()),
    }


def plot(path: Path, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(pairs), figsize=(5 * len(pairs), 5), squeeze=False)
    for axis, (name, (training, inference)) in zip(axes[0], pairs.items(), strict=True):
        axis.scatter(inference.exp(), training.exp(), s=2, alpha=0.3)
        correlation = compare(training, inference)["correlation"]
        axis.set(
            title=f"{name}: r = {correlation:.6f}",
            xlabel="probability in inference",
            ylabel="probability in training",
        )
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=512)
    options = parser.parse_args()
    initialize()
    trainer = Trainer(
        chosen_model(),
        OptimizerConfig(lr=3e-4),
        vocab_size=VOCAB,
        seed=1,
        parallel=ParallelConfig(),
    )
    tokens = text_tokens((options.steps + 4) * ROWS * LENGTH)
    for step in range(options.steps):
        result = trainer.update(batches(tokens, step), cross_entropy, lr=3e-4)
    print(f"trained {options.steps} steps: loss {result.sums['loss']:.3f}", flush=True)
    held = tokens[options.steps * ROWS * LENGTH :]
    size = options.prompt_tokens
    prompts = [tuple(held[i * size : (i + 1) * size].tolist()) for i in range(options.prompts)]
    pairs, results = {}, {"loss": result.sums["loss"]}
    for name, float_head in (("FP32 head", True), ("head as trunk", False)):
        sequences = sample(trainer, prompts, options.new_tokens, float_head=float_head)
        inference = torch.tensor([x for s in sequences for x in s.logprobs]).double()
        training = score(trainer, sequences, float_head=float_head)
        pairs[name] = (training, inference)
        results[name] = compare(training, inference)
        print(name, results[name], flush=True)
    if options.plot:
        plot(options.plot, pairs)
    write(options.json, {"results": results})


if __name__ == "__main__":
    main()
