import pytest

from m1.storage import atomic_write, folder_digest, open_storage, read_pointer, write_pointer
from m1.types import M1Error, Pointer


def test_a_bucket_with_keys_is_usable_and_stays_empty(s3_bucket):
    storage = open_storage(f"s3://{s3_bucket}/runs")
    storage.ensure_usable()
    assert storage.list() == ()


def test_a_missing_bucket_gives_the_command_that_makes_it(s3_bucket):
    with pytest.raises(M1Error, match=r"mc mb m1/absent-bucket"):
        open_storage("s3://absent-bucket/runs").ensure_usable()


def test_wrong_keys_are_named(s3_bucket, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(M1Error, match="correct AWS_ACCESS_KEY_ID"):
        open_storage(f"s3://{s3_bucket}/runs").ensure_usable()


@pytest.mark.parametrize("prefix", ["", "/runs/deep"])
def test_write_read_exists_and_list(s3_bucket, prefix):
    storage = open_storage(f"s3://{s3_bucket}{prefix}")
    assert not storage.exists("a/b.bin")
    storage.write_bytes("a/b.bin", b"one")
    storage.write_bytes("a/b.bin", b"\x00two")
    storage.write_bytes("ab/c", b"")
    storage.write_bytes("a/.hidden", b"")
    assert storage.read_bytes("a/b.bin") == b"\x00two"
    assert storage.exists("a/b.bin")
    assert not storage.exists("a")
    assert storage.list() == ("a/b.bin", "ab/c")
    assert storage.list("a") == ("a/b.bin",)
    assert storage.list("nothing") == ()
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("a/absent")


def test_folders_travel_whole_and_replace_what_was_there(s3_bucket, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    for number in range(20):
        atomic_write(source / "shards" / f"{number:02d}", bytes([number]) * 1000 * number)
    atomic_write(source / ".partial", b"no")
    storage = open_storage(f"s3://{s3_bucket}/runs")
    storage.write_bytes("stage/stale", b"old")
    storage.upload_folder(source, "stage")
    assert storage.list("stage") == tuple(f"stage/shards/{number:02d}" for number in range(20))
    atomic_write(target / "stale", b"old")
    storage.download_folder("stage", target)
    assert folder_digest(target) == folder_digest(source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_a_download_of_nothing_makes_no_folder(s3_bucket, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        open_storage(f"s3://{s3_bucket}").download_folder("nothing", tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


def test_pointer_round_trip_and_torn_pointer(s3_bucket):
    storage = open_storage(f"s3://{s3_bucket}/runs")
    pointer = Pointer("data", "abc", storage.uri("data/abc"), "d" * 64)
    assert read_pointer(storage, "data/abc.json") is None
    write_pointer(storage, "data/abc.json", pointer)
    assert read_pointer(storage, "data/abc.json") == pointer
    storage.write_bytes("data/abc.json", storage.read_bytes("data/abc.json")[:20])
    assert read_pointer(storage, "data/abc.json") is None
