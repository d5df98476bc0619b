"""One model with its optimizer: updates, scoring, checkpoints. What training stages share.

Shapes: T packed tokens of one micro-batch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from m1.config.schema import ModelConfig, OptimizerConfig, ParallelConfig
from m1.model import checkpoint
from m1.model.build import build_model
from m1.model.cpu import single_threaded
from m1.model.saving import BackgroundSaves, Saving
from m1.train.megatron_setup import accumulate_in_products, check_order, finalize
from m1.train.microbatch import MicroBatch
from m1.train.sharding import BatchShard, shard
from m1.types import M1Error

_FP8_TOKENS = 128
"""Tokens of a rank are padded to a multiple of this, the edge of a block of scaled operands."""
LossFunction = Callable[[torch.Tensor, MicroBatch], tuple[torch.Tensor, dict[str, torch.Tensor]]]
"""(logprobs float32 [T] of the targets with gradient, micro-batch) -> (scalar loss, sums to be
added over batches and ranks)."""


@dataclass(frozen=True)
class UpdateResult:
    """What one optimizer update did."""

    sums: dict[str, float]
    grad_norm: float
    """Before it was clipped."""
    is_made: bool = True
    """Whether the weights changed."""


def cross_entropy(
    logprobs: torch.Tensor, batch: MicroBatch
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Weighted negative log-likelihood of the targets, in nats."""
    loss = -(batch.weights * logprobs).sum()
    return loss, {"loss": loss.detach()}


class Trainer:
    """A model under megatron-core's DDP and optimizer. Requires `m1.model.parallel.initialize`."""

    def __init__(
        self,
        model: ModelConfig,
        optimizer: OptimizerConfig,
        *,
        vocab_size: int,
        seed: int,
        parallel: ParallelConfig,
    ) -> None:
        self.parallel = parallel
        self.is_fp8 = model.precision == "fp8"
        module = build_model(model, vocab_size=vocab_size, seed=seed, parallel=parallel)
        self.device = next(module.parameters()).device
        config = module.config
        self.module = DistributedDataParallel(
            config,
            DistributedDataParallelConfig(
                use_distributed_optimizer=True, grad_reduce_in_fp32=True, overlap_grad_reduce=False
            ),
            module,
        )
        accumulate_in_products(module)
        self.optimizer = get_megatron_optimizer(
            MegatronOptimizerConfig(
                optimizer="adam",
                lr=optimizer.lr,
                min_lr=0.0,
                weight_decay=optimizer.weight_decay,
                adam_beta1=optimizer.beta1,
                adam_beta2=optimizer.beta2,
                adam_eps=optimizer.epsilon,
                clip_grad=optimizer.max_grad_norm,
                use_distributed_optimizer=True,
                params_dtype=config.params_dtype,
                bf16=config.bf16,
            ),
            [self.module],
        )
        check_order(self.optimizer)
        config.finalize_model_grads_func = finalize
        config.no_sync_func = self.module.no_sync
        self._forward_backward = get_forward_backward_func()
        self._saves = BackgroundSaves()

    @property
    def model(self) -> torch.nn.Module:
        """The bare GPTModel."""
        return self.module.module  # type: ignore[no-any-return]

    def update(
        self,
        batches: Sequence[MicroBatch],
        loss: LossFunction,
        *,
        lr: float,
        skip_above: float | None = None,
    ) -> UpdateResult:
        """One optimizer update from micro-batches whose weights sum to 1 over all ranks.

        Args:
            batches: This data-parallel rank's.
            loss: Of a micro-batch.
            lr: Learning rate.
            skip_above: The update is not made where the gradient's norm is larger or not finite;
                absent: the latter is an error.

        Raises:
            M1Error: The gradient is not finite; the weights are left as they were.
        """
        self.module.train()
        self.module.zero_grad_buffer()
        self.optimizer.zero_grad()
        sums = self._run([self._shard(b) for b in batches], loss, forward_only=False)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with single_threaded():
            self.optimizer.prepare_grads()
            norm = self.optimizer.get_grad_norm()
        if skip_above is not None and not (math.isfinite(norm) and norm <= skip_above):
            return UpdateResult(sums=sums, grad_norm=float(norm), is_made=False)
        if not math.isfinite(norm):
            raise M1Error(
                f"the gradient norm is {float(norm)}; the update was not made. Lower the "
                "learning rate, or look for a task whose reward is not finite; "
                "the last checkpoint is intact"
            )
        with single_threaded():
            _, norm, _ = self.optimizer.step()
        return UpdateResult(sums=sums, grad_norm=float(norm))

    @torch.no_grad()
    def evaluate(self, batches: Sequence[MicroBatch], loss: LossFunction) -> dict[str, float]:
        """Sums of the loss function over the batches, without gradients."""
        self.module.eval()
        return self._run([self._shard(b) for b in batches], loss, forward_only=True)

    @torch.no_grad()
    def logprobs(self, batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
        """Log-probability of every target under the current weights, float32 [T] a batch."""
        self.module.eval()
        collected: list[torch.Tensor] = []

        def keep(
            logprobs: torch.Tensor, batch: MicroBatch
        ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            collected.append(logprobs.clone())
            return logprobs.sum(), {}

        shards = [self._shard(batch) for batch in batches]
        self._run(shards, keep, forward_only=True)
        return [
            self._whole(collected[i] if collected else None, part, batch)
            for i, (part, batch) in enumerate(zip(shards, batches, strict=True))
        ]

    def share(self, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """This data-parallel rank's part of a global batch, as many micro-batches on every rank.

        Where their number does not divide, weightless copies of the last one fill up.
        """
        size = self.parallel.data
        last = batches[-1]
        filler = last.without_loss()
        filled = [*batches, *[filler] * (-len(batches) % size)]
        return filled[parallel_state.get_data_parallel_rank() :: size]

    def _shard(self, batch: MicroBatch) -> BatchShard:
        rank = parallel_state.get_context_parallel_rank()
        return shard(
            batch,
            self.parallel,
            context_rank=rank,
            device=self.device,
            multiple=_FP8_TOKENS if self.is_fp8 else 1,
        )

    def _run(
        self, shards: Sequence[BatchShard], loss: LossFunction, *, forward_only: bool
    ) -> dict[str, float]:
        num = len(shards)
        # The schedule divides each loss by the number of micro-batches and DDP averages over
        # replicas; the weights already are those of the global batch, so both are undone here.
        undo = num * self.parallel.data

        def step(iterator: Any, module: Any) -> Any:
            part: BatchShard = next(iterator)
            batch, packing = part.batch, part.packing
            losses = module(
                batch.tokens[None],
                packing.positions[None],
                None,
                labels=batch.targets[None],
                packed_seq_params=packing,
            )

            def reduce(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
                value, parts = loss(-output.view(-1), batch)
                return value * undo, parts

            return losses, reduce

        parts = self._forward_backward(
            forward_step_func=step,
            data_iterator=iter(shards),
            model=[self.module],
            num_microbatches=num,
            seq_length=int(shards[0].batch.tokens.numel()),
            micro_batch_size=1,
            forward_only=forward_only,
        )
        return self._total(parts)

    def _total(self, parts: Sequence[dict[str, torch.Tensor]]) -> dict[str, float]:
        """Sums over micro-batches and over the ranks that had different tokens, on every rank."""
        names = [sorted(parts[0])] if parts else [[]]
        group = parallel_state.get_pipeline_model_parallel_group()
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        if self.parallel.pipeline > 1:
            dist.broadcast_object_list(names, src=last, group=group)
        sums = torch.zeros(len(names[0]), dtype=torch.float64, device=self.device)
        if parts and names[0]:
            sums = torch.stack([sum(p[name].double() for p in parts) for name in names[0]])  # type: ignore[misc]
            if self.parallel.data * self.parallel.context > 1:
                ranks = parallel_state.get_data_parallel_group(with_context_parallel=True)
                dist.all_reduce(sums, group=ranks)
        if self.parallel.pipeline > 1:
            dist.broadcast(sums, src=last, group=group)
        return dict(zip(names[0], sums.tolist(), strict=True))

    def _whole(
        self, values: torch.Tensor | None, part: BatchShard, batch: MicroBatch
    ) -> torch.Tensor:
        """Values [T] of a micro-batch on the CPU, from those [L] of the ranks that share it."""
        whole = torch.zeros(batch.tokens.numel(), device=self.device)
        if values is not None:
            is_real = part.source >= 0
            whole[part.source[is_real].to(self.device)] = values[is_real.to(self.device)]
            if self.parallel.context > 1:
                dist.all_reduce(whole, group=parallel_state.get_context_parallel_group())
        if self.parallel.pipeline > 1:
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            group = parallel_state.get_pipeline_model_parallel_group()
            dist.broadcast(whole, src=last, group=group)
        return whole.cpu()

    def save(self, folder: Path, state: dict[str, Any]) -> str:
        """Write model, optimizer and `state` as a sharded checkpoint; returns its digest."""
        return self._begin(folder, state, in_background=False).finish()

    def save_in_background(
        self, folder: Path, state: dict[str, Any], *, then: Callable[[], None]
    ) -> None:
        """Begin such a checkpoint of what is now; `finish_saves` ends it and calls `then`."""
        self._saves.start(lambda: self._begin(folder, state, in_background=True), then)

    def finish_saves(self, *, wait: bool) -> None:
        """End a checkpoint under way if its files are written, or `wait` for them.

        Raises:
            M1Error: It could not be written; earlier checkpoints are intact.
        """
        self._saves.finish(wait=wait)

    def _begin(self, folder: Path, state: dict[str, Any], *, in_background: bool) -> Saving:
        model = self.module.module
        return checkpoint.save(folder, model, self.optimizer, state, in_background=in_background)

    def save_weights(self, folder: Path) -> str:
        """Write the weights alone, for the next stage; returns the digest."""
        return checkpoint.save_weights(folder, self.module.module)

    def load(self, folder: Path) -> dict[str, Any]:
        """Read a checkpoint written by `save`, in place; returns its `state`."""
        return checkpoint.load(folder, self.module.module, self.optimizer)

    def load_weights(self, folder: Path) -> None:
        """Read only the model's weights, for a stage that starts from another's result."""
        checkpoint.load_weights(folder, self.module.module)
        self.optimizer.reload_model_params()
