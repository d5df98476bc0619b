import json

import pytest
import typer
from typer.testing import CliRunner

from m1.cli_sandbox import app
from m1.cli_sandbox_swe import register
from m1.sandbox import bubblewrap
from m1.types import M1Error

pytestmark = pytest.mark.skipif(
    bubblewrap.failure() is not None, reason=f"no sandbox here: {bubblewrap.failure()}"
)


def run(*arguments, given=""):
    return CliRunner().invoke(app, [str(part) for part in arguments], input=given)


def test_output_errors_and_status_are_those_of_the_command():
    found = run("exec", "--", "sh", "-c", "cat; echo e >&2; exit 3", given="in")
    assert (found.exit_code, found.stdout, found.stderr) == (3, "in", "e\n")


def test_the_limit_that_ended_it_is_named():
    found = run("exec", "--seconds", 1, "--", "sleep", 60)
    assert found.exit_code != 0
    assert "stopped by its limit: wall" in found.stderr


def test_a_layer_is_there_and_not_changed(tmp_path):
    (tmp_path / "f").write_text("lower")
    layer = f"/work={tmp_path}"
    found = run("exec", "--layer", layer, "--", "sh", "-c", "cat f; echo x > f")
    assert (found.exit_code, found.stdout) == (0, "lower")
    assert (tmp_path / "f").read_text() == "lower"


def test_mistakes_are_errors_with_a_remedy():
    for arguments, text in (
        (("exec", "--layer", "/work", "--", "true"), "must be /path/inside=folder"),
        (("exec", "--backend", "docker", "--", "true"), "there are bubblewrap"),
        (("gc", "--backend", "kubernetes", "--kubeconfig", "/missing"), "set KUBECONFIG"),
    ):
        found = run(*arguments)
        assert isinstance(found.exception, M1Error)
        assert text in str(found.exception)
    assert run("exec", "--seconds", "0", "--", "true").exit_code == 2


def test_a_build_of_nothing_says_what_to_write(tmp_path):
    commands = typer.Typer()
    register(commands)
    pairs = tmp_path / "pairs.json"
    for text, remedy in ((None, "check the path"), ("[]", 'pairs such as {"package": "parse", ')):
        if text is not None:
            pairs.write_text(text)
        found = CliRunner().invoke(commands, ["build", str(pairs), str(tmp_path / "out")])
        assert isinstance(found.exception, M1Error)
        assert remedy in str(found.exception)


def test_garbage_collection_says_how_much():
    assert run("gc").stdout.startswith("removed ")


def test_the_doctor_opens_a_sandbox_and_names_what_is_missing():
    states = json.loads(run("doctor", "--kubeconfig", "/missing", "--json").stdout)
    found = {state["backend"]: state for state in states}
    assert found["bubblewrap"]["is_usable"]
    assert 0 < found["bubblewrap"]["start_seconds"] < 60
    assert not found["kubernetes"]["is_usable"]
    assert "KUBECONFIG" in found["agent-sandbox"]["detail"]
