"""What the documents count is what the index lists."""

import json
import re
from collections import Counter
from importlib.resources import files
from pathlib import Path

from m1.swe.building import MutantRow, read_rows

INDEX = Path(str(files("m1.swe").joinpath("index.json")))
GIVEN = {
    ("parse", "1.20.0"),
    ("parse", "1.20.1"),
    ("sqlparse", "0.5.1"),
    ("tomlkit", "0.13.0"),
    ("xmltodict", "0.14.1"),
}


def counts(kind):
    """The number and the packages that a row of the room's table names."""
    text = INDEX.with_name("README.md").read_text()
    (row,) = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith(f"| {kind} |")]
    named = [part.split() for part in row[2].split(",")]
    return int(row[1]), Counter({name: int(*number or "1") for name, *number in named})


def test_the_readme_counts_what_the_index_lists():
    rows = json.loads(INDEX.read_text())
    pairs = [r for r in rows if r["kind"] == "releases"]
    given = [r for r in pairs if (r["package"], r["base_version"]) in GIVEN]
    ours = {r["package"] for r in given}
    found = [r for r in pairs if r not in given]
    listed = {
        "given pairs": given,
        "found in neighbouring releases of other packages":
            [r for r in found if r["package"] not in ours],
        "found in those of the given ones": [r for r in found if r["package"] in ours],
        "made by mutation": [r for r in rows if r["kind"] == "mutation"],
    }  # fmt: skip
    assert len(given) == len(GIVEN)
    for kind, instances in listed.items():
        assert counts(kind) == (len(instances), Counter(r["package"] for r in instances)), kind
    assert sum(map(len, listed.values())) == len(rows)


def test_the_index_can_be_built_again():
    rows = read_rows(INDEX)
    assert len({r["instance_id"] for r in json.loads(INDEX.read_text())}) == len(rows)
    for row in rows:
        if isinstance(row, MutantRow):
            digests = [row.sdist["sha256"]]
        else:
            digests = [row.base_sdist.sha256, row.fix_sdist.sha256]
        assert all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in digests)


def test_the_front_page_names_the_same_totals():
    text = (Path(__file__).parents[3] / "README.md").read_text()
    (found,) = re.findall(r"(\d+) pairs of releases and (\d+) mutants.*?\| (\d+) instances", text)
    kinds = Counter(r["kind"] for r in json.loads(INDEX.read_text()))
    assert tuple(map(int, found)) == (kinds["releases"], kinds["mutation"], kinds.total())


def test_the_readme_counts_the_refused_pairs():
    rejects = json.loads(INDEX.with_name("rejects.json").read_text())
    text = INDEX.with_name("README.md").read_text()
    table = text[text.index("| rejected pairs |") :].partition("\n\n")[0].splitlines()[2:]
    assert sum(int(line.split("|")[2]) for line in table) == len(rejects)
    listed = {row["instance_id"] for row in json.loads(INDEX.read_text())}
    names = (re.match(r"(\S+) (\S+) -> (\S+)$", reject["name"]) for reject in rejects)
    assert not listed & {f"{m[1]}__{m[2]}-{m[3]}" for m in names}
