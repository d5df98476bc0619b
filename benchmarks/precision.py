"""BF16 and three FP8 recipes train the same M1-shaped model on the same text, side by side.

    python -m benchmarks.precision --json OUT [--steps 100] [--recipes bf16 delayed ...]

The text is the Python standard library's source; the model has about 0.5 B parameters. The same
initial weights (read from one checkpoint) and the same batches for every recipe.
"""

import argparse
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks.machine import write
from m1.config.schema import ModelConfig, MoeConfig, OptimizerConfig, ParallelConfig
from m1.model.parallel import initialize
from m1.train.microbatch import MicroBatch
from m1.train.trainer import Trainer, cross_entropy

VOCAB, LENGTH, ROWS = 16_384, 2048, 8
RECIPES = ("bf16", "delayed", "tensorwise", "blockwise")
MODEL = ModelConfig(
    num_layers=8,
    hidden_size=1024,
    num_heads=8,
    num_kv_heads=2,
    head_dim=128,
    rotary_dim=64,
    moe=MoeConfig(num_experts=16, top_k=2, ffn_hidden_size=1024, aux_loss_coefficient=0.01),
    max_position=LENGTH,
    precision="bf16",
)


def text_tokens(budget: int) -> np.ndarray:
    """Token ids of standard library sources, by a byte-level BPE trained on them."""
    folder = Path(sysconfig.get_path("stdlib"))
    paths = sorted(p for p in folder.rglob("*.py") if "site-packages" not in p.parts)
    texts = [p.read_text(errors="ignore") for p in paths]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    np.random.default_rng(1).shuffle(texts)
    ids = [i for e in tokenizer.encode_batch(texts) for i in e.ids]
    return np.resize(np.array(ids, dtype=np.int64), budget)


def batches(tokens: np.ndarray, step: int) -> list[MicroBatch]:
    size = ROWS * LENGTH
    window = torch.from_numpy(tokens[step * size : (step + 1) * size + 1])
    weights = torch.full((size,), 1 / size)
    return [MicroBatch(window[:-1], window[1:], torch.tensor([LENGTH] * ROWS), weights)]


def train(recipe: str, tokens: np.ndarray, steps: int, start: Path) -> dict[str, Any]:
    change = {} if recipe == "bf16" else {"precision": "fp8", "fp8_recipe": recipe}
    model = MODEL.model_copy(update=change)
    optimizer = OptimizerConfig(lr=1e-3)
    trainer = Trainer(model, optimizer, vocab_size=VOCAB, seed=1, parallel=ParallelConfig())
    if start.exists():
        trainer.load_weights(start)
    else:
        trainer.save_weights(start)
    losses, times = [], []
    for step in range(steps):
        begin = time.perf_counter()
        lr = 1e-3 * min(1.0, (step + 1) / 10)
        losses.append(trainer.update(batches(tokens, step), cross_entropy, lr=lr).sums["loss"])
        times.append(time.perf_counter() - begin)
    count = sum(p.numel() for p in trainer.model.parameters())
    return {
        "losses": losses,
        "final": float(np.mean(losses[-5:])),
        "tokens_per_second": ROWS * LENGTH / float(np.median(times[steps // 2 :])),
        "parameters": count,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--recipes", nargs="*", default=RECIPES, choices=RECIPES)
    options = parser.parse_args()
    initialize()
    tokens = text_tokens(options.steps * ROWS * LENGTH + 1)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for recipe in options.recipes:
            results[recipe] = train(recipe, tokens, options.steps, Path(folder) / "start")
            torch.cuda.empty_cache()
            found = results[recipe]
            ratio = found["final"] / results[options.recipes[0]]["final"] - 1
            print(
                f"{recipe:10s} {found['parameters'] / 1e6:.0f}M parameters, loss "
                f"{found['losses'][0]:.3f} -> {found['final']:.4f} ({ratio:+.2%}), "
                f"{found['tokens_per_second']:,.0f} tokens/s",
                flush=True,
            )
    write(options.json, {"recipes": results})


if __name__ == "__main__":
    main()
