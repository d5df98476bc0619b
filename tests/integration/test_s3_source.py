from collections import Counter

from m1.config.schema import SourceConfig
from m1.data.sources import Document, read_source
from m1.storage import open_storage


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
