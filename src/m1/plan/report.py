"""The whole plan of one stage, and its JSON form.

Keys of the JSON (bytes, FLOPs, seconds, dollars; all numbers are of the stage that was asked for):

    recipe, stage
    layout       world_size, tensor, pipeline, expert, expert_tensor, context, data, recompute
    parameters   total, active, embedding, head, by_name
    memory       gpu_bytes, worst_stage, worst, stages[]: stage, layers, weights, gradients,
                 optimizer, activations, recurrent_states, kv_cache, peak (bytes on one GPU);
                 decoding: num_sequences, length, recurrent_states, kv_cache (bytes, whole model)
    flops        sequence_length, forward_per_token, training_per_token, per_step, parts,
                 softmax_attention_full (per token, forward)
    cost         gpu, num_gpus, peak_flops, mfu, flops_per_step, step_seconds, num_steps, gpu_hours,
                 price_per_gpu_hour, dollars
    inference    convention -> {title, rows[]: length, flops, share_of_r1}
    warnings     texts
    notes        what is counted and what is not
"""

from dataclasses import asdict, dataclass
from typing import Any

from m1.config.layout import padded_vocab
from m1.config.schema import Recipe
from m1.config.stages import stage_kind
from m1.plan.cost import (
    DEFAULT_GPU,
    DEFAULT_MFU,
    PAPER_PRICE,
    Cost,
    Gpu,
    find_gpu,
    plan_cost,
)
from m1.plan.flops import TokenFlops, softmax_flops, token_flops
from m1.plan.inference import CONVENTIONS, Convention, Generation, compare
from m1.plan.memory import StageMemory, decoding_bytes, plan_memory
from m1.plan.parameters import ParameterCount, count_parameters
from m1.plan.workload import Workload, workload_of

GIB = 2**30
_USABLE = 0.9
"""Share of a GPU's memory that a plan may fill: the rest is for what is not counted."""


@dataclass(frozen=True)
class Options:
    """What the command line adds to the recipe."""

    stage: str = "pretrain"
    gpu: str = DEFAULT_GPU
    mfu: float = DEFAULT_MFU
    price_per_gpu_hour: float = PAPER_PRICE
    num_sequences: int | None = None
    length: int | None = None


@dataclass(frozen=True)
class Plan:
    """What one stage of a recipe needs."""

    recipe: Recipe
    workload: Workload
    gpu: Gpu
    parameters: ParameterCount
    stages: list[StageMemory]
    flops: TokenFlops
    cost: Cost
    inference: dict[Convention, list[Generation]]
    warnings: list[str]
    notes: list[str]

    @property
    def worst(self) -> StageMemory:
        """The pipeline stage that needs most memory."""
        return max(self.stages, key=lambda stage: stage.peak)


def make_plan(recipe: Recipe, options: Options) -> Plan:
    """Plan one stage.

    Raises:
        M1Error: The recipe lacks the stage, or an option has no meaning.
    """
    model, gpu = recipe.model, find_gpu(options.gpu)
    workload = workload_of(
        recipe, options.stage, num_sequences=options.num_sequences, length=options.length
    )
    vocab_size = padded_vocab(model, recipe.data.tokenizer.vocab_size)
    stages = plan_memory(
        model,
        workload.parallel,
        vocab_size=vocab_size,
        batch=workload.batch,
        decoding=workload.decoding if workload.is_sampling else None,
    )
    flops = token_flops(model, vocab_size, sequence_length=workload.sequence_length)
    cost = plan_cost(
        model,
        gpu,
        num_gpus=workload.parallel.world_size,
        flops_per_step=_flops_per_step(workload, flops),
        num_steps=workload.num_steps,
        mfu=options.mfu,
        price_per_gpu_hour=options.price_per_gpu_hour,
    )
    return Plan(
        recipe=recipe,
        workload=workload,
        gpu=gpu,
        parameters=count_parameters(model, vocab_size),
        stages=stages,
        flops=flops,
        cost=cost,
        inference={name: compare(model, recipe.name, name) for name in CONVENTIONS},
        warnings=_warnings(stages, gpu, workload),
        notes=_notes(recipe, workload),
    )


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan under the keys of the module's docstring."""
    flops, parallel = plan.flops, plan.workload.parallel
    layout = parallel.model_dump(mode="json", exclude={"pipeline_layers"})
    return {
        "recipe": plan.recipe.name,
        "stage": plan.workload.stage,
        "layout": {
            "world_size": parallel.world_size,
            **layout,
            "expert_tensor": parallel.expert_tensor_size,
        },
        "parameters": asdict(plan.parameters),
        "memory": _memory_json(plan),
        "flops": {
            "sequence_length": plan.workload.sequence_length,
            "forward_per_token": flops.forward,
            "training_per_token": flops.training,
            "per_step": plan.cost.flops_per_step,
            "parts": asdict(flops),
            "softmax_attention_full": _full_attention(plan),
        },
        "cost": asdict(plan.cost),
        "inference": {
            name: {"title": CONVENTIONS[name], "rows": [asdict(row) for row in rows]}
            for name, rows in plan.inference.items()
        },
        "warnings": plan.warnings,
        "notes": plan.notes,
    }


def _flops_per_step(workload: Workload, flops: TokenFlops) -> float:
    work = workload.work
    return float((work.sampled + work.scored) * flops.forward + work.trained * flops.training)


def _memory_json(plan: Plan) -> dict[str, Any]:
    model, decoding = plan.recipe.model, plan.workload.decoding
    states, cache = decoding_bytes(model, list(model.layer_kinds), decoding)
    return {
        "gpu_bytes": plan.gpu.memory_bytes,
        "worst_stage": plan.worst.stage,
        "worst": _stage_json(plan.worst),
        "stages": [_stage_json(stage) for stage in plan.stages],
        "decoding": {**asdict(decoding), "recurrent_states": states, "kv_cache": cache},
    }


def _stage_json(stage: StageMemory) -> dict[str, int]:
    return {name: round(value) for name, value in {**asdict(stage), "peak": stage.peak}.items()}


def _full_attention(plan: Plan) -> int:
    model = plan.recipe.model
    per_layer = softmax_flops(model, plan.workload.sequence_length, "full")
    return model.layer_kinds.count("softmax") * per_layer


def _warnings(stages: list[StageMemory], gpu: Gpu, workload: Workload) -> list[str]:
    worst = max(stages, key=lambda stage: stage.peak)
    need, have = worst.peak / GIB, gpu.memory_bytes / GIB
    found = f"pipeline stage {worst.stage} needs {need:.1f} GiB on a GPU"
    table = stage_kind(workload.stage)
    micro_batch = "micro_batch_tokens" if workload.is_sampling else "micro_batch_rows"
    remedy = (
        f"set {table}.parallel.recompute, lower {table}.{micro_batch}, or spread "
        "the model over more GPUs"
    )
    if workload.is_sampling:
        remedy += " (or lower --sequences or --length if decoding is what fills it)"
    if need > have:
        return [f"{found}, but {gpu.name} has {have:.1f}; {remedy}"]
    if need > _USABLE * have:
        return [
            f"{found}, which leaves less than {1 - _USABLE:.0%} of {gpu.name}'s {have:.1f} for "
            f"temporaries, communication and fragmentation; {remedy}"
        ]
    return []


def _notes(recipe: Recipe, workload: Workload) -> list[str]:
    """What the numbers mean and leave out, for those that this plan shows."""
    tensors = "plain torch, FP32" if recipe.model.precision == "fp32" else "Transformer Engine"
    notes = [
        f"activations: what {tensors} keeps for the backward pass, rows spread evenly over experts",
        "FLOPs: matrix products, softmax attention causal, lightning attention by chunks of 64; "
        "without recomputation; the pipeline's idle time is part of the MFU",
    ]
    if workload.is_sampling:
        notes.append(
            "RL: every completion at max_new_tokens, sampled, scored and trained once; without "
            "prompts and extra batches. Sampling is bound by memory, so its time is a lower bound"
        )
    return notes
