"""One step of the model over the cache: rows that decode and chunks of prompts in one call.

It computes with the trainer's own parameters and the same formulas as `m1.model.block`, without
what only training needs: autograd functions, dispatchers, split sizes on the host. On a CPU that is
most of the time of a step, and on a GPU it is what lets a graph capture one.

Shapes: T tokens of a step, B rows that decode, N chunks, R rows of logits, V vocabulary, h hidden,
H heads, KV key-value heads, D head dim, E experts of this rank, F width of a feed-forward.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from m1.config.schema import BranchScales
from m1.inference.attention import (
    decode_lightning,
    decode_softmax,
    prefill_lightning,
    prefill_softmax,
)
from m1.inference.cache import Cache
from m1.inference.feed_forward import Record, experts
from m1.inference.parameters import Layer, Lightning, Softmax, copy_joined, read_parameters
from m1.inference.steps import DecodeRows, Prompts, Step
from m1.model.head import split_linear
from m1.model.softmax import rotate
from m1_kernels.lightning_attention import gated_norm

Linear = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

FLOAT_ROWS = 128
"""Up to here reading the FP32 head takes longer, on a GPU, than multiplying by it in FP32."""


class ModelRunner:
    """A GPTModel as a function of a `Step` and a `Cache`."""

    def __init__(self, model: torch.nn.Module, *, linear: Linear = F.linear) -> None:
        """Wrap a model.

        Args:
            model: From `m1.model.build`, all layers on every rank.
            linear: y = x w^T; `m1.inference.invariant` has one whose bits do not depend on T.
        """
        self.linear = linear
        self.float_head = True
        """False: the head in the trunk's arithmetic, to show what that costs (paper Fig. 3)."""
        self.is_invariant = linear is not F.linear
        self.parameters = read_parameters(model)
        self.refresh()

    def refresh(self) -> None:
        """Take notice that the weights have changed."""
        found = self.parameters
        if found.head is not found.stored_head:
            found.head.copy_(found.stored_head)  # in place, for graphs that read it
        if found.device.type == "cpu" and not self.is_invariant:
            copy_joined(found)

    @torch.inference_mode()
    def __call__(self, step: Step, cache: Cache) -> torch.Tensor:
        """Logits float32 [R, V]; states, keys and experts of all tokens enter the cache."""
        found = self.parameters
        x = self._embed(step.tokens)
        angles = step.positions[:, None].float() * found.inverse_frequencies
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        rotary = angles.cos(), angles.sin()
        prompts = Prompts.of(step.chunks, x.device) if step.chunks else None
        normed = self._norm(x, found.layers[0].attention_norm)
        following = [*(layer.attention_norm for layer in found.layers[1:]), found.final_norm]
        for number, (layer, next_norm) in enumerate(zip(found.layers, following, strict=True)):
            if isinstance(layer.attention, Lightning):
                inner = self._lightning(normed, layer, layer.attention, step, prompts, cache)
            else:
                inner = self._softmax(normed, layer, layer.attention, step, rotary, cache)
            kept = normed if found.config.is_post_norm else x
            out, scales = layer.attention.out, layer.attention_scales
            x, normed = self._project(inner, out, kept, scales, layer.mlp_norm)
            kept = normed if found.config.is_post_norm else x
            record = None if cache.routed_experts is None else cache.routed_experts[number]
            branch = experts(
                normed,
                layer.mlp,
                top_k=found.top_k,
                linear=self.linear,
                record=None if record is None else Record(record.flatten(0, 1), step.places),
            )
            branch = _reduced(branch, found.expert_group)
            x, normed = self._add(branch, kept, layer.mlp_scales, next_norm)
        return self._logits(normed if step.logits_of is None else normed[step.logits_of])

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        found = self.parameters
        if found.tensor_group is None:
            return found.embedding[tokens]
        rows = found.embedding.shape[0]
        local = tokens - found.tensor_group.rank() * rows
        is_here = (local >= 0) & (local < rows)
        x = found.embedding[local.clamp(0, rows - 1)] * is_here[:, None]
        return _reduced(x, found.tensor_group)

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        found = self.parameters
        is_many = x.is_cuda and x.shape[0] > FLOAT_ROWS
        if not self.float_head:
            logits = self.linear(x, found.head.to(x.dtype)).float()
        elif is_many and x.dtype == torch.bfloat16 and not self.is_invariant:
            logits = split_linear(x, found.head)
        else:
            logits = self.linear(x.float(), found.head)
        if found.tensor_group is None:
            return logits
        parts = [torch.empty_like(logits) for _ in range(found.tensor_group.size())]
        dist.all_gather(parts, logits.contiguous(), group=found.tensor_group)
        return torch.cat(parts, dim=-1)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, weight, self.parameters.config.layernorm_epsilon)

    def _lightning(
        self,
        x: torch.Tensor,
        layer: Layer,
        weights: Lightning,
        step: Step,
        prompts: Prompts | None,
        cache: Cache,
    ) -> torch.Tensor:
        num_heads, dim = cache.states.shape[2:4]
        width = num_heads * dim
        if weights.qkv_gate is not None:
            both = self.linear(x, weights.qkv_gate)
            qkv, gate = both[:, : 3 * width], both[:, 3 * width :]
        else:
            qkv, gate = self.linear(x, weights.qkv), self.linear(x, weights.gate)
        q, k, v = F.silu(qkv).view(-1, num_heads, 3, dim).unbind(2)
        table = cache.states[layer.cache_index]
        count = step.decode.count if step.decode else 0
        parts, invariant = [], self.is_invariant
        if step.decode:
            rows = (q, k, v) if not step.chunks else (q[:count], k[:count], v[:count])
            parts.append(
                decode_lightning(
                    *rows, weights.slopes, table, step.decode.slots, batch_invariant=invariant
                )
            )
        if prompts:
            rows = (q[count:], k[count:], v[count:])
            parts.append(
                prefill_lightning(*rows, weights.slopes, table, prompts, batch_invariant=invariant)
            )
        out = (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1)
        return self._gated_norm(out, gate, weights.norm)

    def _gated_norm(
        self, x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        group, eps = self.parameters.tensor_group, self.parameters.config.lightning_norm_epsilon
        if group is None:
            if x.is_cuda:
                return gated_norm(x, gate.contiguous(), weight, eps)
            return rms_norm(x, weight, eps).mul_(torch.sigmoid(gate))
        total = _reduced(x.float().square().sum(-1, keepdim=True), group)
        scale = torch.rsqrt(total / (x.shape[-1] * group.size()) + eps)
        return torch.sigmoid(gate) * ((x.float() * scale).to(x.dtype) * weight)

    def _softmax(
        self,
        x: torch.Tensor,
        layer: Layer,
        weights: Softmax,
        step: Step,
        rotary: tuple[torch.Tensor, torch.Tensor],
        cache: Cache,
    ) -> torch.Tensor:
        keys, values = cache.keys[layer.cache_index], cache.values[layer.cache_index]
        num_groups, dim = keys.shape[2:]
        qkv = self.linear(x, weights.qkv)
        if weights.bias is not None:
            qkv = qkv + weights.bias
        qkv = qkv.view(x.shape[0], num_groups, -1, dim)
        q, k, v = qkv[:, :, :-2].flatten(1, 2), qkv[:, :, -2], qkv[:, :, -1]
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        keys.flatten(0, 1)[step.places] = k
        values.flatten(0, 1)[step.places] = v
        parts, start = [], 0
        if step.decode:
            start = step.decode.count
            parts.append(self._decode_softmax(q[:start], keys, values, step.decode))
        for chunk in step.chunks:
            rows = slice(start, start + chunk.count)
            start += chunk.count
            parts.append(prefill_softmax(q[rows], keys, values, chunk.pages, chunk.start))
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1)

    def _decode_softmax(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rows: DecodeRows
    ) -> torch.Tensor:
        if not self.is_invariant or q.is_cuda:
            return decode_softmax(q, keys, values, rows.pages, rows.lengths)
        size, outs = keys.shape[1], []
        for row, length in enumerate(rows.lengths.tolist()):  # the width of a batch changes bits
            used = rows.pages[row : row + 1, : -(-length // size)]
            own = slice(row, row + 1)
            outs.append(decode_softmax(q[own], keys, values, used, rows.lengths[own]))
        return torch.cat(outs)

    def _project(
        self,
        inner: torch.Tensor,
        weight: torch.Tensor,
        kept: torch.Tensor,
        scales: BranchScales,
        norm: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`_add` of inner's projection."""
        found = self.parameters
        if found.is_joined and found.tensor_group is None and inner.dtype == torch.float32:
            # And so on a CPU: one pass instead of three.
            x = torch.addmm(kept, inner, weight.t(), beta=scales.alpha, alpha=scales.beta)
            return x, self._norm(x, norm)
        return self._add(
            _reduced(self.linear(inner, weight), found.tensor_group), kept, scales, norm
        )

    def _add(
        self, branch: torch.Tensor, kept: torch.Tensor, scales: BranchScales, norm: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A branch added to its residual, and the norm of the sum with these weights."""
        if branch.is_cuda:
            from m1_kernels.residual_norm import residual_norm

            eps = self.parameters.config.layernorm_epsilon
            return residual_norm(branch, kept, norm, alpha=scales.alpha, beta=scales.beta, eps=eps)
        if scales.beta != 1:
            branch = branch * scales.beta
        x = torch.add(branch, kept, alpha=scales.alpha)
        return x, self._norm(x, norm)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm of rows in float32, in x's dtype; on CPUs in fewer passes than torch's own."""
    if x.is_cuda or x.dtype != torch.float32:
        return F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).to(x.dtype)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    mean_square = torch.addcmul(_constant(eps), norm, norm, value=1 / x.shape[-1])
    return (x * mean_square.rsqrt_()).mul_(weight)


@functools.cache
def _constant(value: float) -> torch.Tensor:
    return torch.tensor(value)


def _reduced(x: torch.Tensor, group: Any) -> torch.Tensor:
    """Sum over the ranks of a group; None is one rank."""
    if group is not None:
        dist.all_reduce(x, group=group)
    return x
