import json
from collections import Counter

import pytest

from m1.config.schema import SourceConfig
from m1.data.sources import Document, read_source
from m1.types import M1Error


def read(**fields):
    skipped = Counter()
    return list(read_source(SourceConfig(name="s", **fields), skipped=skipped)), skipped


def test_the_standard_library_is_sorted_library_code_only():
    documents, _ = read(kind="python_stdlib")
    names = [document.identifier for document in documents]
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    banned = {"test", "tests", "idlelib", "site-packages", "__pycache__"}
    assert not any(banned & set(name.split("/")) for name in names)
    assert documents == read(kind="python_stdlib")[0]


def test_a_folder_is_walked_in_sorted_order_by_pattern(tmp_path):
    for name in ("b.txt", "a/z.md", "a/b.py", "a.bin", ".git/x.txt", "a/.hidden.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    documents, _ = read(kind="folder", uri=str(tmp_path))
    assert documents == [Document("s", name, name) for name in ("a/b.py", "a/z.md", "b.txt")]
    documents, _ = read(kind="folder", uri=str(tmp_path), include=("*.bin",))
    assert [document.identifier for document in documents] == ["a.bin"]


def test_max_documents_stops_in_sorted_order(tmp_path):
    for name in "cab":
        (tmp_path / f"{name}.txt").write_text(name)
    documents, _ = read(kind="folder", uri=str(tmp_path), max_documents=2)
    assert [document.text for document in documents] == ["a", "b"]


def test_what_is_not_utf8_is_skipped_and_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfgood")
    documents, skipped = read(kind="folder", uri=str(tmp_path))
    assert [document.text for document in documents] == ["good"]
    assert skipped == {"not_utf8": 1}


def test_jsonl_lines_become_documents_and_bad_lines_are_counted(tmp_path):
    lines = [json.dumps({"body": "one"}).encode(), b"", b"{", b"\xff", b"[1]", b'{"body": 3}']
    lines.append(json.dumps({"body": "two\u2028still two"}, ensure_ascii=False).encode())
    (tmp_path / "rows.json").write_bytes(b"\n".join(lines))
    documents, skipped = read(kind="jsonl", uri=str(tmp_path / "rows.json"), text_field="body")
    assert documents == [
        Document("s", "rows.json:1", "one"),
        Document("s", "rows.json:7", "two\u2028still two"),
    ]
    assert skipped == {"invalid_json": 1, "not_utf8": 1, "missing_text_field": 2}


def test_jsonl_files_in_a_folder_are_read_by_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": "y"}\n')
    documents, _ = read(kind="folder", uri=str(tmp_path), include=("*.jsonl",))
    assert [document.text for document in documents] == ["x", "y"]


@pytest.mark.parametrize(("kind", "words"), [("folder", "not a folder"), ("jsonl", "not a file")])
def test_a_missing_place_is_named(tmp_path, kind, words):
    with pytest.raises(M1Error, match=words):
        read(kind=kind, uri=str(tmp_path / "absent"))
