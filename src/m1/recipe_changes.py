"""What a change in git does to recipes: which are valid, which stages re-run, what that costs."""

import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from m1.config.loading import RecipeError, load_recipe
from m1.config.recipe_diff import StageChange, explain_diff
from m1.config.schema import Recipe
from m1.config.stages import stage_kind, stages_of
from m1.plan.report import Options, make_plan
from m1.types import M1Error

RECIPES = "pipelines/recipes/*.toml"
_WITH_COST = ("pretrain", "sft", "rl")
_MAX_REASONS = 6


@dataclass(frozen=True)
class StageCost:
    """What a stage costs by `m1 plan`, in dollars; None where the recipe lacks it."""

    before: float | None
    after: float | None


@dataclass(frozen=True)
class RecipeChange:
    """One recipe file between two commits."""

    path: str
    mistake: str = ""
    """Why it cannot be loaded; empty: it can."""
    is_removed: bool = False
    recipe: Recipe | None = None
    """As it is after the change."""
    stages: tuple[StageChange, ...] = ()
    costs: tuple[tuple[str, StageCost], ...] = ()

    @property
    def dollars(self) -> float:
        """Cost of the stages that run again."""
        again = {s.stage for s in self.stages if s.status in ("changes", "added")}
        return sum(cost.after or 0.0 for stage, cost in self.costs if stage in again)


def recipe_changes(
    base: str, head: str, *, folder: Path, pattern: str = RECIPES
) -> tuple[RecipeChange, ...]:
    """Every recipe file that differs between two commits.

    Args:
        base: The commit to start from; a branch that has gone on meanwhile counts from where the
            two parted.
        head: The commit with the change.
        folder: The checkout.
        pattern: Files that are recipes, as git's glob.

    Raises:
        M1Error: git does not know a commit.
    """
    listed = _git(
        folder, "diff", "--name-only", "--no-renames", "-z", f"{base}...{head}", "--",
        f":(glob){pattern}",
    )  # fmt: skip
    start = _git(folder, "merge-base", base, head).strip()
    paths = [path for path in listed.split("\0") if path]
    return tuple(_change(path, start, head, folder) for path in paths)


def report(changes: Iterable[RecipeChange]) -> str:
    """The changes as Markdown, for a comment on a pull request."""
    parts = [_section(change) for change in changes]
    if not parts:
        return "No recipe changes.\n"
    return "## Recipes\n\n" + "\n".join(parts)


def to_submit(changes: Iterable[RecipeChange]) -> list[Recipe]:
    """Recipes that a merge submits.

    Raises:
        M1Error: One of the changed recipes cannot be loaded.
    """
    found = []
    for change in changes:
        if change.mistake:
            raise M1Error(f"{change.path} cannot be submitted: {change.mistake}")
        if change.recipe is not None and change.recipe.ci.submit:
            found.append(change.recipe)
    return found


def _change(path: str, base: str, head: str, folder: Path) -> RecipeChange:
    after = _text(folder, head, path)
    if after is None:
        return RecipeChange(path, is_removed=True)
    try:
        new = _load(after, path)
    except RecipeError as error:
        return RecipeChange(path, mistake=str(error))
    before = _text(folder, base, path)
    try:
        old = _load(before, path) if before is not None else None
    except RecipeError:  # it did not load before either: everything is new
        old = None
    stages = (
        explain_diff(old, new)
        if old is not None
        else tuple(StageChange(stage, "added") for stage in stages_of(new))
    )
    return RecipeChange(path, recipe=new, stages=stages, costs=_costs(old, new))


def _costs(old: Recipe | None, new: Recipe) -> tuple[tuple[str, StageCost], ...]:
    names = dict.fromkeys([*(stages_of(old) if old else ()), *stages_of(new)])
    return tuple(
        (name, StageCost(_dollars(old, name), _dollars(new, name)))
        for name in names
        if stage_kind(name) in _WITH_COST
    )


def _dollars(recipe: Recipe | None, stage: str) -> float | None:
    if recipe is None or stage not in stages_of(recipe):
        return None
    return make_plan(recipe, Options(stage=stage)).cost.dollars


def _section(change: RecipeChange) -> str:
    title = f"### `{change.path}`\n\n"
    if change.mistake:
        return f"{title}Invalid:\n\n```\n{change.mistake}\n```\n"
    if change.is_removed:
        return f"{title}Removed.\n"
    costs = dict(change.costs)
    lines = ["| stage | re-runs | why | before | after |", "|---|---|---|---:|---:|"]
    for stage in change.stages:
        cost = costs.get(stage.stage, StageCost(None, None))
        runs = {"unchanged": "no", "removed": "removed"}.get(stage.status, "**yes**")
        lines.append(
            f"| {stage.stage} | {runs} | {_reasons(stage)} | {_money(cost.before)} | "
            f"{_money(cost.after)} |"
        )
    return title + "\n".join(lines) + "\n\n" + _verdict(change)


def _verdict(change: RecipeChange) -> str:
    before = sum(cost.before or 0.0 for _, cost in change.costs)
    after = sum(cost.after or 0.0 for _, cost in change.costs)
    submits = change.recipe is not None and change.recipe.ci.submit
    sign = "+" if after >= before else "-"
    return (
        f"Whole recipe by `m1 plan`: {_money(before)} -> {_money(after)} "
        f"({sign}{_money(abs(after - before))}); the stages that re-run cost "
        f"{_money(change.dollars)}. A merge {'submits it' if submits else 'does not submit it'} "
        "(`ci.submit`).\n"
    )


def _reasons(stage: StageChange) -> str:
    fields = [f"`{f.path}`: {_cell(f.old)} -> {_cell(f.new)}" for f in stage.fields]
    if len(fields) > _MAX_REASONS:
        fields = [*fields[:_MAX_REASONS], f"{len(fields) - _MAX_REASONS} more"]
    if stage.parents:
        fields.append(f"after {', '.join(stage.parents)}")
    return "<br>".join(fields) or ("new" if stage.status == "added" else "")


def _cell(value: object) -> str:
    text = "absent" if value is None or not isinstance(value, bool | int | float | str) else value
    return str(text).replace("|", "\\|").replace("\n", " ")[:60]


def _money(dollars: float | None) -> str:
    if dollars is None:
        return ""
    return f"${dollars:,.0f}" if dollars >= 10 else f"${dollars:.2g}"


def _load(text: str, path: str) -> Recipe:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / Path(path).name
        file.write_text(text, encoding="utf-8")
        try:
            return load_recipe([file])
        except RecipeError as error:
            raise RecipeError(path, error.mistakes) from None


def _text(folder: Path, commit: str, path: str) -> str | None:
    done = subprocess.run(
        ["git", "-C", str(folder), "show", f"{commit}:{path}"],
        capture_output=True,
        check=False,
    )
    return done.stdout.decode("utf-8", errors="replace") if done.returncode == 0 else None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise M1Error(
            f"git {arguments[0]} failed: {done.stderr.strip()}; in CI fetch the whole history"
        )
    return done.stdout
