"""Curation on a dirty mixture of our own making: recall and precision of every filter.

    python -m benchmarks.curation [--json OUT] [--no-embeddings]

Clean problems from templates with their own numbers and stories, and planted among them: copies,
copies in other typesetting, copies with a word more, paraphrases, problems of a benchmark and of an
SFT set, and broken items of each kind. The labels are known because we planted them. Clean problems
of one template differ by names and numbers only, which is what makes the mixture hard.
"""

import argparse
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from m1.curate.run import Curated, curate
from m1.curate.settings import CurateConfig
from m1.types import Task

_NAMES_TEXT = "Ada Ben Cora Dan Eva Finn Gina Hugo Ida Jon Kira Leo Mia Ned Olga Paul"
_NAMES = _NAMES_TEXT.split()
_THINGS_TEXT = "apples marbles tickets stamps coins pencils cards shells books bottles"
_THINGS = _THINGS_TEXT.split()
_PLACES_TEXT = "market harbour school museum library station garden factory theatre airport"
_PLACES = _PLACES_TEXT.split()
_VERBS_TEXT = "sells packs counts paints ships sorts labels repairs"
_VERBS = _VERBS_TEXT.split()


def _story(r: random.Random) -> tuple[str, str, str]:
    a, b, n = r.randint(12, 99), r.randint(3, 11), r.randint(2, 9)
    name, thing, place, verb = (r.choice(x) for x in (_NAMES, _THINGS, _PLACES, _VERBS))
    other = r.choice(_THINGS)
    text = (
        f"At the {place}, {name} {verb} {a} {thing} in every box and then adds {b} {other} to each "
        f"box before closing it. How many objects lie in {n} closed boxes altogether?"
    )
    paraphrase = (
        f"{name} works at the {place}. Each box first receives {a} {thing}; afterwards {b} {other} "
        f"go into it too. What is the total number of objects contained in {n} of these full boxes?"
    )
    return text, paraphrase, str((a + b) * n)


def _equation(r: random.Random) -> tuple[str, str, str]:
    p, q, k = r.randint(2, 60), r.randint(61, 140), r.randint(2, 9)
    total, product = p + q, p * q
    text = (
        f"Let $u$ and $v$ be positive integers with $u<v$ whose sum equals ${total}$ and whose "
        f"product equals ${product}$. Compute the value of ${k}u+v$."
    )
    paraphrase = (
        f"Two positive whole numbers add up to ${total}$ and multiply to ${product}$. If the "
        f"smaller one is called $u$ and the larger one $v$, determine ${k}u+v$."
    )
    return text, paraphrase, str(k * p + q)


def _geometry(r: random.Random) -> tuple[str, str, str]:
    w, h, d = r.randint(5, 90), r.randint(91, 180), r.randint(2, 20)
    text = (
        f"A rectangular field measures {w} metres by {h} metres. A path of width {d} metres runs "
        "around it on the outside. Find the area of the path in square metres."
    )
    paraphrase = (
        f"Around a rectangle with sides of {w} m and {h} m somebody lays a walkway that is {d} "
        f"m wide"
        " everywhere. How large is the region covered by this walkway, measured in square metres?"
    )
    return text, paraphrase, str((w + 2 * d) * (h + 2 * d) - w * h)


def _sequence(r: random.Random) -> tuple[str, str, str]:
    a, d, n = r.randint(2, 90), r.randint(3, 40), r.randint(11, 60)
    text = (
        f"An arithmetic sequence begins with {a} and has common difference {d}. Determine the "
        f"sum of "
        f"its first {n} terms."
    )
    paraphrase = (
        f"Starting at {a}, every next number of a list is {d} larger than the one before. If "
        f"all of "
        f"the first {n} numbers of the list are added, what is the result?"
    )
    return text, paraphrase, str(n * (2 * a + (n - 1) * d) // 2)


_MAKERS: tuple[Callable[[random.Random], tuple[str, str, str]], ...] = (
    _story, _equation, _geometry, _sequence,
)  # fmt: skip


def mixture(
    seed: int, num_clean: int = 1200
) -> tuple[list[Task], list[Task], list[Task], dict[str, str]]:
    """Tasks, an SFT set, a benchmark set, and by task id what was planted (absent: clean)."""
    rng = random.Random(seed)
    planted: dict[str, str] = {}
    clean: list[Task] = []
    paraphrases: dict[str, str] = {}
    seen: set[str] = set()
    while len(clean) < num_clean:
        text, paraphrase, answer = rng.choice(_MAKERS)(rng)
        if text not in seen:
            seen.add(text)
            task = Task(f"clean-{len(clean)}", "mixture", text, answer, "maths", {}, "maths")
            clean.append(task)
            paraphrases[task.task_id] = paraphrase
    held = {kind: [clean.pop() for _ in range(60)] for kind in ("sft", "benchmarks")}
    added: list[Task] = []

    def plant(kind: str, task: Task, prompt: str, **changes: Any) -> None:
        copy = replace(task, task_id=f"{kind}-{len(added)}", prompt=prompt, **changes)
        planted[copy.task_id] = kind
        added.append(copy)

    chosen = rng.sample(clean, 400)
    for task in chosen[:80]:
        plant("exact", task, _respaced(rng, task.prompt))
    for task in chosen[80:160]:
        plant("ngram", task, _reworded(rng, task.prompt))
    for task in chosen[160:240]:
        plant("paraphrase", task, paraphrases[task.task_id])
    for kind, tasks in held.items():
        for number, task in enumerate(tasks):
            if number < 30:
                plant(
                    f"{kind}_quoted", task, f"Here is a problem from a test. {task.prompt} Explain."
                )
            else:
                plant(f"{kind}_paraphrase", task, paraphrases[task.task_id])
    for task in chosen[240:320]:
        kind, prompt, reference = _broken(rng, task)
        plant(kind, task, prompt, reference=reference)
    everything = clean + added
    first = {task.task_id for task in clean}
    rng.shuffle(added)
    everything = [task for task in everything if task.task_id in first] + added
    return everything, held["sft"], held["benchmarks"], planted


def _respaced(rng: random.Random, text: str) -> str:
    changed = text.replace(". ", ".  ").replace("$", " $ ") if rng.random() < 0.5 else text.upper()
    return changed + " "


def _reworded(rng: random.Random, text: str) -> str:
    words = text.split()
    place = rng.randrange(2, len(words) - 2)
    return " ".join([*words[:place], rng.choice(["indeed", "exactly", "then"]), *words[place:]])


def _broken(rng: random.Random, task: Task) -> tuple[str, str, str]:
    text = task.prompt
    kind = rng.choice(["incomplete", "multi_part", "proof", "binary", "unparseable"])
    cut = " ".join(text.split()[: len(text.split()) // 2]) + " and the"
    return kind, *{
        "incomplete": rng.choice(
            [(cut, task.reference), (text, " "), (f"{text} Use the figure below.", task.reference),
             (f"<p>{text}</p>", task.reference)]
        ),
        "multi_part": (f"{text} (a) Find the answer. (b) Compute its square.", task.reference),
        "proof": (f"Prove that the following has a unique answer. {text}", task.reference),
        "binary": (f"{text} True or false: it exceeds 100?", "True"),
        "unparseable": (text + " Say it in words.", "The solution follows from the picture as "
        "was told"),
    }[kind]  # fmt: skip


EXPECTED_STEPS = {
    "exact": {"exact_duplicate"},
    "ngram": {"exact_duplicate", "ngram_duplicate"},
    "paraphrase": {"embedding_duplicate"},
    "sft_quoted": {"sft_ngram"},
    "benchmarks_quoted": {"benchmarks_ngram"},
    "sft_paraphrase": {"sft_embedding"},
    "benchmarks_paraphrase": {"benchmarks_embedding"},
    **{kind: {kind} for kind in ("incomplete", "multi_part", "proof", "binary", "unparseable")},
}


def measure(curated: Curated, planted: dict[str, str]) -> dict[str, dict[str, float]]:
    """Recall of each kind of planted item, precision of each step that dropped something.

    A drop is right when the item was planted; a planted item is found when any step dropped it
    (`recall`), and found for its reason when one of its expected steps did (`recall_by_step`).
    """
    step_of = {d.task.task_id: d.step for d in curated.dropped}
    kinds: dict[str, list[str]] = defaultdict(list)
    for task_id, kind in planted.items():
        kinds[kind].append(task_id)
    recall = {
        kind: {
            "planted": len(ids),
            "recall": sum(i in step_of for i in ids) / len(ids),
            "recall_by_step": sum(step_of.get(i) in EXPECTED_STEPS[kind] for i in ids) / len(ids),
        }
        for kind, ids in sorted(kinds.items())
    }
    dropped: dict[str, list[bool]] = defaultdict(list)
    for task_id, step in step_of.items():
        dropped[step].append(task_id in planted)
    precision = {
        f"step {step}": {"dropped": len(right), "precision": sum(right) / len(right)}
        for step, right in sorted(dropped.items())
    }
    return {**recall, **precision}


def main() -> None:
    """Print the table, and write it."""
    from benchmarks.machine import write

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--no-embeddings", action="store_true")
    arguments = parser.parse_args()
    tasks, sft, benchmarks, planted = mixture(seed=1)
    settings: dict[str, Any] = {"inputs": [{"uri": "planted"}]}
    if arguments.no_embeddings:
        settings["duplicates"] = {"embedding_threshold": None}
        settings["contamination"] = {"embedding_threshold": None}
    config = CurateConfig.model_validate(settings)
    found = measure(curate(tasks, config, sft=sft, benchmarks=benchmarks), planted)
    for name, row in found.items():
        print(f"{name:28s} " + "  ".join(f"{k} {v:.3f}" for k, v in row.items()))
    write(arguments.json, {"settings": config.model_dump(mode="json"), "results": found})


if __name__ == "__main__":
    main()
