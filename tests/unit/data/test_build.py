import json
from collections import Counter

import pytest

from m1.config.schema import DataConfig, SourceConfig, TaskSourceConfig, TokenizerConfig
from m1.data.build import build, split_by_hash
from m1.data.packing import PackedRows
from m1.data.tasks import read_tasks
from m1.data.tokenizer import Tokenizer
from m1.storage import folder_digest
from m1.types import M1Error

TASKS = TaskSourceConfig(
    name="sums",
    dataset="chain_sum",
    parameters={"max_terms": 3, "max_digits": 2},
    num_sft=40,
    num_rl=20,
    num_heldout=10,
)


def quiet(phase, done, total):
    pass


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, make_prose):
    folder = tmp_path_factory.mktemp("corpus")
    for seed in range(30):
        (folder / f"{seed:02d}.txt").write_text(make_prose(seed))
    (folder / "copy.txt").write_text(make_prose(3))
    (folder / "near.txt").write_text(make_prose(4) + " one more line of words")
    (folder / "short.txt").write_text("short")
    (folder / "binary.txt").write_bytes(b"\xff\xfe")
    return folder


def config_of(corpus, **fields):
    fields.setdefault("tasks", (TASKS,))
    return DataConfig(
        sources=(SourceConfig(name="prose", kind="folder", uri=str(corpus)),),
        tokenizer=TokenizerConfig(vocab_size=400),
        heldout_fraction=0.1,
        sequence_length=128,
        **fields,
    )


@pytest.fixture(scope="module")
def built(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    return folder, build(config_of(corpus), seed=1, folder=folder, report=quiet)


def test_the_layout_is_complete(built):
    folder, _ = built
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    pairs = [f"pretrain/{name}" for name in ("train", "heldout")]
    pairs += [f"sft/{name}{kind}" for name in ("train", "heldout") for kind in ("", "_loss_mask")]
    assert files == {
        *(f"{pair}{suffix}" for pair in pairs for suffix in (".bin", ".idx")),
        *(f"tasks/{name}.jsonl" for name in ("sft", "rl", "heldout")),
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "card.json",
        "card.md",
    }


def test_the_card_accounts_for_every_document(built):
    folder, card = built
    assert json.loads((folder / "card.json").read_text()) == card
    assert card["sources"] == [
        {
            "name": "prose",
            "num_read": 33,
            "skipped": {"not_utf8": 1},
            "dropped": {"too_short": 1},
            "num_cleaned": 32,
            "num_deduplicated": 30,
        }
    ]
    assert card["dedup"] == {"exact": 1, "near": 1}
    parts = [card["pretrain"][name] for name in ("train", "heldout")]
    assert sum(part["num_documents"] for part in parts) == 30
    assert card["pretrain"]["overlap"]["max_share"] < 0.1
    assert card["tasks"]["num_shared_prompts"] == 0
    assert card["sft"]["num_too_long"] == 0
    assert "1 exact, 1 near" in (folder / "card.md").read_text()


def test_packed_documents_decode_to_the_corpus(built, corpus):
    folder, card = built
    tokenizer = Tokenizer(folder / "tokenizer")
    texts = []
    for name in ("train", "heldout"):
        rows = PackedRows(folder / "pretrain" / name)
        assert len(rows) == card["pretrain"][name]["num_rows"]
        tokens = [int(token) for number in range(len(rows)) for token in rows.row(number).tokens]
        assert len(tokens) == card["pretrain"][name]["num_tokens"]
        *documents, rest = tokenizer.decode(tokens).split("<|endoftext|>")
        assert rest == ""
        texts += documents
    expected = [(corpus / f"{seed:02d}.txt").read_text() for seed in range(30)]
    assert Counter(texts) == Counter(expected)


def test_packed_demonstrations_are_the_sft_tasks(built):
    folder, card = built
    tokenizer = Tokenizer(folder / "tokenizer")
    tasks = {task.prompt: task for task in read_tasks(folder / "tasks" / "sft.jsonl")}
    assert len(tasks) == 40
    for name in ("train", "heldout"):
        rows = PackedRows(folder / "sft" / name)
        for number in range(len(rows)):
            row = rows.row(number)
            assert len(row.tokens) <= 128
            ends = row.segment_lengths.cumsum()
            for start, end in zip(ends - row.segment_lengths, ends, strict=True):
                text = tokenizer.decode(row.tokens[start:end].tolist())
                prompt, reply = text.removeprefix("<|user|>").split("<|end|><|assistant|>")
                trained = row.tokens[start:end][row.loss_mask[start:end]].tolist()
                assert tokenizer.decode(trained) == reply
                assert reply.endswith(f"<answer>{tasks.pop(prompt).reference}</answer><|end|>")
    assert tasks == {}
    assert card["sft"]["train"]["num_documents"] + card["sft"]["heldout"]["num_documents"] == 40


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
def test_the_worked_share_of_demonstrations_thinks_and_the_rest_has_no_tags(
    corpus, tmp_path, fraction
):
    tasks = TASKS.model_copy(update={"worked_fraction": fraction})
    build(config_of(corpus, tasks=(tasks,)), seed=1, folder=tmp_path, report=quiet)
    tokenizer = Tokenizer(tmp_path / "tokenizer")
    segments = []
    for name in ("train", "heldout"):
        rows = PackedRows(tmp_path / "sft" / name)
        for number in range(len(rows)):
            row, start = rows.row(number), 0
            for length in row.segment_lengths.tolist():
                segments.append(row.tokens[start : start + length].tolist())
                start += length
    worked = [s for s in segments if tokenizer.think_open in s]
    tagged = [s for s in segments if tokenizer.answer_open in s]
    assert len(segments) == 40
    assert len(worked) == len(tagged) == 40 * fraction


def test_same_inputs_give_the_same_bytes(built, corpus, tmp_path):
    build(config_of(corpus), seed=1, folder=tmp_path / "again", report=quiet)
    assert folder_digest(tmp_path / "again") == folder_digest(built[0])
    build(config_of(corpus), seed=2, folder=tmp_path / "other", report=quiet)
    assert folder_digest(tmp_path / "other") != folder_digest(built[0])


def test_without_demonstrations_there_is_no_sft_folder(corpus, tmp_path):
    phases = []
    config = config_of(corpus, tasks=())
    card = build(config, seed=1, folder=tmp_path, report=lambda *event: phases.append(event))
    assert card["sft"] is None
    assert not (tmp_path / "sft").exists()
    assert read_tasks(tmp_path / "tasks" / "rl.jsonl") == []
    order = list(dict.fromkeys(phase for phase, _, _ in phases))
    assert order == ["tasks", "read", "deduplicate", "tokenizer", "tokenize"]
    assert all(0 <= done <= total for _, done, total in phases)
    assert {phase for phase, done, total in phases if done == total} == set(order)


def test_an_existing_tokenizer_is_used(built, corpus, tmp_path):
    existing = TokenizerConfig(path=str(built[0] / "tokenizer"))
    config = config_of(corpus).model_copy(update={"tokenizer": existing})
    build(config, seed=1, folder=tmp_path, report=quiet)
    assert folder_digest(tmp_path / "tokenizer") == folder_digest(built[0] / "tokenizer")


def test_an_empty_folder_is_an_error_that_names_the_source(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(M1Error, match=r"no documents are left .*prose: 0 read"):
        build(config_of(tmp_path / "empty"), seed=1, folder=tmp_path / "out", report=quiet)


def test_a_corpus_that_cleaning_empties_gives_the_counts_by_reason(tmp_path):
    (tmp_path / "a.txt").write_text("short")
    (tmp_path / "b.txt").write_text("1 " * 500)
    (tmp_path / "c.txt").write_bytes(b"\xff")
    with pytest.raises(M1Error, match="2 read, 1 long_lines, 1 not_utf8, 1 too_short"):
        build(config_of(tmp_path), seed=1, folder=tmp_path / "out", report=quiet)


def test_a_single_document_cannot_be_split(tmp_path, make_prose):
    (tmp_path / "a.txt").write_text(make_prose(1))
    with pytest.raises(M1Error, match="give at least 2"):
        build(config_of(tmp_path), seed=1, folder=tmp_path / "out", report=quiet)


def test_demonstrations_longer_than_a_row_are_counted_then_refused(corpus, tmp_path):
    config = config_of(corpus).model_copy(update={"sequence_length": 16})
    with pytest.raises(M1Error, match="raise sequence_length"):
        build(config, seed=1, folder=tmp_path / "16", report=quiet)


def test_two_sources_of_one_name_are_refused(corpus, tmp_path):
    config = config_of(corpus)
    config = config.model_copy(update={"sources": config.sources * 2})
    with pytest.raises(M1Error, match="several entries named 'prose'"):
        build(config, seed=1, folder=tmp_path, report=quiet)


def test_the_split_of_an_item_does_not_depend_on_the_others():
    names = [f"document {number}" for number in range(1000)]
    train, heldout = split_by_hash(names, str, 0.1, 7)
    assert train + heldout != names and sorted(train + heldout) == sorted(names)
    assert 70 <= len(heldout) <= 130
    part, part_heldout = split_by_hash(names[::3], str, 0.1, 7)
    assert set(part) <= set(train) and set(part_heldout) <= set(heldout)


@pytest.mark.parametrize("fraction", [1e-9, 0.4999])
def test_both_sides_of_a_split_have_something(fraction):
    for seed in range(20):
        train, heldout = split_by_hash(["a", "b"], str, fraction, seed)
        assert len(train) == len(heldout) == 1
