"""Small faults put into a program, to see whether tests notice them."""

import ast
import copy
import random
from collections.abc import Iterator

_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult,
    ast.Div: ast.FloorDiv, ast.Mod: ast.FloorDiv,
}  # fmt: skip
_CALLS = {"min": "max", "max": "min", "any": "all", "all": "any", "sorted": "list"}


def mutants(source: str, *, max_count: int, seed: int = 0) -> list[str]:
    """Distinct programs that differ from `source` in one place each.

    Comparisons, arithmetic, and/or, integer constants by one, min/max, conditions made constant,
    statements removed.

    Raises:
        SyntaxError: The source is no Python.
    """
    tree = ast.parse(source)
    original = ast.unparse(tree)
    found = {text for text in map(ast.unparse, _changed(tree)) if text != original}
    ordered = sorted(found)
    random.Random(seed).shuffle(ordered)
    return ordered[:max_count]


def _changed(tree: ast.Module) -> Iterator[ast.Module]:
    for number, node in enumerate(ast.walk(tree)):
        for choice in range(_num_choices(node)):
            other = copy.deepcopy(tree)
            target = next(n for i, n in enumerate(ast.walk(other)) if i == number)
            _change(target, choice)
            yield ast.fix_missing_locations(other)


def _num_choices(node: ast.AST) -> int:
    if isinstance(node, ast.Compare):
        return len(node.ops) if all(type(op) in _COMPARISONS for op in node.ops) else 0
    if isinstance(node, ast.BinOp | ast.AugAssign):
        return int(type(node.op) in _OPERATORS)
    if isinstance(node, ast.Constant):
        is_integer = isinstance(node.value, int) and not isinstance(node.value, bool)
        return 2 if is_integer else 0
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return int(node.func.id in _CALLS)
    if isinstance(node, ast.If | ast.While):
        return 1
    return int(isinstance(node, ast.BoolOp))


def _change(node: ast.AST, choice: int) -> None:
    if isinstance(node, ast.Compare):
        node.ops[choice] = _COMPARISONS[type(node.ops[choice])]()
    elif isinstance(node, ast.BinOp | ast.AugAssign):
        node.op = _OPERATORS[type(node.op)]()
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        node.value += 1 if choice else -1
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        node.func.id = _CALLS[node.func.id]
    elif isinstance(node, ast.If | ast.While):
        node.test = ast.UnaryOp(ast.Not(), node.test) if isinstance(node, ast.If) else node.test
        if isinstance(node, ast.While):
            node.test = ast.Constant(False)
    elif isinstance(node, ast.BoolOp):
        node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
