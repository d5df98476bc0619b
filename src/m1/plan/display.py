"""The plan as a page for a terminal."""

from rich.console import Console
from rich.table import Table

from m1.plan.inference import CONVENTIONS
from m1.plan.memory import decoding_bytes
from m1.plan.report import GIB, Plan

_KINDS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
}
_DECODING_KINDS = {"recurrent_states": "states", "kv_cache": "KV"}


def render(plan: Plan, console: Console) -> None:
    """Print the plan."""
    counts = plan.parameters
    console.print(f"[bold]{plan.recipe.name}[/], {plan.workload.stage} on {_layout(plan)}")
    console.print(
        f"parameters  {_billions(counts.total)} total, {_billions(counts.active)} active without "
        "embedding and head"
    )
    console.print(_memory_table(plan))
    _print_decoding(plan, console)
    _print_cost(plan, console)
    console.print(_comparison_table(plan))
    for note in plan.notes:
        console.print(f"[dim]{note}[/]", soft_wrap=True)
    for warning in plan.warnings:
        console.print(f"[yellow]warning:[/] {warning}", soft_wrap=True)


def _layout(plan: Plan) -> str:
    parallel = plan.workload.parallel
    names = ("tensor", "pipeline", "context", "data", "expert")
    counts = {name: getattr(parallel, name) for name in names}
    counts["expert_tensor"] = parallel.expert_tensor_size
    sizes = [f"{name} {count}" for name, count in counts.items() if count > 1]
    layout = f" ({', '.join(sizes)})" if sizes else ""
    return f"{parallel.world_size} {plan.gpu.name}{layout}, recompute {parallel.recompute}"


def _memory_table(plan: Plan) -> Table:
    kinds = _KINDS | (_DECODING_KINDS if plan.workload.is_sampling else {})
    table = Table(box=None, pad_edge=False, title_justify="left", title="GiB on a GPU")
    for heading in ("stage", "layers", *kinds.values(), "peak"):
        table.add_column(heading, justify="right")
    for stage in plan.stages:
        sizes = [getattr(stage, kind) for kind in (*kinds, "peak")]
        style = "bold" if stage is plan.worst and len(plan.stages) > 1 else None
        table.add_row(str(stage.stage), str(stage.layers), *map(_gib, sizes), style=style)
    return table


def _print_decoding(plan: Plan, console: Console) -> None:
    model, decoding = plan.recipe.model, plan.workload.decoding
    states, cache = decoding_bytes(model, list(model.layer_kinds), decoding)
    count = "1 sequence" if decoding.num_sequences == 1 else f"{decoding.num_sequences} sequences"
    console.print(
        f"decoding    {count} of {decoding.length:,} tokens: recurrent states {_gib(states)} GiB, "
        f"key-value cache {_gib(cache)} GiB over all layers"
    )


def _print_cost(plan: Plan, console: Console) -> None:
    flops, cost = plan.flops, plan.cost
    console.print(
        f"FLOPs       {flops.forward:.3g} forward, {flops.training:.3g} training a token at "
        f"{plan.workload.sequence_length:,} tokens; {cost.flops_per_step:.3g} a step"
    )
    console.print(
        f"time        {_duration(cost.step_seconds)} a step at {cost.mfu:.0%} of "
        f"{cost.peak_flops / 1e12:.4g} TFLOP/s; {cost.num_steps:,} steps take "
        f"{_duration(cost.num_steps * cost.step_seconds)}"
    )
    dollars = f"${cost.dollars:,.0f}" if cost.dollars >= 1 else "under $1"
    console.print(
        f"cost        {_thousands(cost.gpu_hours)} GPU hours, {dollars} at "
        f"${cost.price_per_gpu_hour:.2f} an hour"
    )


def _comparison_table(plan: Plan) -> Table:
    """Fig. 1 right: each convention's FLOPs, and the recipe's share of R1's."""
    names = list(next(iter(plan.inference.values()))[0].flops)
    table = Table(
        box=None,
        pad_edge=False,
        title_justify="left",
        title="FLOPs (1e15) to generate n tokens, and the share of DeepSeek-R1's",
    )
    for heading in ("convention", "n", *names, f"{names[0]} / R1"):
        table.add_column(heading, justify="left" if heading == "convention" else "right")
    for convention, rows in plan.inference.items():
        for number, row in enumerate(rows):
            flops = [f"{row.flops[name] / 1e15:.3g}" for name in names]
            label = convention if number == 0 else ""
            share = f"{100 * row.share_of_r1[names[0]]:.3g}%"
            table.add_row(label, f"{row.length:,}", *flops, share)
    table.caption = "; ".join(f"{name}: {title}" for name, title in CONVENTIONS.items())
    table.caption_justify = "left"
    return table


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.3g} M"


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def _thousands(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f}" if num_bytes >= 0.1 * GIB else f"{num_bytes / GIB:.2g}"
