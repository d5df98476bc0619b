"""The components beside the pipeline: m1 grade and m1 curate under KFP's local runner."""

import json
from pathlib import Path

from kfp import dsl, local

from components.curate import curate
from components.grade import grade

TASKS = [
    {
        "task_id": str(n), "source": "s", "prompt": f"What is the sum of {n} and {n % 2} and 40?",
        "reference": str(n + n % 2 + 40), "verifier": "maths", "domain": "maths",
    }
    for n in (1, 2, 2)
]  # fmt: skip


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_components_run_locally(tmp_path):
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path / "root"))
    rows = [{"verifier": "maths", "reference": "7", "completion": text} for text in ("7.0", "8")]
    settings = {
        "inputs": [{"uri": write(tmp_path / "tasks.jsonl", TASKS)}],
        "duplicates": {"embedding_threshold": None},
    }

    @dsl.pipeline
    def both(uri: str, settings: str):
        completions = dsl.importer(artifact_uri=uri, artifact_class=dsl.Dataset)
        grade(completions=completions.output)
        curate(settings=settings)

    both(uri=write(tmp_path / "in.jsonl", rows), settings=json.dumps(settings))
    (graded,) = (tmp_path / "root").rglob("graded")
    lines = [json.loads(line) for line in Path(graded).read_text().splitlines()]
    assert [line["reward"] for line in lines] == [1.0, 0.0]
    (card,) = (tmp_path / "root").rglob("card.json")
    assert json.loads(card.read_text())["num_kept"] == 2
