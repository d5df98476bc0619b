import contextlib
import errno
import hashlib
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from m1.storage import (
    LocalStorage,
    S3Storage,
    atomic_write,
    disk_errors,
    folder_digest,
    open_storage,
    read_pointer,
    write_pointer,
)
from m1.types import M1Error, Pointer

POINTER = Pointer("data", "abc", "/somewhere", "d" * 64, step=3, metadata={"tokens": 7})


@pytest.fixture
def tiny_disk(tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_import_needs_neither_torch_nor_the_s3_client():
    code = (
        "import sys, m1.storage; print(sorted({'torch', 'minio', 'tenacity'} & set(sys.modules)))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "[]"


def test_open_storage_knows_folders_and_s3(tmp_path):
    assert isinstance(open_storage(str(tmp_path)), LocalStorage)
    assert open_storage(f"file://{tmp_path}").uri("a/b") == str(tmp_path / "a" / "b")
    s3 = open_storage("s3://bucket/deep/prefix/")
    assert isinstance(s3, S3Storage)
    assert s3.uri("a/b") == "s3://bucket/deep/prefix/a/b"
    assert open_storage("s3://bucket").uri("a") == "s3://bucket/a"


@pytest.mark.parametrize("root", ["gs://bucket/x", "s3://", "s3:///x"])
def test_open_storage_refuses_other_schemes(root):
    with pytest.raises(M1Error, match="neither a folder nor s3"):
        open_storage(root)


def test_relative_root_gives_absolute_uris(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_storage("runs").uri("x") == str(tmp_path / "runs" / "x")


def test_ensure_usable_creates_the_folder_and_leaves_nothing_in_it(tmp_path):
    open_storage(str(tmp_path / "a" / "b")).ensure_usable()
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_ensure_usable_names_a_file_in_the_place_of_a_folder(tmp_path, below):
    (tmp_path / "file").write_text("x")
    with pytest.raises(M1Error, match=r"file needs|file/deeper.* needs"):
        open_storage(str(tmp_path / "file" / below)).ensure_usable()


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_ensure_usable_names_an_unwritable_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(M1Error, match="make it writable"):
        open_storage(str(tmp_path)).ensure_usable()


def test_ensure_usable_names_a_read_only_disk(tiny_disk):
    remount = ["mount", "-o", "remount,ro", str(tiny_disk)]
    subprocess.run(remount, check=True, capture_output=True)
    with pytest.raises(M1Error, match="cannot be written") as caught:
        open_storage(str(tiny_disk)).ensure_usable()
    assert str(tiny_disk) in str(caught.value)


def test_write_then_read_returns_the_bytes_and_replaces(tmp_path):
    storage = open_storage(str(tmp_path))
    assert not storage.exists("a/b.bin")
    storage.write_bytes("a/b.bin", b"one")
    storage.write_bytes("a/b.bin", b"\x00two")
    assert storage.read_bytes("a/b.bin") == b"\x00two"
    assert storage.exists("a/b.bin")
    assert not storage.exists("a")
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("a/c.bin")


@pytest.mark.parametrize("key", ["../x", "/etc/x", "a/../../x"])
def test_keys_cannot_leave_the_root(tmp_path, key):
    with pytest.raises(ValueError, match="not a relative path"):
        open_storage(str(tmp_path)).write_bytes(key, b"")


def test_list_is_sorted_and_leaves_out_hidden_names(tmp_path):
    storage = open_storage(str(tmp_path))
    for key in ("b/2", "b/1", "a", "b/.hidden", ".work/x", "bb/3"):
        storage.write_bytes(key, b"")
    assert storage.list() == ("a", "b/1", "b/2", "bb/3")
    assert storage.list("b") == ("b/1", "b/2")
    assert storage.list("nothing") == ()


def test_folders_travel_whole_and_replace_what_was_there(tmp_path):
    source = tmp_path / "source"
    atomic_write(source / "x" / "1", b"1")
    atomic_write(source / "2", b"22")
    atomic_write(source / ".partial", b"no")
    storage = open_storage(str(tmp_path / "root"))
    storage.write_bytes("stage/stale", b"old")
    storage.upload_folder(source, "stage")
    assert storage.list() == ("stage/2", "stage/x/1")
    target = tmp_path / "target"
    atomic_write(target / "stale", b"old")
    storage.download_folder("stage", target)
    assert folder_digest(target) == folder_digest(source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["root", "source", "target"]


def test_a_folder_already_in_place_is_left_alone(tmp_path):
    storage = open_storage(str(tmp_path))
    storage.write_bytes("stage/x", b"1")
    inode = (tmp_path / "stage" / "x").stat().st_ino
    storage.upload_folder(tmp_path / "stage", "stage")
    storage.download_folder("stage", tmp_path / "stage")
    assert (tmp_path / "stage" / "x").stat().st_ino == inode


def test_missing_folders_are_named(tmp_path):
    storage = open_storage(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="nothing"):
        storage.download_folder("nothing", tmp_path / "target")
    with pytest.raises(FileNotFoundError, match="absent"):
        storage.upload_folder(tmp_path / "absent", "x")
    assert not (tmp_path / "target").exists()


def test_folder_digest_is_the_documented_formula(tmp_path):
    atomic_write(tmp_path / "b", b"22")
    atomic_write(tmp_path / "a" / "c", b"1")
    rows = [("a/c", 1, hashlib.sha256(b"1")), ("b", 2, hashlib.sha256(b"22"))]
    text = "".join(f"{name}\0{size}\0{content.hexdigest()}\n" for name, size, content in rows)
    assert folder_digest(tmp_path) == hashlib.sha256(text.encode()).hexdigest()


def test_folder_digest_sees_names_and_content_but_not_hidden_files(tmp_path):
    atomic_write(tmp_path / "a", b"1")
    digest = folder_digest(tmp_path)
    atomic_write(tmp_path / ".work" / "a", b"1")
    assert folder_digest(tmp_path) == digest
    atomic_write(tmp_path / "a", b"2")
    changed = folder_digest(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert len({digest, changed, folder_digest(tmp_path)}) == 3


def test_pointer_round_trip(tmp_path):
    storage = open_storage(str(tmp_path))
    assert read_pointer(storage, "data/pointer.json") is None
    write_pointer(storage, "data/pointer.json", POINTER)
    assert read_pointer(storage, "data/pointer.json") == POINTER


def test_every_torn_pointer_reads_as_none(tmp_path):
    storage = open_storage(str(tmp_path))
    write_pointer(storage, "pointer.json", POINTER)
    whole = storage.read_bytes("pointer.json")
    for length in range(len(whole)):
        storage.write_bytes("torn.json", whole[:length])
        assert read_pointer(storage, "torn.json") is None


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"stage": "data"}',
        b'{"stage": 1, "stage_hash": "a", "uri": "b", "digest": "c"}',
        b'{"stage": "s", "stage_hash": "a", "uri": "b", "digest": "c", "step": "3"}',
        b'{"stage": "s", "stage_hash": "a", "uri": "b", "digest": "c", "unknown": 1}',
    ],
)
def test_an_invalid_pointer_reads_as_none(tmp_path, content):
    storage = open_storage(str(tmp_path))
    storage.write_bytes("pointer.json", content)
    assert read_pointer(storage, "pointer.json") is None


def test_atomic_write_leaves_no_temporary_file_and_usual_permissions(tmp_path):
    atomic_write(tmp_path / "deep" / "x", b"1")
    (tmp_path / "plain").write_bytes(b"")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["x"]
    assert (tmp_path / "deep" / "x").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_full_disk_keeps_the_old_content_and_names_folder_space_and_remedy(tiny_disk):
    atomic_write(tiny_disk / "x", b"old")
    with pytest.raises(M1Error, match=r"bytes free\).*free space.*storage.root") as caught:
        atomic_write(tiny_disk / "x", b"1" * 200_000)
    assert str(tiny_disk) in str(caught.value)
    assert (tiny_disk / "x").read_bytes() == b"old"
    assert [path.name for path in tiny_disk.iterdir()] == ["x"]


def test_a_full_disk_during_a_folder_copy_leaves_no_half_folder(tiny_disk, tmp_path):
    for name in "abc":
        atomic_write(tmp_path / "source" / name, b"1" * 30_000)
    with pytest.raises(M1Error, match="bytes free"):
        open_storage(str(tiny_disk)).upload_folder(tmp_path / "source", "stage")
    assert list(tiny_disk.iterdir()) == []


def test_a_file_size_limit_is_reported_like_a_full_disk(tmp_path):
    code = (
        "import resource, sys; from pathlib import Path; from m1.storage import atomic_write\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "atomic_write(Path(sys.argv[1]) / 'x', b'1' * 5000)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert "M1Error" in result.stderr and "cannot take more data" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "bytes free"),
        (errno.EDQUOT, "bytes free"),
        (errno.EACCES, "make it writable"),
        (errno.EROFS, "make it writable"),
        (errno.ENOTDIR, "a file is in its place"),
    ],
)
def test_disk_errors_translates_what_a_user_can_mend(tmp_path, number, words):
    absent = tmp_path / "not" / "there"
    with pytest.raises(M1Error, match=words), disk_errors(absent):
        raise OSError(number, os.strerror(number))


def test_any_error_on_a_full_disk_is_put_down_to_it(tiny_disk):
    opened = contextlib.closing(sqlite3.connect(tiny_disk / "small.db"))
    full = pytest.raises(M1Error, match=r"cannot take more data.*bytes free")
    with opened as database, full as raised, disk_errors(tiny_disk):
        database.execute("CREATE TABLE t AS SELECT randomblob(100000) AS x")
    assert isinstance(raised.value.__cause__, sqlite3.OperationalError)


def test_disk_errors_lets_other_errors_rise(tmp_path):
    with pytest.raises(ZeroDivisionError), disk_errors(tmp_path):
        _ = 1 / 0
    with pytest.raises(FileNotFoundError), disk_errors(tmp_path):
        Path(tmp_path / "absent").read_bytes()


def test_s3_without_credentials_says_what_to_export(monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)
    with pytest.raises(M1Error, match="export both"):
        open_storage("s3://bucket/x").ensure_usable()


def test_s3_endpoint_with_a_path_is_refused(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.setenv("S3_ENDPOINT", "http://127.0.0.1:1/path")
    with pytest.raises(M1Error, match="without a path"):
        open_storage("s3://bucket/x").ensure_usable()


def test_an_unreachable_s3_endpoint_is_named(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.setenv("S3_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(M1Error, match=r"127.0.0.1:9 cannot be reached .*S3_ENDPOINT"):
        open_storage("s3://bucket/x").ensure_usable()
