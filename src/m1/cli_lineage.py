"""`m1 lineage`: where an output came from, and what was made of it."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.tree import Tree

from m1.config.schema import TrackingConfig
from m1.profiles import Profile
from m1.services import Services, environment_of
from m1.tracking.chain import Chain, follow, lineage_of
from m1.tracking.lineage import tracking_uri
from m1.tracking.page import lineage_page
from m1.tracking.store import without_secret
from m1.types import M1Error, Pointer


def lineage(
    target: Annotated[
        str,
        typer.Argument(
            help="Address of an output or pointer, an MLflow model id, or models:/NAME@ALIAS."
        ),
    ],
    root: Annotated[Path, typer.Option(help="Run root; its mlflow.db is asked.")] = Path("runs"),
    profile: Annotated[Profile, typer.Option(envvar="M1_PROFILE")] = Profile.LAPTOP,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page that draws it.")] = None,
) -> None:
    """Print an output's chain back to code, config, data and images, and forward to scores."""
    if profile is Profile.ONE_MACHINE:
        with environment_of(Services(root)):
            chain, uri = _follow(target, root)
    else:
        chain, uri = _follow(target, root)
    if html is not None:
        html.write_text(_page(chain, uri))
    if as_json:
        typer.echo(json.dumps(chain.as_dict(), indent=2))
    else:
        _show(chain)


def _follow(target: str, root: Path) -> tuple[Chain, str]:
    uri = tracking_uri(TrackingConfig(), root)
    database = uri.removeprefix("sqlite:///")
    if uri.startswith("sqlite:///") and not Path(database).exists() and "stages/" not in target:
        raise M1Error(f"there is no lineage store at {database}; pass --root or --profile")
    return follow(target, uri=uri), uri


def _show(chain: Chain) -> None:
    console = Console(soft_wrap=True)
    tree = Tree(_title(chain.target), guide_style="dim")
    for version in chain.versions:
        tree.add(f"registered as {version}")
    for _, benchmark, score in chain.evaluations:
        tree.add(f"{benchmark}: {score['mean']:.3f} [{score['low']:.3f}, {score['high']:.3f}]")
    came = tree.add("made of")
    for stage, pointer in reversed(list(chain.back.items())):
        place = came if stage == chain.target.stage else came.add(_title(pointer))
        for line in _origin(pointer):
            place.add(line)
    if chain.forward:
        made = tree.add("made of it")
        for pointer in chain.forward.values():
            made.add(_title(pointer))
    console.print(tree)


def _title(pointer: Pointer) -> str:
    model = pointer.metadata.get("model_id")
    names = [f"[bold]{pointer.stage}[/] {pointer.stage_hash[:12]}", pointer.uri]
    return "  ".join([*names, f"model {model}"] if model else names)


def _origin(pointer: Pointer) -> list[str]:
    found: dict[str, Any] = dict(lineage_of(pointer))
    kinds = ("code", "image", "container", "config")
    lines = [f"{kind} {found[kind]}" for kind in kinds if found.get(kind)]
    lines += [f"dataset {name} {digest}" for name, digest in found.get("datasets", {}).items()]
    run = pointer.metadata.get("mlflow_run_id")
    return [*lines, *([f"MLflow run {run}"] if run else [])]


def _page(chain: Chain, uri: str) -> str:
    forward = {pointer.stage: pointer for pointer in chain.forward.values()}
    target = chain.target
    summary = {
        "recipe": f"{target.stage} {target.stage_hash[:12]}",
        "recipe_hash": target.stage_hash,
        "git_commit": str(lineage_of(target).get("code", "")),
    }
    run_id = str(target.metadata.get("mlflow_run_id", ""))
    return lineage_page(
        {**chain.back, **forward}, summary=summary, tracking=without_secret(uri), run_id=run_id
    )
