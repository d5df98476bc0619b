"""Drawing of a pipeline's stages as SVG, for the lineage page and the report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

_BOX_WIDTH, _BOX_HEIGHT = 132, 66
_GAP_X, _GAP_Y = 44, 22
_COLOURS = {
    "done": ("#e8f4ec", "#3c8d5a"),
    "cached": ("#e9f0fa", "#4a76b8"),
    "failed": ("#fbeaea", "#b94a48"),
}
_UNKNOWN = ("#f4f4f2", "#8a8a86")


@dataclass(frozen=True)
class StageNode:
    """One box: a name, its state and two lines below."""

    name: str
    status: str = ""
    """`done`, `cached`, `failed` or empty."""
    detail: str = ""
    """Such as the seconds it took."""
    stage_hash: str = ""
    parents: tuple[str, ...] = ()


def draw_stages(nodes: Sequence[StageNode]) -> str:
    """SVG of the stages, left to right.

    An edge that a longer path implies is left out: the data stage feeds every other, and drawing
    that hides the chain.

    Args:
        nodes: Stages in order of execution; parents that are not among them are ignored.

    Returns:
        An `<svg>` element.
    """
    names = {node.name for node in nodes}
    parents = {node.name: [p for p in node.parents if p in names] for node in nodes}
    places = _places(parents)
    columns = max((column for column, _ in places.values()), default=0) + 1
    rows = max((row for _, row in places.values()), default=0) + 1
    width = columns * (_BOX_WIDTH + _GAP_X) - _GAP_X + 4
    height = rows * (_BOX_HEIGHT + _GAP_Y) - _GAP_Y + 4
    edges = [
        _edge(places[parent], places[name])
        for name, above in parents.items()
        for parent in _direct(above, parents)
    ]
    boxes = [_box(node, places[node.name]) for node in nodes]
    return (
        f'<svg class="dag" role="img" aria-label="Stages of the pipeline" width="{width}" '
        f'height="{height}" viewBox="0 0 {width} {height}" font-family="inherit">'
        '<defs><marker id="dag-arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="#777"/></marker></defs>'
        + "".join(edges + boxes)
        + "</svg>"
    )


def _places(parents: Mapping[str, Sequence[str]]) -> dict[str, tuple[int, int]]:
    """Column (longest path from a root) and row of each stage."""
    places: dict[str, tuple[int, int]] = {}
    filled: dict[int, int] = {}
    for name, above in parents.items():
        column = max((places[parent][0] + 1 for parent in above), default=0)
        places[name] = (column, filled.get(column, 0))
        filled[column] = filled.get(column, 0) + 1
    return places


def _direct(above: Sequence[str], parents: Mapping[str, Sequence[str]]) -> list[str]:
    """Those of `above` that no other one of them reaches: the transitive reduction."""
    return [p for p in above if not any(_reaches(p, other, parents) for other in above)]


def _reaches(start: str, end: str, parents: Mapping[str, Sequence[str]]) -> bool:
    return any(p == start or _reaches(start, p, parents) for p in parents[end])


def _corner(place: tuple[int, int]) -> tuple[int, int]:
    return 2 + place[0] * (_BOX_WIDTH + _GAP_X), 2 + place[1] * (_BOX_HEIGHT + _GAP_Y)


def _edge(start: tuple[int, int], end: tuple[int, int]) -> str:
    x0, y0 = _corner(start)
    x1, y1 = _corner(end)
    x0, y0, y1 = x0 + _BOX_WIDTH, y0 + _BOX_HEIGHT // 2, y1 + _BOX_HEIGHT // 2
    middle = (x0 + x1) / 2
    path = f"M{x0} {y0} C{middle} {y0} {middle} {y1} {x1} {y1}"
    return (
        f'<path d="{path}" fill="none" stroke="#777" stroke-width="1.3" '
        'marker-end="url(#dag-arrow)"/>'
    )


def _box(node: StageNode, place: tuple[int, int]) -> str:
    x, y = _corner(place)
    fill, stroke = _COLOURS.get(node.status, _UNKNOWN)
    middle = x + _BOX_WIDTH / 2
    second = " · ".join(text for text in (node.status, node.detail) if text)
    lines = (
        (y + 22, 14, "#222", 600, node.name),
        (y + 40, 11.5, stroke, 400, second),
        (y + 56, 10.5, "#777", 400, node.stage_hash[:12]),
    )
    texts = "".join(
        f'<text x="{middle}" y="{top}" text-anchor="middle" font-size="{size}" fill="{colour}" '
        f'font-weight="{weight}">{escape(text)}</text>'
        for top, size, colour, weight, text in lines
        if text
    )
    dash = ' stroke-dasharray="5 3"' if node.status == "cached" else ""
    return (
        f'<g><rect x="{x}" y="{y}" width="{_BOX_WIDTH}" height="{_BOX_HEIGHT}" rx="7" '
        f'fill="{fill}" stroke="{stroke}" stroke-width="1.3"{dash}/>{texts}</g>'
    )
