from collections import Counter
from types import SimpleNamespace

import pytest

from m1.config.schema import SourceConfig
from m1.data.sources import Document, read_source
from m1.storage import open_storage
from m1.train import supervised
from m1.types import M1Error


def test_objects_below_a_prefix_become_documents(s3_bucket):
    storage = open_storage(f"s3://{s3_bucket}")
    storage.write_bytes("corpus/b.txt", b"plain")
    storage.write_bytes("corpus/a.jsonl", b'{"text": "one"}\n{"text": "two"}\n')
    storage.write_bytes("corpus/c.bin", b"left out")
    storage.write_bytes("elsewhere/d.txt", b"left out")
    config = SourceConfig(
        name="s", kind="s3", uri=f"s3://{s3_bucket}/corpus", include=("*.txt", "*.jsonl")
    )
    assert list(read_source(config, skipped=Counter())) == [
        Document("s", "a.jsonl:1", "one"),
        Document("s", "a.jsonl:2", "two"),
        Document("s", "b.txt", "plain"),
    ]


def test_a_stage_starts_from_a_checkpoint_on_s3(s3_bucket, tmp_path):
    storage = open_storage(f"s3://{s3_bucket}")
    for key in ("base/complete.json", "base/deep/shard", "stage/output/checkpoint/complete.json"):
        storage.write_bytes(key, key.encode())
    storage.write_bytes("basement/complete.json", b"another")

    def given(start, name):
        context = SimpleNamespace(folder=tmp_path / name)
        context.folder.mkdir(exist_ok=True)
        return supervised._given(context, f"s3://{s3_bucket}/{start}")

    found = given("base", "one")
    files = {p.relative_to(found).as_posix() for p in found.rglob("*") if p.is_file()}
    assert files == {"complete.json", "deep/shard"}
    assert (found / "deep" / "shard").read_bytes() == b"base/deep/shard"
    assert given("stage/output/", "two").name == "checkpoint"
    storage.remove_folder("base")
    assert given("base", "one") == found  # resumed: it is here
    with pytest.raises(M1Error, match=r"pretrain\.start is .*/none, but nothing lies below"):
        given("none", "three")
    storage.write_bytes("torn/deep/shard", b"")
    with pytest.raises(M1Error, match="holds a checkpoint"):
        given("torn", "four")
    storage.write_bytes("torn/complete.json", b"")
    assert given("torn", "four").is_dir()  # mended meanwhile
