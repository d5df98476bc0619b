"""Verdicts on patches of our own small project, honest ones and others."""

import contextlib
import json
import os
import subprocess
import sys

import pytest

from m1.sandbox import bubblewrap
from m1.sandbox.local import BubblewrapBackend
from m1.swe import diffs, python, sample
from m1.swe.builder import Rejected, build_releases
from m1.swe.building import Outcome, write_outcome
from m1.swe.grade import grade, localise, reward
from m1.swe.mutation import build_mutant, choose, healthy
from m1.swe.releases import Release
from m1.swe.store import EnvironmentStore
from m1.swe.suite import run_suite
from m1.swe.synthesis import grade_tests
from m1.swe.validate import validate

pytestmark = pytest.mark.skipif(
    bubblewrap.failure() is not None, reason=f"no sandbox here: {bubblewrap.failure()}"
)


@pytest.fixture(scope="module")
def backend():
    return BubblewrapBackend()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return EnvironmentStore(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def instance(store, backend):
    return build_releases(sample.release("0.1.0"), sample.release("0.1.1"), store, backend).instance


BASE = sample.release("0.1.0").files
GOLD = sample.release("0.1.1").files


def patch_with(code: str = "", **files: str) -> str:
    """The base tree with code behind its module, and with further files."""
    new = {"ranges.py": BASE["ranges.py"] + b"\n" + code.encode()}
    new |= {
        name.replace("__DOT__", ".").replace("__IN__", "/"): text.encode()
        for name, text in files.items()
    }
    old = {name: BASE[name] for name in new if name in BASE}
    return diffs.tree_diff(old, new)


def test_the_instance_has_what_the_two_releases_show(instance):
    assert sorted(t.rpartition("::")[2] for t in instance.fail_to_pass) == [
        "test_a_range_includes_its_end",
        "test_runs_are_joined",
        "test_what_is_written_reads_back",
    ]
    assert len(instance.pass_to_pass) == 6
    assert "1-3" in instance.problem_statement
    assert not any(
        line.strip() in instance.problem_statement
        for line in ("start = index", "numbers.update(range(int(first), int(last) + 1))")
    )


def test_the_tree_is_one_commit_and_holds_no_newer_test(instance, store):
    tree = store.folder("trees", instance.environment.tree)
    log = subprocess.run(
        ["git", "-c", "safe.directory=*", "log", "--all", "--format=%H"],
        cwd=tree,
        capture_output=True,
        text=True,
        check=True,
    )
    assert log.stdout.split() == [instance.base_commit]
    assert (tree / "tests/test_ranges.py").read_bytes() == BASE["tests/test_ranges.py"]


def test_gold_resolves_and_nothing_does_not(instance, store, backend):
    gold = grade(instance, instance.patch, store, backend)
    assert gold.resolved and gold.f2p_rate == gold.p2p_rate == 1.0
    empty = grade(instance, "", store, backend)
    assert not empty.resolved and empty.f2p_rate == 0.0 and empty.p2p_rate == 1.0
    assert empty.is_empty and not empty.masked and not empty.problems


def test_a_solution_may_use_the_library_as_it_likes(instance, store, backend):
    extra = (
        b"\nimport collections, enum, logging, typing\n"
        b"P = collections.namedtuple('P', 'a')\nT = typing.TypeVar('T')\n"
        b"E = enum.Enum('E', 'x')\nlogging.getLogger(__name__).warning('loaded')\n"
    )
    new = {"ranges.py": GOLD["ranges.py"] + extra}
    found = grade(instance, diffs.tree_diff({"ranges.py": BASE["ranges.py"]}, new), store, backend)
    assert found.resolved, found.problems


def test_half_of_the_solution_gets_partial_credit_only(instance, store, backend):
    half = BASE["ranges.py"].replace(b"int(last))", b"int(last) + 1)")
    patch = diffs.tree_diff({"ranges.py": BASE["ranges.py"]}, {"ranges.py": half})
    found = grade(instance, patch, store, backend)
    assert not found.resolved and found.f2p_rate == pytest.approx(1 / 3)
    assert reward(found, "all_or_nothing") == 0.0 == reward(found, "regressions_negative")
    assert reward(found, "partial_credit") == pytest.approx(1 / 6)


def test_a_regression_is_negative_where_the_policy_says_so(instance, store, backend):
    found = grade(instance, patch_with("def count(text):\n    return 0\n"), store, backend)
    assert found.p2p_rate < 1.0
    assert reward(found, "regressions_negative") == -1.0


RESULTS = "<testsuite tests='9' failures='0'/>"
HOOK = """
import pytest
@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    result = yield
    result.get_result().outcome = "passed"
"""
FORGE = """
import json, os, re
def _forge(text):
    function = re.search(r"_m1_[0-9a-f]+", text).group(0)
    name = None
    for line in text.splitlines():
        name = next(iter(re.findall(r"def (test_\\w+)", line)), name)
        for secret in re.findall(function + r'\\("(\\w+)"\\)', line):
            test = "tests/test_ranges.py::" + name
            for record in (
                {"k": "start", "id": test},
                {"k": "report", "id": test, "when": "setup", "outcome": "passed"},
                {"k": "proof", "secret": secret},
                {"k": "report", "id": test, "when": "call", "outcome": "passed"},
                {"k": "report", "id": test, "when": "teardown", "outcome": "passed"},
                {"k": "finish", "id": test},
            ):
                os.write(200, json.dumps(record).encode() + b"\\n")
    os.write(200, b'{"k": "end", "rc": 0, "changed": []}\\n')
    os._exit(0)
"""
ATTACKS = {
    "prints results": patch_with(
        "print('9 passed')\nimport sys\nsys.__stdout__.write('PASSED\\n')"
    ),
    "edits the tests": diffs.tree_diff(
        {"tests/test_ranges.py": BASE["tests/test_ranges.py"]},
        {"tests/test_ranges.py": b"def test_a_range_includes_its_end():\n    pass\n"},
    ),
    "adds a conftest": patch_with("", conftest__DOT__py=HOOK, tests__IN__conftest__DOT__py=HOOK),
    "adds settings and a plugin": patch_with(
        "", pytest__DOT__ini="[pytest]\naddopts = -p evil\n", evil__DOT__py=HOOK
    ),
    "adds an entry point": patch_with(
        "",
        evil__DOT__py=HOOK,
        **{
            "evil__DOT__egg-info__IN__entry_points__DOT__txt": "[pytest11]\nevil = evil\n",
            "evil__DOT__egg-info__IN__PKG-INFO": "Name: evil\nVersion: 1\n",
        },
    ),
    "adds sitecustomize": patch_with("", sitecustomize__DOT__py="import os\nos._exit(0)\n"),
    "stands before pytest": patch_with("", pytest__DOT__py="raise SystemExit(0)\n"),
    "stands before a module": patch_with("", json__DOT__py="raise SystemExit(0)\n"),
    "leaves at once": patch_with("import os\nos._exit(0)"),
    "leaves by exception": patch_with("raise SystemExit(0)"),
    "leaves from a thread": patch_with(
        "import os, threading, time\n"
        "threading.Thread(target=lambda: (time.sleep(0.05), os._exit(0))).start()\ntime.sleep(0.2)"
    ),
    "writes result files": patch_with(
        "for p in ('out.xml', '/tmp/out.xml', '/work/out.json'):\n"
        f"    open(p, 'w').write({RESULTS!r})"
    ),
    "replaces outcomes": patch_with(
        "import _pytest.reports as r\n"
        "r.TestReport.outcome = property(lambda s: 'passed', lambda s, v: None)"
    ),
    "replaces the call": patch_with(
        "import _pytest.python as p\np.Function.runtest = lambda self: None"
    ),
    "exchanges the call's code": patch_with(
        "import _pytest.python as p\np.Function.runtest.__code__ = (lambda self: None).__code__"
    ),
    "swallows exceptions": patch_with(
        "import _pytest.runner as r\n"
        "make = r.TestReport.from_item_and_call\n"
        "def forget(item, call):\n    call.excinfo = None\n    return make(item, call)\n"
        "r.TestReport.from_item_and_call = forget"
    ),
    "equals everything": patch_with(
        "import pytest, contextlib\npytest.raises = lambda *a, **k: contextlib.suppress(Exception)"
    ),
    "kills the supervisor": patch_with("import os\nos.kill(os.getppid(), 9)"),
    "opens the supervisor's files": patch_with(
        "import os\n"
        "for n in range(20):\n"
        "    try:\n        open(f'/proc/{os.getppid()}/fd/{n}', 'w').write('{}')\n"
        "    except OSError:\n        pass\n"
        "os._exit(0)"
    ),
    "forges records without secrets": patch_with(
        FORGE + '_forge(\'_m1_0("x")\\ndef test_a_range_includes_its_end\\n_m1_0("x")\')'
    ),
    "forges records with secrets it read": patch_with(
        FORGE + "_forge(open('tests/test_ranges.py').read())"
    ),
    "has another process read them": patch_with(
        FORGE + "import subprocess\n"
        "_forge(subprocess.check_output(['cat', 'tests/test_ranges.py'], text=True))"
    ),
    "makes a link": "diff --git a/tests/x b/tests/x\nnew file mode 120000\n"
    "--- /dev/null\n+++ b/tests/x\n@@ -0,0 +1 @@\n+/etc/passwd\n\\ No newline at end of file\n",
    "leaves the tree": "--- /dev/null\n+++ b/../../tmp/x\n@@ -0,0 +1 @@\n+x\n",
    "is no patch": "please\n",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_patch_that_mends_nothing_resolves_nothing(attack, instance, store, backend):
    found = grade(instance, ATTACKS[attack], store, backend, test_seconds=10)
    assert not found.resolved and found.f2p_rate == 0.0
    assert found.infra_error is None and not found.masked
    assert reward(found) == 0.0


def test_a_test_that_never_ends_is_a_failure_and_the_others_are_still_judged(
    instance, store, backend
):
    endless = BASE["ranges.py"].replace(
        b"    parts = []\n", b"    while numbers:\n        pass\n    parts = []\n"
    )
    patch = diffs.tree_diff({"ranges.py": BASE["ranges.py"]}, {"ranges.py": endless})
    run = run_suite(instance.environment, store, backend, patch=patch, test_seconds=4.0)
    states = [o.outcome for o in run.tests.values()]
    assert states.count("timeout") == 2 and states.count("passed") == 6
    assert not run.problems, run


@pytest.mark.parametrize("ending", ["os.abort()", "os._exit(0)"])
def test_a_crash_fails_its_test_and_leaving_fails_all(ending, instance, store, backend):
    # Tests after it would begin with fresh modules, and one may fail only after others.
    test = f"import os\n\ndef test_a():\n    pass\n\ndef test_b():\n    {ending}\n\n"
    test += "def test_c():\n    pass\n"
    files = {"tests/test_ranges.py": test.encode()}
    run = run_suite(instance.environment, store, backend, tests=files)
    passed = [t.rpartition("::")[2] for t in run.tests if run.passed(t)]
    if ending == "os.abort()":
        assert passed == ["test_a", "test_c"] and not run.problems
        assert run.tests["tests/test_ranges.py::test_b"].outcome == "crash"
    else:
        assert passed == [] and "ended early" in run.problems[0]


def test_an_absent_layer_is_our_failure_and_masks(instance, store, backend):
    class Broken:
        name = "bubblewrap"

        def open(self, environment=None, *, limits=None):
            raise OSError("no space left")

    found = grade(instance, instance.patch, store, Broken())
    assert found.infra_error and found.masked and not found.resolved
    assert reward(found) is None


def test_validation_accepts_the_instance_and_quarantines_wrong_ones(instance, store, backend):
    assert validate(instance, store, backend, num_runs=2).is_valid
    swapped = instance.model_copy(
        update={
            "fail_to_pass": instance.pass_to_pass[:1],
            "pass_to_pass": instance.fail_to_pass[:1],
        }
    )
    found = validate(swapped, store, backend, num_runs=1)
    assert not found.is_valid
    assert [r.partition(":")[0] for r in found.reasons] == ["passes on base", "fails on base"]


def test_a_flaky_test_is_found(instance, store, backend):
    flaky = GOLD["tests/test_ranges.py"] + (
        b"\n\ndef test_flaky():\n    import os\n    assert os.urandom(1)[0] % 2\n"
    )
    environment = instance.environment.model_copy(
        update={"tests": store.tests({"tests/test_ranges.py": flaky})}
    )
    wrong = instance.model_copy(
        update={
            "environment": environment,
            "pass_to_pass": (*instance.pass_to_pass, "tests/test_ranges.py::test_flaky"),
        }
    )
    found = validate(wrong, store, backend, num_runs=7)
    assert not found.is_valid  # all 14 runs agree once in 8,192 times
    assert any("test_flaky" in reason for reason in found.reasons)


def test_clock_hashes_and_time_zone_are_the_same_in_every_run(instance, store, backend):
    test = b"""
import os, time, datetime

def test_frozen():
    assert 0 <= time.time() - 1_700_000_000 < 300
    assert datetime.datetime.now().year == 2023
    assert time.tzname[0] == "UTC" and os.environ["TZ"] == "UTC"
    assert hash("m1") == %d
""" % int(
        subprocess.run(
            [sys.executable, "-c", "print(hash('m1'))"],
            env={"PYTHONHASHSEED": "0"},
            capture_output=True,
            check=True,
        ).stdout
    )
    run = run_suite(
        instance.environment,
        store,
        backend,
        tests={"tests/test_frozen.py": test},
        files=["tests/test_frozen.py"],
    )
    assert [o.outcome for o in run.tests.values()] == ["passed"], run


def test_a_test_of_subtests_reaches_its_last_line_or_fails(instance, store, backend):
    test = b"""
import unittest

class Tests(unittest.TestCase):
    def test_passing(self):
        for number in range(3):
            with self.subTest(number=number):
                self.assertLess(number, 3)

    def test_one_fails(self):
        for number in range(3):
            with self.subTest(number=number):
                self.assertLess(number, 2)

    def test_one_is_skipped(self):
        for number in range(2):
            with self.subTest(number=number):
                if number:
                    self.skipTest("no")
"""
    name = "tests/test_subtests.py"
    run = run_suite(instance.environment, store, backend, tests={name: test}, files=[name])
    found = {t.rpartition("::")[2]: (o.outcome, o.is_proven) for t, o in run.tests.items()}
    assert found["test_passing"] == ("passed", True)
    assert found["test_one_fails"][0] == "failed"
    assert found["test_one_is_skipped"] == ("passed", True)
    assert run.problems == ()


def test_places_are_graded_against_the_solution(instance, store):
    found = localise(
        instance, store, files=["ranges.py", "setup.py"], functions=["ranges.py::parse"]
    )
    assert found.gold_functions == ("ranges.py::parse", "ranges.py::write")
    assert (found.file_recall, found.file_precision) == (1.0, 0.5)
    assert (found.function_recall, found.function_precision) == (0.5, 1.0)


def test_written_tests_must_fail_before_pass_after_and_notice_mutants(instance, store, backend):
    good = (
        b"from ranges import parse, write\n\n\ndef test_it():\n"
        b"    assert parse('1-3') == [1, 2, 3]\n    assert write([1, 2, 4]) == '1-2,4'\n"
    )
    found = grade_tests(instance, {"tests/test_new.py": good}, store, backend, num_mutants=3)
    assert found.is_valid and found.num_mutants == 3 and found.mutation_score == 1.0
    blind = grade_tests(
        instance,
        {"tests/test_new.py": b"def test_it():\n    assert True\n"},
        store,
        backend,
        num_mutants=2,
    )
    assert not blind.is_valid and blind.passes_on_gold and blind.mutation_score == 0.0


def test_a_mutant_of_the_healthy_release_becomes_an_instance(store, backend):
    package = healthy(sample.release("0.1.1"), store, backend)
    built = None
    for mutation in choose(package.release, seed=1):
        with contextlib.suppress(Rejected):  # not every one is noticed
            built = build_mutant(package, mutation, store, backend)
            break
    assert built is not None
    found = built.instance
    assert grade(found, found.patch, store, backend).resolved
    assert not grade(found, "", store, backend).resolved
    fixed = diffs.apply(found.patch, store.read("trees", found.environment.tree))
    assert fixed["ranges.py"] == GOLD["ranges.py"]


def test_our_own_interpreter_is_copied_where_the_system_has_none(
    instance, store, backend, monkeypatch
):
    monkeypatch.setattr(python, "_system_python", lambda: None)
    assert grade(instance, instance.patch, store, backend).resolved


def test_the_commands_validate_and_grade_what_was_built(instance, store, m1, tmp_path):
    write_outcome(store.root, Outcome(instances=[instance]), store)
    gold = tmp_path / "gold.patch"
    gold.write_text(instance.patch)
    file = store.root / "instances" / f"{instance.instance_id}.json"
    graded = m1("sandbox", "grade", str(file), str(gold), "--json")
    assert graded.returncode == 0, graded.stderr
    record = json.loads(graded.stdout)
    assert record["resolved"] is True and record["reward"] == 1.0
    valid = m1("sandbox", "validate", str(store.root / "instances.jsonl"), "--runs", "1", "--json")
    assert valid.returncode == 0 and json.loads(valid.stdout)[0]["is_valid"]
    absent = m1("sandbox", "grade", f"{store.root / 'instances.jsonl'}::other", os.devnull)
    assert absent.returncode == 1 and "no instance other" in absent.stderr
    unknown = m1("sandbox", "grade", str(file), str(gold), "--backend", "docker")
    assert unknown.returncode == 1 and "no backend 'docker'" in unknown.stderr


def test_disk_use_counts_what_layers_share_once(store, instance):
    use = store.disk_use()
    assert use["total"] == sum(v for k, v in use.items() if k != "total") > 0
    assert use["tests"] == 0  # links to blobs


def test_releases_without_tests_or_change_are_rejected(store, backend):
    new = sample.release("0.1.1")
    bare = Release(new.sdist, {n: d for n, d in new.files.items() if not n.startswith("tests/")})
    with pytest.raises(Rejected, match="no tests"):
        build_releases(sample.release("0.1.0"), bare, store, backend)
