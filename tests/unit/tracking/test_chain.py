"""The chain of an output, read from pointers alone."""

from dataclasses import replace

import pytest

from m1.storage import open_storage, write_pointer
from m1.tracking.chain import follow
from m1.tracking.lineage import lineage_page
from m1.types import M1Error, Pointer

SCORE = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 10}


@pytest.fixture
def root(tmp_path):
    """data -> pretrain -> sft -> evaluate, and another sft beside."""
    storage = open_storage(str(tmp_path))
    pointers: dict[str, Pointer] = {}

    def keep(name, stage, parents, **metadata):
        folder = f"{stage}-{name * 12}"
        inputs = {
            pointers[parent].stage: {
                "uri": pointers[parent].uri,
                "digest": pointers[parent].digest,
                "stage_hash": pointers[parent].stage_hash,
            }
            for parent in parents
        }
        origin = {
            "inputs": inputs,
            "code": "c0ffee",
            "image": f"sha256:{stage}",
            "config": "f" * 64,
        }
        pointers[name] = Pointer(
            stage,
            name * 64,
            storage.uri(f"stages/{folder}/output"),
            name * 64,
            metadata={"lineage": origin, **metadata},
        )
        write_pointer(storage, f"stages/{folder}/pointer.json", pointers[name])

    keep("a", "data", [])
    keep("b", "pretrain", ["a"])
    keep("c", "sft", ["a", "b"])
    keep("d", "evaluate", ["a", "b", "c"], scores={"sums": {"pretrain": SCORE, "sft": SCORE}})
    keep("e", "sft", ["a", "b"])
    return tmp_path, pointers


def _follow(root, target):
    return follow(str(target), uri=f"sqlite:///{root[0]}/none.db")


@pytest.mark.parametrize("below", ["output", "output/checkpoint/x", "pointer.json", ""])
def test_an_output_leads_back_to_the_data_and_forward_to_its_scores(root, below):
    chain = _follow(root, root[0] / f"stages/sft-{'c' * 12}" / below)
    assert chain.target == root[1]["c"]
    assert chain.back == {"data": root[1]["a"], "pretrain": root[1]["b"], "sft": root[1]["c"]}
    assert list(chain.back) == ["data", "pretrain", "sft"]
    assert chain.forward == {f"evaluate-{'d' * 12}": root[1]["d"]}
    assert chain.evaluations == [("d" * 64, "sums", SCORE)]


def test_data_leads_to_all_that_was_made_of_it(root):
    chain = _follow(root, root[1]["a"].uri)
    assert {name[-1] for name in chain.forward} == {"b", "c", "d", "e"}


def test_an_input_that_was_deleted_is_still_named(root):
    (root[0] / f"stages/pretrain-{'b' * 12}/pointer.json").unlink()
    chain = _follow(root, root[1]["c"].uri)
    assert chain.back["pretrain"] == replace(root[1]["b"], metadata={})


def test_what_leads_nowhere_is_refused_with_what_to_give(root):
    with pytest.raises(M1Error, match=r"no pointer at .*not finished"):
        _follow(root, root[0] / f"stages/rl-{'0' * 12}/output")


def test_the_page_draws_code_image_and_stages_and_lists_scores(root):
    pointers = {pointer.stage: pointer for pointer in root[1].values()}
    page = lineage_page(
        pointers,
        summary={"recipe": "x", "recipe_hash": "0" * 64, "git_commit": ""},
        tracking="t",
        run_id="r",
    )
    assert page.count("<rect") == 6  # code, image and four stages
    assert "c0ffee" in page and "0.500 [0.400, 0.600]" in page and "sha256:sft" in page
