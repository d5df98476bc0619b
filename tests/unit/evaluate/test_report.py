import json
import math
import random
from html.parser import HTMLParser

import pytest

from m1.evaluate.figures import (
    joined_stages,
    pearson_r,
    read_series,
    render_figures,
    render_rl_figure,
)
from m1.evaluate.report import sample_rollouts, write_report
from m1.evaluate.tables import card_tables, format_value
from m1.rollout.traces import StoredRollout, write_step
from m1.types import Completion, Pointer, Reward, Rollout, RolloutGroup, Task

STAGES = ("data", "pretrain", "sft", "rl", "evaluate", "register")
FIGURES = {"pipeline", "scores", "rl", "probabilities", "losses"}
VOID = {"meta", "br", "img", "link", "hr", "input"}


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.references, self.ids, self.open, self.unbalanced, self.text = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        self._note(attributes)

    def handle_startendtag(self, tag, attributes):
        self._note(attributes)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append((tag, self.getpos()))

    def handle_data(self, data):
        self.text.append(data)

    def _note(self, attributes):
        for name, value in attributes:
            if name in ("src", "href", "xlink:href"):
                self.references.append(value)
            if name == "id":
                self.ids.append(value)


def _rows(stage, names, count=40):
    noise = random.Random(1)
    return [
        {"step": i, "metrics": {f"{stage}/{name}": noise.random() for name in names}}
        for i in range(count)
    ]


def _everything():
    rl = "reward accuracy completion_length_tokens entropy_nats clip_fraction"
    noise = random.Random(2)
    passed = {"pass_at_k": {"mean": 0.8, "low": 0.75, "high": 0.85}}
    training = [noise.random() for _ in range(500)]
    statuses = ("cached", *["done"] * 5)
    return {
        "summary": {
            "recipe": "laptop",
            "recipe_hash": "e" * 64,
            "git_commit": "c" * 40,
            "wall_seconds": 345.0,
            "stages": {
                name: {"hash": f"{i}" * 64, "status": status, "seconds": 10.0 * i, "outputs": {}}
                for i, (name, status) in enumerate(zip(STAGES, statuses, strict=True))
            },
            "scores": {
                name: {
                    "pretrain": {"mean": 0.05, "low": 0.0, "high": 0.1, "n": 64},
                    "sft": {"mean": 0.3, "low": 0.2, "high": 0.4, "n": 64, "k": 4, **passed},
                    "rl": {"mean": 0.6, "low": 0.5, "high": 0.7, "n": 64, "k": 4, **passed},
                }
                for name in ("chain_sum", "basic_arithmetic")
            },
        },
        "card": {
            "num_documents": 12345,
            "sources": {"stdlib": {"kept": 10, "dropped": 2}, "docs": {"kept": 7, "dropped": 1}},
        },
        "metrics": {
            "pretrain": _rows("pretrain", ["loss", "heldout_loss"]),
            "sft": _rows("sft", ["loss", "heldout_loss"], 10),
            "rl": _rows("rl", [*rl.split(), "probability_correlation"]),
        },
        "probabilities": {"training": training, "inference": [p * 0.99 for p in training]},
        "recipe_json": json.dumps({"name": "laptop", "note": "<script>alert(1)</script>"}),
        "pointers": {
            name: Pointer(name, f"{i}" * 64, f"/runs/{name}", "a" * 64)
            for i, name in enumerate(STAGES)
        },
        "rollouts": [_rollout(1, 1.0), _rollout(20, 0.0)],
    }


def _rollout(step, accuracy):
    return StoredRollout(
        step=step,
        group=0,
        index=3,
        task_id="sum-1",
        source="sums",
        prompt="What is 1 < 2?",
        text="<think>no</think><script>alert(2)</script>",
        reference="yes",
        prompt_tokens=(1,),
        tokens=(2, 3),
        logprobs=(-1.0, -1.0),
        policy_versions=(5, 6),
        finish_reason="stop",
        reward=accuracy + 0.1,
        accuracy=accuracy,
        parts={"correctness": accuracy, "format": 0.1},
        is_failed=False,
        is_kept=True,
    )


def _write(tmp_path, *, draws=True, **changes):
    path = tmp_path / "run" / "report.html"
    given = {**_everything(), **changes}
    if not draws:
        given.pop("metrics")
        write_report(path, figures={}, **given)
        return path.read_text()
    metrics, scores = given.pop("metrics"), given["summary"]["scores"]
    write_report(path, figures=render_figures(metrics, scores, given["probabilities"]), **given)
    return path.read_text()


def test_report_shows_every_figure_without_outside_references(tmp_path):
    text = _write(tmp_path)
    page = Page(text)
    assert {f"figure-{name}" for name in FIGURES} <= set(page.ids)
    assert text.count("<svg") == len(FIGURES)
    assert all(reference.startswith(("#", "data:")) for reference in page.references)
    assert "url(http" not in text
    assert "@import" not in text
    assert not page.unbalanced
    assert not page.open
    assert "missing" not in text.split("</style>")[1]
    assert len(text) < 1_000_000


def test_report_browses_rollouts_and_runs_nothing_they_wrote(tmp_path):
    text = _write(tmp_path, draws=False)
    assert "step 1, sum-1, number 3: right, reward 1.1, 2 tokens, stop" in text
    assert "step 20, sum-1, number 3: wrong" in text
    assert "&lt;think&gt;no&lt;/think&gt;&lt;script&gt;" in text
    assert "<script" not in text
    assert "kept no rollouts" in _write(tmp_path, draws=False, rollouts=[])


def test_the_sample_has_right_and_wrong_ones_of_first_middle_and_last_step(tmp_path):
    def group(name, *accuracies):
        task = Task(name, "s", "p", "r", "v")
        completion = Completion((1,), (2,), (0.0,), (0.0,), "stop", (0,))
        rollouts = [Rollout(task, completion, Reward(a, a, {}, a < 0)) for a in accuracies]
        return RolloutGroup(task, tuple(rollouts))

    for step in (1, 2, 3, 4, 9):
        groups = [group(f"t{i}", 0.0, -1.0, 1.0, 1.0) for i in range(5)]
        write_step(tmp_path, step, groups, decode=lambda _: "")
    found = sample_rollouts(tmp_path)
    assert [(r.step, r.task_id, r.index) for r in found[:3]] == [
        (1, "t0", 2),
        (1, "t0", 0),
        (1, "t1", 2),
    ]
    assert {r.step for r in found} == {1, 3, 9}
    assert len(found) == 3 * 3 * 2
    assert sample_rollouts(tmp_path / "absent") == []


def test_length_stages_are_drawn_one_after_the_other():
    rows = [{"step": i, "metrics": {"rl/reward": i}} for i in (1, 2)]
    joined = joined_stages({"rl_1024": rows, "rl_512": rows[:1], "sft": rows})
    assert [row["step"] for row in joined["rl"]] == [1, 2, 3]
    assert joined["sft"] == rows


def test_ids_are_unique_and_local_references_resolve(tmp_path):
    page = Page(_write(tmp_path))
    duplicates = {name for name in page.ids if page.ids.count(name) > 1}
    assert not duplicates
    local = {reference[1:] for reference in page.references if reference.startswith("#")}
    assert local <= set(page.ids)


def test_report_states_scores_data_and_provenance(tmp_path):
    page = Page(_write(tmp_path))
    words = " ".join(" ".join(page.text).split())
    assert "[0.500, 0.700]" in words
    assert "12,345" in words
    assert "5m45s" in words
    assert "Pearson r = 1.00000" in words
    assert "pass@4 0.800 [0.750, 0.850]" in words
    assert "/runs/register" in words


def test_recipe_cannot_inject_markup(tmp_path):
    assert "<script" not in _write(tmp_path)


def test_same_run_gives_the_same_bytes(tmp_path):
    assert _write(tmp_path / "a") == _write(tmp_path / "b")


def test_what_is_missing_is_said_in_a_sentence(tmp_path):
    summary = {
        "recipe": "laptop",
        "recipe_hash": "e" * 64,
        "git_commit": "",
        "wall_seconds": 1.0,
        "stages": {"data": {"hash": "0" * 64, "status": "failed", "seconds": 1.0, "outputs": {}}},
        "scores": {},
    }
    empty = {"card": None, "metrics": {}, "probabilities": None, "pointers": {}}
    text = _write(tmp_path, summary=summary, **empty)
    page = Page(text)
    assert text.count('<p class="missing">') == 6
    assert text.count("<svg") == 1
    assert not page.unbalanced


@pytest.mark.parametrize("missing", ["sft", "rl", "pretrain"])
def test_report_of_a_shorter_pipeline(tmp_path, missing):
    given = _everything()
    del given["metrics"][missing], given["summary"]["stages"][missing], given["pointers"][missing]
    for row in given["summary"]["scores"].values():
        del row[missing]
    page = Page(_write(tmp_path, **given))
    assert ("figure-rl" in page.ids) == (missing != "rl")
    assert "figure-losses" in page.ids


def test_repeated_step_keeps_its_last_value_and_nan_is_left_out():
    rows = [
        {"step": step, "metrics": {"x/loss": value}}
        for step, value in ((1, 5.0), (2, 4.0), (3, math.nan), (2, 3.0))
    ]
    series = read_series(rows, "x/loss")
    assert (series.steps, series.values) == ([1, 2], [5.0, 3.0])


def test_figure_of_no_values_is_none():
    assert render_rl_figure([{"step": 1, "metrics": {"rl/reward": math.nan}}]) is None


def test_pearson_of_a_line_is_one_and_of_a_constant_undefined():
    assert pearson_r([0.1, 0.2, 0.3], [0.2, 0.4, 0.6]) == pytest.approx(1.0)
    assert math.isnan(pearson_r([0.1, 0.2], [0.5, 0.5]))


def test_objects_of_one_kind_become_rows_of_one_table():
    [table] = card_tables({"a": {"kept": 1, "dropped": 2}, "b": {"kept": 3}})
    assert table.columns == ("", "kept", "dropped")
    assert table.rows == (("a", "1", "2"), ("b", "3", ""))


def test_every_value_of_a_nested_card_is_shown():
    card = {
        "total_tokens": 1_234_567,
        "cleaning": {"reasons": {"too_short": 3, "ratio": 0.25}, "kept": 9},
        "examples": [{"id": "x", "tags": ["a", "b"]}],
        "odd": [[1, 2], "z"],
        "nothing": None,
    }
    cells = [cell for table in card_tables(card) for row in table.rows for cell in row]
    for value in ("1,234,567", "3", "0.25", "9", "x", "a, b", "[1, 2]", "z", "-"):
        assert value in cells
    assert "cleaning / reasons" in [table.title for table in card_tables(card)]


def test_values_read_naturally():
    given = (True, 1234567, 0.123456, 1234567.8, ["a", 2], [], None)
    shown = ["yes", "1,234,567", "0.1235", "1,234,568", "a, 2", "none", "-"]
    assert [format_value(value) for value in given] == shown
