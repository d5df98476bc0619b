"""`m1 sandbox build | validate | grade`: software engineering tasks, from releases to verdicts."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from m1.types import M1Error

if TYPE_CHECKING:
    from m1.sandbox.farm.leasing import Farm
    from m1.swe.instance import Instance
    from m1.swe.store import EnvironmentStore
    from m1.swe.validate import Validation

METRICS_VARIABLE = "M1_SANDBOX_METRICS_PORT"
"""Port at which these commands serve their farm's metrics."""

Runs = Annotated[int, typer.Option(min=1, help="Runs of base and of gold, each in a new sandbox.")]
Parallel = Annotated[int, typer.Option(min=1, help="Instances worked on at once.")]
TestSeconds = Annotated[float, typer.Option(min=0.1, help="After which a single test is killed.")]
Find = Annotated[
    list[str] | None,
    typer.Option(help="Also try neighbouring releases of this package; may be repeated."),
]
Mutants = Annotated[
    list[str] | None,
    typer.Option(help="Also break this release, as NAME==VERSION; may be repeated."),
]


BackendName = Annotated[
    str, typer.Option(help="bubblewrap | kubernetes | agent-sandbox; what runs the tests.")
]
Namespace = Annotated[str, typer.Option(help="Of the cluster.")]
Kubeconfig = Annotated[str | None, typer.Option(help="File; otherwise KUBECONFIG or the pod's.")]
Image = Annotated[
    str, typer.Option(help="OCI image with git and this Python, in a cluster; else its default.")
]


def register(app: typer.Typer) -> None:
    """Add the commands to `m1 sandbox`."""
    app.command()(build)
    app.command(name="validate")(validate_)
    app.command(name="grade")(grade_)


def build(
    pairs: Annotated[Path, typer.Argument(help="JSON array of pairs of releases and mutations.")],
    out: Annotated[Path, typer.Argument(help="Folder for instances and their environments.")],
    runs: Runs = 3,
    parallel: Parallel = 1,
    test_seconds: TestSeconds = 60.0,
    find: Find = None,
    max_pairs: Annotated[int, typer.Option(help="Pairs tried for each package found.")] = 10,
    mutants: Mutants = None,
    num_mutants: Annotated[int, typer.Option(help="Valid mutants wanted of each release.")] = 5,
    seed: Annotated[int, typer.Option(help="Of the choice of mutations.")] = 1,
    backend: BackendName = "bubblewrap",
    namespace: Namespace = "m1-sandbox",
    kubeconfig: Kubeconfig = None,
    image: Image = "",
) -> None:
    """Build instances from source releases of a package index, and keep those that validate."""
    from m1.swe import building, finding
    from m1.swe.store import EnvironmentStore

    console = Console(stderr=True)
    store = EnvironmentStore(out)

    def report(name: str, what: str) -> None:
        console.print(f"{name}: {what}", markup=False, highlight=False, soft_wrap=True)

    rows = building.read_rows(pairs)
    if not (rows or find or mutants):
        raise M1Error(
            f"{pairs} holds no row, so there is nothing to build; add pairs such as "
            '{"package": "parse", "base_version": "1.20.0", "fix_version": "1.20.1"}, '
            "or give --find or --mutants"
        )
    search = finding.Search(
        packages=tuple(find or ()),
        max_pairs=max_pairs,
        releases=tuple(mutants or ()),
        num_mutants=num_mutants,
        seed=seed,
        num_runs=runs,
        test_seconds=min(test_seconds, 20.0),
    )
    with _farm(backend, namespace, kubeconfig, image, parallel) as farm:
        outcome = building.build_rows(
            rows,
            store,
            farm,
            num_runs=runs,
            num_parallel=parallel,
            test_seconds=test_seconds,
            report=report,
        )
        finding.extend(outcome, search, rows, store, farm, report=report)
    summary = building.write_outcome(out, outcome, store)
    size = summary["disk_bytes"]["total"] / 2**20
    console.print(
        f"{summary['num_instances']} instances, {summary['num_rejected']} rejected, "
        f"{size:.0f} MiB in {out}",
        soft_wrap=True,
    )
    if not outcome.instances:
        raise M1Error(f"no row of {pairs} became an instance; {out / 'rejects.json'} says why")


def validate_(
    instances: Annotated[Path, typer.Argument(help="instances.jsonl of a build, or one's .json.")],
    runs: Runs = 3,
    parallel: Parallel = 1,
    test_seconds: TestSeconds = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    backend: BackendName = "bubblewrap",
    namespace: Namespace = "m1-sandbox",
    kubeconfig: Kubeconfig = None,
    image: Image = "",
) -> None:
    """Run base and gold again, each several times; ends with status 1 unless all are valid."""
    from m1.swe.instance import read_instances
    from m1.swe.validate import validate_all

    rows = _runnable(read_instances(instances), instances)
    with _farm(backend, namespace, kubeconfig, image, parallel) as farm:
        found = validate_all(
            rows,
            _store_of(instances),
            farm,
            num_runs=runs,
            num_parallel=parallel,
            test_seconds=test_seconds,
            report=lambda v: typer.echo(f"{v.instance_id}: {_verdict(v)}", err=True),
        )
    if as_json:
        typer.echo(json.dumps([v.record() for v in found], indent=1))
    else:
        table = Table("instance", "verdict", "seconds")
        for v in found:
            table.add_row(v.instance_id, _verdict(v), f"{v.seconds:.1f}")
        Console().print(table)
    if not all(v.is_valid for v in found):
        sys.exit(1)


def grade_(
    instance: Annotated[
        str, typer.Argument(help="File of one instance, or FILE.jsonl::INSTANCE_ID.")
    ],
    patch: Annotated[str, typer.Argument(help="Unified diff to grade; - reads standard input.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    policy: Annotated[
        str, typer.Option(help="all_or_nothing, regressions_negative or partial_credit.")
    ] = "all_or_nothing",
    test_seconds: TestSeconds = 60.0,
    backend: BackendName = "bubblewrap",
    namespace: Namespace = "m1-sandbox",
    kubeconfig: Kubeconfig = None,
    image: Image = "",
) -> None:
    """Grade a patch in a fresh sandbox."""
    from m1.swe.grade import grade, reward

    path, row = find_instance(instance)
    try:
        text = sys.stdin.buffer.read() if patch == "-" else Path(patch).read_bytes()
    except OSError as error:
        raise M1Error(f"{patch} cannot be read: {error.strerror}; check the path") from None
    with _farm(backend, namespace, kubeconfig, image, 1) as farm:
        found = grade(
            row,
            text.decode("utf-8", "surrogateescape"),
            _store_of(path),
            farm,
            test_seconds=test_seconds,
        )
    record = {**found.record(), "reward": reward(found, policy)}
    if as_json:
        typer.echo(json.dumps(record, indent=1))
        return
    for name in ("instance_id", "resolved", "reward", "f2p_rate", "p2p_rate", "infra_error"):
        typer.echo(f"{name}: {record[name]}")
    for problem in found.problems:
        typer.echo(f"problem: {problem}")
    for test in found.failed[:20]:
        typer.echo(f"failed: {test}")


def _verdict(found: "Validation") -> str:
    from m1.swe.building import why

    return "valid" if found.is_valid else f"quarantined: {why(found)}"


def find_instance(name: str) -> "tuple[Path, Instance]":
    """The file and the instance that an argument names.

    Raises:
        M1Error: There is no such instance, or the file holds several and none is named.
    """
    from m1.swe.instance import read_instances

    file, _, wanted = name.partition("::")
    path = Path(file)
    rows = _runnable(read_instances(path), path)
    if wanted:
        rows = [row for row in rows if row.instance_id == wanted]
    if len(rows) != 1:
        what = f"no instance {wanted}" if wanted else f"{len(rows)} instances"
        raise M1Error(f"{path} holds {what}; write FILE::INSTANCE_ID with an id of that file")
    return path, rows[0]


def _runnable(rows: "list[Instance]", path: Path) -> "list[Instance]":
    """The rows, if their environments can be here.

    Raises:
        M1Error: One names an image only.
    """
    for row in rows:
        if not row.is_runnable:
            raise M1Error(
                f"{row.instance_id} in {path} has no environment here (image: "
                f"{row.environment.image or 'none'}); build one with m1 sandbox build, or grade it "
                "where its image is"
            )
    return rows


def _store_of(path: Path) -> "EnvironmentStore":
    from m1.swe.store import EnvironmentStore

    for folder in path.absolute().parents:
        if (folder / "trees").is_dir():
            return EnvironmentStore(folder)
    raise M1Error(
        f"no environments are beside {path} or above it; use the file where m1 sandbox build put it"
    )


@contextlib.contextmanager
def _farm(
    backend: str, namespace: str, kubeconfig: str | None, image: str, num_parallel: int
) -> "Iterator[Farm]":
    """A farm of as many sandboxes, which renews its leases in a cluster while tests run.

    Raises:
        M1Error: There is no such backend, or it cannot be used here.
    """
    from m1.sandbox.base import SandboxError
    from m1.sandbox.farm.leasing import Farm, FarmConfig
    from m1.sandbox.opening import open_backend
    from m1.sandbox.pods import ClusterConfig

    cluster = ClusterConfig(namespace=namespace, kubeconfig=kubeconfig)
    if image:
        cluster = replace(cluster, image=image)
    try:
        # Locally as strict as the machine is; a cluster must deny all traffic.
        opened = open_backend(backend, cluster=cluster, is_strict=backend != "bubblewrap")
        sizes = FarmConfig(max_sandboxes=num_parallel, metrics_port=_metrics_port())
        farm = Farm(opened, sizes)
    except SandboxError as error:
        raise M1Error(str(error)) from None
    with farm:
        yield farm


def _metrics_port() -> int | None:
    """Where a cluster's Prometheus looks for the farm's numbers; None where it is not asked for."""
    given = os.environ.get(METRICS_VARIABLE)
    if given is None:
        return None
    if not (given.isdecimal() and int(given) <= 65535):
        raise M1Error(f"{METRICS_VARIABLE} is {given!r}, but must be a port; 0 takes a free one")
    return int(given)
