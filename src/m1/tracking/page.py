"""The lineage page: MLflow links models to runs but draws no chain, so one HTML file does."""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from m1.config.stages import in_order, parents_among
from m1.tracking.chain import lineage_of, origins
from m1.tracking.graph import StageNode, draw_stages
from m1.tracking.progress import format_duration
from m1.types import Pointer

_MLFLOW_KEYS = ("mlflow_run_id", "model_id", "model_version")


def lineage_page(
    pointers: Mapping[str, Pointer],
    *,
    summary: Mapping[str, Any],
    tracking: str,
    run_id: str,
) -> str:
    """One self-contained HTML page from data to registered model.

    Args:
        pointers: Output of each finished stage; `metadata` may name its MLflow ids.
        summary: The run's summary.json.
        tracking: MLflow tracking URI that holds the ids.
        run_id: The pipeline's MLflow run.

    Returns:
        HTML without any outside reference.
    """
    return str(
        _template().render(
            summary=summary,
            tracking=tracking,
            run_id=run_id,
            graph=draw_stages([*_origin_nodes(pointers), *_rooted(summary, pointers)]),
            scores=_scores(pointers),
            stages=[_details(pointer, pointers) for pointer in pointers.values()],
        )
    )


def stage_nodes(summary: Mapping[str, Any], pointers: Mapping[str, Pointer]) -> list[StageNode]:
    """Boxes for the stages that the summary or a pointer names, in order of execution."""
    told = summary.get("stages", {})
    nodes = []
    names = in_order([*told, *pointers])
    for name in names:
        state = told.get(name, {})
        pointer = pointers.get(name)
        seconds = state.get("seconds")
        nodes.append(
            StageNode(
                name=name,
                status=str(state.get("status", "")),
                detail=format_duration(float(seconds)) if seconds is not None else "",
                stage_hash=str(state.get("hash") or (pointer.stage_hash if pointer else "")),
                parents=parents_among(name, names),
            )
        )
    return nodes


def _origin_nodes(pointers: Mapping[str, Pointer]) -> list[StageNode]:
    """Boxes for the code and the image that made the outputs."""
    return [
        StageNode(
            name=kind,
            detail=values[0][:18],
            stage_hash=f"and {len(values) - 1} more" if len(values) > 1 else "",
        )
        for kind, values in origins(pointers.values()).items()
        if values
    ]


def _rooted(summary: Mapping[str, Any], pointers: Mapping[str, Pointer]) -> list[StageNode]:
    """The stages' boxes, whose first ones come after code and image."""
    roots = tuple(kind for kind, values in origins(pointers.values()).items() if values)
    return [
        node if node.parents else replace(node, parents=roots)
        for node in stage_nodes(summary, pointers)
    ]


def _scores(pointers: Mapping[str, Pointer]) -> list[tuple[str, str, str]]:
    """(benchmark, model's stage, score with its interval) of the evaluations among the outputs."""
    return [
        (benchmark, stage, f"{score['mean']:.3f} [{score['low']:.3f}, {score['high']:.3f}]")
        for pointer in pointers.values()
        for benchmark, row in pointer.metadata.get("scores", {}).items()
        for stage, score in row.items()
    ]


def _details(pointer: Pointer, pointers: Mapping[str, Pointer]) -> dict[str, Any]:
    ids = {key: pointer.metadata[key] for key in _MLFLOW_KEYS if pointer.metadata.get(key)}
    others = {
        key: value if isinstance(value, str) else json.dumps(value, default=str)
        for key, value in pointer.metadata.items()
        if key not in ids and key not in ("lineage", "scores")
    }
    return {
        "pointer": pointer,
        "ids": ids,
        "others": {key: text for key, text in others.items() if len(text) <= 400},
        "origin": {k: lineage_of(pointer).get(k) for k in ("code", "image", "container", "config")},
        "datasets": lineage_of(pointer).get("datasets", {}),
        "reads": list(parents_among(pointer.stage, pointers)) if in_order([pointer.stage]) else [],
    }


@cache
def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("m1.tracking"), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("lineage.html.j2")
