"""CI on changed recipes, by its script, on a synthetic git history."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from kfp_api import SWAGGER, KfpApi

from m1.recipe_changes import recipe_changes, report, to_submit
from m1.types import M1Error

PROJECT = Path(__file__).parents[2]
LAPTOP = (PROJECT / "tests/recipes/mini.toml").read_text()
SUBMIT = LAPTOP[: LAPTOP.index("[sft]")] + "\n[ci]\nsubmit = true\n"  # a small pipeline


class History:
    """A repository whose commits change recipes; the code is this checkout's."""

    def __init__(self, folder):
        self.folder = folder
        self.git("init", "-q", "-b", "main")
        for name in ("pipelines", "components"):
            (folder / name).mkdir()
            for source in (PROJECT / name).glob("*.py"):
                (folder / name / source.name).write_text(source.read_text())
        (folder / "pipelines" / "recipes").mkdir()
        m1 = folder / "m1"
        m1.write_text(
            f'#!/bin/sh\nexec {sys.executable} -c "from m1.cli import main; main()" "$@"\n'
        )
        m1.chmod(0o755)
        self.commit(small=LAPTOP)

    def git(self, *arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
        command = ["git", "-C", str(self.folder), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def commit(self, **recipes):
        """Write, or with None remove, recipes; the commit's name."""
        for name, text in recipes.items():
            path = self.folder / "pipelines" / "recipes" / f"{name}.toml"
            path.unlink() if text is None else path.write_text(text)
        self.git("add", "-A")
        self.git("commit", "-q", "-m", "change")
        return self.git("rev-parse", "HEAD")

    def script(self, *arguments, **environment):
        return subprocess.run(
            [str(PROJECT / ".ci" / "recipes"), *arguments],
            env={
                **os.environ,
                "M1": "./m1",
                "M1_CHECKOUT": str(self.folder),
                "M1_PROJECT": str(self.folder),
                "HOME": str(self.folder),
                **environment,
            },
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture
def history(tmp_path):
    return History(tmp_path)


def test_a_pull_request_says_what_runs_again_why_and_at_what_cost(history):
    base = history.git("rev-parse", "HEAD")
    # mini's 6 pretraining steps stay; twice the RL steps cost twice.
    changed = LAPTOP.replace("num_steps = 3", "num_steps = 6")
    head = history.commit(small=changed, other=LAPTOP.replace('"mini"', '"other"'))
    comment = history.folder / "comment.md"
    done = history.script("check", base, head, str(comment))
    assert done.returncode == 0, done.stderr
    text = comment.read_text()
    assert text == done.stdout
    small = text[text.index("small.toml") :]
    rows = {
        cells[1]: cells[2:6]
        for line in small.splitlines()
        if len(cells := [cell.strip() for cell in line.split("|")]) == 7
    }
    assert rows["pretrain"][0] == "no" and rows["rl"][0] == "**yes**"
    assert rows["rl"][1] == "`rl.num_steps`: 3 -> 6"
    assert rows["evaluate"][1] == "after rl"
    before, after = (float(cell.removeprefix("$")) for cell in rows["rl"][2:])
    assert after == pytest.approx(2 * before, rel=0.1)  # shown to two digits
    assert "does not submit it" in small
    assert "other.toml" in text and "| data | **yes** | new |" in text


def test_an_invalid_recipe_fails_with_every_mistake_and_the_others_are_shown(history):
    base = history.git("rev-parse", "HEAD")
    wrong = LAPTOP.replace("group_size = 4", "group_size = 1").replace("[sft]", "[stf]")
    head = history.commit(wrong=wrong, small=LAPTOP.replace("seed = 1", "seed = 2"))
    done = history.script("check", base, head)
    assert done.returncode == 1 and "wrong.toml" in done.stderr
    assert "unknown key stf" in done.stdout and "rl.group_size" in done.stdout
    assert "seed`: 1 -> 2" in done.stdout


def test_a_removed_recipe_and_other_files_cost_nothing(history):
    base = history.git("rev-parse", "HEAD")
    (history.folder / "notes.md").write_text("x")
    head = history.commit()
    assert report(recipe_changes(base, head, folder=history.folder)) == "No recipe changes.\n"
    (change,) = recipe_changes(base, history.commit(small=None), folder=history.folder)
    assert change.is_removed and "Removed." in report([change]) and to_submit([change]) == []


def test_an_unknown_commit_is_named(history):
    with pytest.raises(M1Error, match="nowhere"):
        recipe_changes("nowhere", "HEAD", folder=history.folder)


@pytest.mark.skipif(not SWAGGER.exists(), reason=f"no published swagger at {SWAGGER}")
def test_a_merge_submits_what_asks_for_it_once_for_each_content(history):
    base = history.git("rev-parse", "HEAD")
    head = history.commit(a=SUBMIT, small=LAPTOP.replace("seed = 1", "seed = 2"))
    api = KfpApi(token="planted-secret")
    where = {"M1_KFP_HOST": api.url, "M1_KFP_TOKEN": api.token}
    first = history.script("submit", base, head, **where)
    assert first.returncode == 0, first.stderr
    assert "started" in first.stdout and len(api.runs) == len(api.versions) == 1
    comment = history.commit(a=SUBMIT + "# a word\n")  # another file, the same content
    again = history.script("submit", head, comment, **where)
    assert "has run before" in again.stdout and len(api.runs) == 1
    changed = history.commit(a=SUBMIT.replace("seed = 1", "seed = 3"))
    assert "started" in history.script("submit", comment, changed, **where).stdout
    assert len(api.runs) == len(api.versions) == 2
    said = first.stdout + first.stderr + again.stdout + yaml.safe_dump([api.versions, api.runs])
    assert "planted-secret" not in said
    api.close()


def test_the_workflow_calls_the_script_and_waits_for_approval_before_secrets():
    flow = yaml.safe_load((PROJECT / ".github/workflows/recipes.yml").read_text())
    steps = {job: [s.get("run", "") for s in flow["jobs"][job]["steps"]] for job in flow["jobs"]}
    assert any(".ci/recipes check" in step for step in steps["check"])
    assert any(".ci/recipes submit" in step for step in steps["submit"])
    assert "secrets." not in str(flow["jobs"]["check"])
    assert flow["jobs"]["submit"]["environment"] == "training"
    for run in (step for job in steps.values() for step in job):
        assert "${{" not in run  # text of others reaches the shell by the environment only
