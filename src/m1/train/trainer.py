"""One model with its optimizer: updates, scoring, checkpoints. What training stages share.

Shapes: T packed tokens of one micro-batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from m1.config.schema import ModelConfig, OptimizerConfig, ParallelConfig
from m1.model import checkpoint
from m1.model.build import build_model
from m1.model.packing import SequencePacking, pack
from m1.types import M1Error


@dataclass(frozen=True)
class MicroBatch:
    """Packed sequences for one forward and backward."""

    tokens: torch.Tensor
    """int64 [T]."""
    targets: torch.Tensor
    """int64 [T], the token that each position predicts; any id where the weight is 0."""
    lengths: torch.Tensor
    """int64 [N], sequence lengths, summing to T."""
    weights: torch.Tensor
    """float32 [T], weight of each position's loss; the weights of a global batch sum to 1."""
    extras: dict[str, torch.Tensor] = field(default_factory=dict)
    """Further tensors [T] for the loss."""


LossFunction = Callable[[torch.Tensor, MicroBatch], tuple[torch.Tensor, dict[str, torch.Tensor]]]
"""(logprobs float32 [T] of the targets with gradient, micro-batch) -> (scalar loss, sums to be
added over batches)."""


@dataclass(frozen=True)
class UpdateResult:
    """What one optimizer update did."""

    sums: dict[str, float]
    grad_norm: float


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
        module = build_model(model, vocab_size=vocab_size, seed=seed, parallel=parallel)
        is_distributed = parallel.data > 1
        config = module.config
        self.module = DistributedDataParallel(
            config,
            DistributedDataParallelConfig(
                use_distributed_optimizer=is_distributed, grad_reduce_in_fp32=True
            ),
            module,
        )
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
                use_distributed_optimizer=is_distributed,
                params_dtype=config.params_dtype,
            ),
            [self.module],
        )
        config.finalize_model_grads_func = finalize_model_grads
        config.no_sync_func = self.module.no_sync
        self._forward_backward = get_forward_backward_func()

    @property
    def model(self) -> torch.nn.Module:
        """The bare GPTModel."""
        return self.module.module  # type: ignore[no-any-return]

    def update(
        self, batches: Sequence[MicroBatch], loss: LossFunction, *, lr: float
    ) -> UpdateResult:
        """One optimizer update from micro-batches whose weights sum to 1 over all ranks.

        Raises:
            M1Error: The gradient is not finite; the weights are left as they were.
        """
        self.module.train()
        self.module.zero_grad_buffer()
        self.optimizer.zero_grad()
        sums = self._run(batches, loss, forward_only=False)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.prepare_grads()
        norm = self.optimizer.get_grad_norm()
        if not torch.isfinite(torch.as_tensor(norm)):
            raise M1Error(
                f"the gradient norm is {float(norm)}; the update was not made. Lower the "
                "learning rate, or look for a task whose reward is not finite; "
                "the last checkpoint is intact"
            )
        _, norm, _ = self.optimizer.step()
        return UpdateResult(sums=sums, grad_norm=float(norm))

    @torch.no_grad()
    def evaluate(self, batches: Sequence[MicroBatch], loss: LossFunction) -> dict[str, float]:
        """Sums of the loss function over the batches, without gradients."""
        self.module.eval()
        return self._run(batches, loss, forward_only=True)

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

        self._run(batches, keep, forward_only=True)
        return collected

    def _run(
        self, batches: Sequence[MicroBatch], loss: LossFunction, *, forward_only: bool
    ) -> dict[str, float]:
        num = len(batches)
        # The schedule divides each loss by the number of micro-batches and DDP averages over
        # replicas; the weights already are those of the global batch, so both are undone here.
        undo = num * self.parallel.data * self.parallel.context

        def step(iterator: Any, module: Any) -> Any:
            batch: MicroBatch = next(iterator)
            packing: SequencePacking = pack(batch.lengths)
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
            data_iterator=iter(batches),
            model=[self.module],
            num_microbatches=num,
            seq_length=int(batches[0].tokens.numel()),
            micro_batch_size=1,
            forward_only=forward_only,
        )
        names = parts[0].keys() if parts else ()
        return {name: float(sum(part[name] for part in parts)) for name in names}

    def save(self, folder: Path, state: dict[str, Any]) -> str:
        """Write model, optimizer and `state` as a sharded checkpoint; returns its digest."""
        return checkpoint.save(folder, self.module.module, self.optimizer, state)

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
