"""The five given pairs of releases: built from the package index, validated, and graded."""

import json
from importlib.resources import files
from pathlib import Path

import pytest
from hostile_patches import hostile_patches

from m1.sandbox import bubblewrap
from m1.sandbox.local import BubblewrapBackend
from m1.swe.builder import Pair
from m1.swe.building import Outcome, build_rows, is_reachable, read_rows, write_outcome
from m1.swe.grade import grade, reward
from m1.swe.releases import PackageIndex
from m1.swe.store import EnvironmentStore

pytestmark = pytest.mark.skipif(
    bubblewrap.failure() is not None, reason=f"no sandbox here: {bubblewrap.failure()}"
)
# Package, base version, tests that fail before, tests that pass before and after: as given.
GIVEN = (
    ("xmltodict", "0.14.1", 2, 58),
    ("parse", "1.20.0", 2, 46),
    ("parse", "1.20.1", 2, 94),
    ("sqlparse", "0.5.1", 1, 62),
    ("tomlkit", "0.13.0", 2, 59),
)
ATTACKS = (
    "prints PASSED lines",
    "edits the tests",
    "adds a conftest",
    "exits with 0 at once",
    "exits with 0 while tests run",
    "monkeypatches pytest",
    "writes result files",
)


def marked(pair):
    """A parameter; all but the first pair are left to the exhaustive run."""
    marks = () if pair == GIVEN[0] else (pytest.mark.exhaustive,)
    return pytest.param(pair, marks=marks, id="-".join(map(str, pair[:2])))


@pytest.fixture(scope="module", params=map(marked, GIVEN))
def pair(request):
    return request.param


@pytest.fixture(scope="module")
def local():
    return BubblewrapBackend()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = EnvironmentStore(tmp_path_factory.mktemp("pairs"))
    if not is_reachable(PackageIndex(store.archives), GIVEN[0][0]):
        pytest.skip("no package index answers, from which the releases would come")
    return store


@pytest.fixture(scope="module")
def instance(pair, store, local):
    package, version = pair[:2]
    rows = [
        row
        for row in read_rows(Path(str(files("m1.swe").joinpath("index.json"))))
        if isinstance(row, Pair) and (row.package, row.base_version) == (package, version)
    ]
    num_runs = 3 if pair != GIVEN[0] else 1  # three on each side take a while
    outcome = build_rows(rows, store, local, num_runs=num_runs)
    assert not outcome.rejects
    return outcome.instances[0]


def check_verdicts(instance, store, backend):
    gold = grade(instance, instance.patch, store, backend)
    assert gold.resolved and gold.f2p_rate == gold.p2p_rate == 1.0
    empty = grade(instance, "", store, backend)
    assert not empty.resolved and empty.f2p_rate == 0.0 and empty.p2p_rate == 1.0


def check_refusal(attack, instance, store, backend):
    found = grade(instance, hostile_patches(instance, store)[attack], store, backend)
    assert found.is_patch_applied and found.infra_error is None and not found.masked
    assert not found.resolved and found.f2p_rate == 0.0 and reward(found) == 0.0


def test_a_given_pair_has_the_tests_that_were_given(instance, pair):
    assert (len(instance.fail_to_pass), len(instance.pass_to_pass)) == pair[2:]


def test_gold_resolves_a_given_pair_and_nothing_does_not(instance, store, local):
    check_verdicts(instance, store, local)


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_patch_resolves_no_given_pair(attack, instance, store, local):
    check_refusal(attack, instance, store, local)


@pytest.mark.cluster
@pytest.mark.exhaustive
def test_gold_resolves_a_given_pair_in_a_cluster(instance, store, kubernetes_backend):
    check_verdicts(instance, store, kubernetes_backend)


@pytest.mark.cluster
@pytest.mark.exhaustive
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_patch_resolves_no_given_pair_in_a_cluster(
    attack, instance, store, kubernetes_backend
):
    check_refusal(attack, instance, store, kubernetes_backend)


@pytest.mark.cluster
@pytest.mark.exhaustive
def test_the_command_grades_in_a_cluster(
    instance, store, cluster, kubernetes_backend, m1, tmp_path
):
    write_outcome(store.root, Outcome(instances=[instance]), store)
    gold = tmp_path / "gold.patch"
    gold.write_text(instance.patch)
    file = store.root / "instances" / f"{instance.instance_id}.json"
    where = ("--backend", "kubernetes", "--kubeconfig", cluster.kubeconfig)
    graded = m1("sandbox", "grade", str(file), str(gold), "--json", *where)
    assert graded.returncode == 0, graded.stderr
    assert json.loads(graded.stdout)["resolved"] is True
