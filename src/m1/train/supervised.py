"""Pretraining and SFT: next-token prediction on packed rows, from the last checkpoint."""

import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from filelock import FileLock

from m1.config.layout import padded_vocab
from m1.config.schema import ModelConfig, Recipe, RlConfig, TrainConfig
from m1.data.packing import PackedRows
from m1.data.tokenizer import Tokenizer
from m1.model import checkpoint
from m1.model.parallel import initialize
from m1.model.saving import MARKER
from m1.stage import StageContext, StageOutput
from m1.storage import open_storage
from m1.train.batches import row_batches, rows_of_step
from m1.train.schedule import learning_rate
from m1.train.trainer import Trainer, cross_entropy
from m1.types import M1Error

MAX_HELDOUT_ROWS = 64
Start = Callable[[], Path]
"""Finds the checkpoint to start from; asked only if there is none of the stage's own."""


def pretrain(context: StageContext, recipe: Recipe) -> StageOutput:
    """Continual pretraining (paper sec. 2.1) on packed text."""
    config = recipe.pretrain
    trainer = make_trainer(context, recipe.model, config, seed=recipe.seed)
    start = None if config.start is None else partial(_given, context, config.start)
    return train_on_rows(
        context, trainer, config, dataset="pretrain", seed=recipe.seed, start=start
    )


def sft(context: StageContext, recipe: Recipe) -> StageOutput:
    """Supervised fine-tuning (paper sec. 2.2) on worked solutions in the chat format."""
    assert recipe.sft is not None
    trainer = make_trainer(context, recipe.model, recipe.sft, seed=recipe.seed)
    return train_on_rows(
        context,
        trainer,
        recipe.sft,
        dataset="sft",
        seed=recipe.seed,
        start=lambda: checkpoint.inside(context.path_of("pretrain")),
    )


def _given(context: StageContext, start: str) -> Path:
    """The checkpoint that a recipe names, downloaded from S3 if it lies there."""
    if not start.startswith("s3://"):
        return checkpoint.inside(Path(start))
    folder = context.folder / "start"
    with FileLock(context.folder / ".start.lock"):  # ranks ask at once
        if not folder.exists():
            try:
                open_storage(start.rstrip("/")).download_folder("", folder)
            except FileNotFoundError as error:
                raise M1Error(
                    f"pretrain.start is {start}, but {error}; name the folder of a checkpoint"
                ) from None
    try:
        return checkpoint.inside(folder)
    except M1Error as error:
        shutil.rmtree(folder, ignore_errors=True)  # fetched anew when it was mended
        raise M1Error(f"pretrain.start is {start}, but {error}") from None


def make_trainer(
    context: StageContext, model: ModelConfig, config: TrainConfig, *, seed: int
) -> Trainer:
    """A trainer with initial weights for the tokenizer's vocabulary."""
    initialize(config.parallel, seed=seed)
    tokenizer = Tokenizer(context.path_of("data") / "tokenizer")
    return Trainer(
        model,
        config.optimizer,
        vocab_size=padded_vocab(model, tokenizer.vocab_size),
        seed=seed,
        parallel=config.parallel,
    )


def train_on_rows(
    context: StageContext,
    trainer: Trainer,
    config: TrainConfig,
    *,
    dataset: str,
    seed: int,
    start: Start | None,
) -> StageOutput:
    """Make `config.num_steps` updates on the rows of a dataset, checkpointing on the way.

    It starts from the weights in `start`, or from those the trainer has.

    Every update is a function of the weights, the optimizer state and the step, so an interrupted
    run ends with the same weights as an uninterrupted one.
    """
    folder = context.path_of("data") / dataset
    rows, heldout = PackedRows(folder / "train"), PackedRows(folder / "heldout")
    if len(rows) == 0:
        raise M1Error(f"{folder} has no packed rows to train on; widen data.sources or data.tasks")
    name = context.name
    step = int(resume(context, trainer, start=start)["step"])
    while step < config.num_steps:
        started = time.perf_counter()
        indices = rows_of_step(len(rows), step=step, batch_rows=config.global_batch_rows, seed=seed)
        batches = row_batches(rows, indices, rows_per_micro_batch=config.micro_batch_rows)
        lr = learning_rate(
            config.schedule, peak=config.optimizer.lr, step=step, num_steps=config.num_steps
        )
        result = trainer.update(trainer.share(batches), cross_entropy, lr=lr)
        step += 1
        num_tokens = sum(b.tokens.numel() for b in batches)
        metrics = {
            f"{name}/loss": result.sums["loss"],
            f"{name}/grad_norm": result.grad_norm,
            f"{name}/learning_rate": lr,
            f"{name}/tokens_per_second": num_tokens / (time.perf_counter() - started),
        }
        if step % config.eval_every_steps == 0 or step == config.num_steps:
            metrics[f"{name}/heldout_loss"] = heldout_loss(trainer, heldout, config)
        context.log(metrics, step=step, total=config.num_steps)
        if step % config.checkpoint_every_steps == 0 and step < config.num_steps:
            save(context, trainer, config, step)
        trainer.finish_saves(wait=False)
    return publish(context, trainer, step)


def heldout_loss(trainer: Trainer, rows: PackedRows, config: TrainConfig) -> float:
    """Mean loss in nats per token on at most `MAX_HELDOUT_ROWS` held-out rows."""
    count = min(len(rows), MAX_HELDOUT_ROWS)
    if count == 0:
        return float("nan")
    batches = row_batches(rows, range(count), rows_per_micro_batch=config.micro_batch_rows)
    return trainer.evaluate(trainer.share(batches), cross_entropy)["loss"]


def resume(context: StageContext, trainer: Trainer, *, start: Start | None) -> dict[str, Any]:
    """Load the newest checkpoint of this stage, else the weights in `start`.

    Returns:
        What was saved with the checkpoint: the step to go on from, and what `save` was given.
    """
    context.restore(marker=MARKER)
    found = checkpoint.latest(context.checkpoints)
    if found is None and start is not None:
        trainer.load_weights(start())
    state = trainer.load(found) if found is not None else {"step": 0}
    context.rewind(int(state["step"]))
    return state


def save(
    context: StageContext,
    trainer: Trainer,
    config: TrainConfig | RlConfig,
    step: int,
    **state: object,
) -> None:
    """Write a resumable checkpoint, in the background if the recipe says so, and drop old ones.

    With S3 it is sent there too, always in the background.
    """
    folder = checkpoint.step_folder(context.checkpoints, step)

    def then() -> None:
        keep = config.keep_checkpoints
        needed = context.back_up(folder, marker=MARKER, keep=keep)
        checkpoint.prune(context.checkpoints, keep=keep, needed=needed)

    if config.async_save:
        trainer.save_in_background(folder, {"step": step, **state}, then=then)
    else:
        trainer.save(folder, {"step": step, **state})
        then()


def publish(context: StageContext, trainer: Trainer, step: int, **metadata: object) -> StageOutput:
    """Make the trained model the stage's output, with its tokenizer beside it."""
    trainer.finish_saves(wait=True)
    is_first = dist.get_rank() == 0
    if is_first:
        shutil.rmtree(context.output, ignore_errors=True)
    dist.barrier()
    trainer.save_weights(context.output / "checkpoint")
    if is_first:
        shutil.copytree(context.path_of("data") / "tokenizer", context.output / "tokenizer")
    return StageOutput(step=step, is_model=True, metadata=dict(metadata))
