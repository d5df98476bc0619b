"""S3 through a proxy that breaks requests: nothing is lost, nothing is corrupt."""

import datetime
import ipaddress
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import pytest
from faulty_proxy import faulty_proxy

from m1.storage import (
    atomic_write,
    folder_digest,
    open_storage,
    parts,
    publish_pointer,
    read_pointer,
)
from m1.storage.leases import hold_lease
from m1.storage.lifecycle import RULE, set_lifecycle
from m1.types import M1Error, Pointer

PART = 5 << 20
"""The smallest part that S3 servers take."""


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(parts, "PART_BYTES", PART)


@pytest.fixture
def proxy(s3_bucket, s3_server, monkeypatch):
    with faulty_proxy(s3_server.endpoint) as (address, faults):
        monkeypatch.setenv("S3_ENDPOINT", address)
        monkeypatch.setenv("S3_STALL_SECONDS", "1")
        monkeypatch.setenv("S3_RETRY_SECONDS", "20")
        yield faults


@pytest.fixture
def source(tmp_path) -> Path:
    """One file of several parts and a few small ones."""
    folder = tmp_path / "source"
    atomic_write(folder / "shard", os.urandom(3 * PART + 1234))
    for number in range(3):
        atomic_write(folder / "small" / str(number), os.urandom(1000 * number))
    return folder


def is_get(method, path):
    return method == "GET" and "list-type" not in path


def is_put(method, path):
    return method == "PUT"


def also(*kinds):
    """Kinds of which the default run leaves out those that another kind stands for."""
    return [pytest.param(kind, marks=pytest.mark.exhaustive) for kind in kinds]


@pytest.mark.parametrize("kind", ["alter_request", *also("500", "502", "reset", "lose_answer")])
def test_uploads_survive(kind, proxy, small_parts, source, s3_bucket, tmp_path):
    storage = open_storage(f"s3://{s3_bucket}/runs")
    proxy.plan(kind, 4, is_put)
    storage.upload_folder(source, "made")
    assert proxy.done == 4
    storage.download_folder("made", tmp_path / "target")
    assert folder_digest(tmp_path / "target") == folder_digest(source)


@pytest.mark.parametrize("kind", ["lose_answer", *also("500", "reset", "truncate")])
def test_starting_and_completing_an_upload_survives(
    kind, proxy, small_parts, source, s3_bucket, tmp_path
):
    storage = open_storage(f"s3://{s3_bucket}/runs")
    proxy.plan(kind, 2, lambda method, path: method == "POST")
    storage.upload_folder(source, "made")
    assert proxy.done == 2
    storage.download_folder("made", tmp_path / "target")
    assert folder_digest(tmp_path / "target") == folder_digest(source)


@pytest.mark.parametrize("kind", ["502", "trickle", *also("500", "reset", "truncate", "stall")])
def test_downloads_survive(kind, proxy, small_parts, source, s3_bucket, tmp_path):
    storage = open_storage(f"s3://{s3_bucket}/runs")
    storage.upload_folder(source, "made")
    proxy.plan(kind, 4, is_get)
    storage.download_folder("made", tmp_path / "target")
    assert proxy.done == 4
    assert folder_digest(tmp_path / "target") == folder_digest(source)


def test_altered_bytes_are_noticed_and_fetched_again(
    proxy, small_parts, source, s3_bucket, tmp_path
):
    storage = open_storage(f"s3://{s3_bucket}/runs")
    storage.upload_folder(source, "made")
    proxy.plan("alter_answer", 1, lambda method, path: is_get(method, path) and "shard" in path)
    storage.download_folder("made", tmp_path / "target")
    assert proxy.done == 1
    assert folder_digest(tmp_path / "target") == folder_digest(source)
    storage.write_bytes("note", b"content")
    proxy.plan("alter_answer", 1, is_get)
    assert storage.read_bytes("note") == b"content" and proxy.done == 1


def test_an_object_that_differs_from_its_digest_is_refused_and_makes_no_folder(
    proxy, small_parts, s3_bucket, tmp_path
):
    storage = open_storage(f"s3://{s3_bucket}/runs")
    wrong = parts.metadata_headers([parts.digests_of(b"y")], 1)
    client = storage.connection.client
    client._execute("PUT", s3_bucket, "runs/made/a", body=b"x", headers=wrong)
    with pytest.raises(M1Error, match="differs from the digest"):
        storage.download_folder("made", tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_a_server_that_stays_broken_ends_with_a_message_in_time(
    proxy, source, s3_bucket, monkeypatch
):
    storage = open_storage(f"s3://{s3_bucket}/runs")
    monkeypatch.setenv("S3_RETRY_SECONDS", "1")
    proxy.plan("502", 10_000)
    started = time.monotonic()
    with pytest.raises(M1Error, match="look at the server, then run the same command"):
        storage.upload_folder(source, "made")
    assert time.monotonic() - started < 20


def test_an_upload_that_was_killed_shows_nothing_and_goes_on_where_it_stopped(
    proxy, s3_bucket, tmp_path
):
    folder = tmp_path / "source"
    atomic_write(folder / "shard", os.urandom(8 * PART))
    program = (
        "import sys; from pathlib import Path; from m1.storage import open_storage, parts; "
        f"parts.PART_BYTES = {PART}; "
        "open_storage(sys.argv[1]).upload_folder(Path(sys.argv[2]), 'made')"
    )
    root = f"s3://{s3_bucket}/runs"
    command = [sys.executable, "-c", program, root, str(folder)]

    def sent() -> int:
        return sum(size for method, path, size in proxy.seen if method == "PUT")

    proxy.pause_seconds = 0.3
    process = subprocess.Popen(command)
    deadline = time.monotonic() + 60
    while sent() < 3 * PART and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.5)  # some parts are answered
    assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    storage = open_storage(root)
    assert storage.list("made") == ()
    before, proxy.pause_seconds = sent(), 0.0
    assert before < 8 * PART
    proxy.plan("", 0)
    subprocess.run(command, check=True)
    assert 0 < sent() < 8 * PART  # not all of it again
    assert list(folder.iterdir()) == [folder / "shard"]  # nothing left over
    storage.download_folder("made", tmp_path / "target")
    assert folder_digest(tmp_path / "target") == folder_digest(folder)
    proxy.plan("", 0)
    subprocess.run(command, check=True)
    assert sent() == 0  # it is there


def test_a_download_that_failed_goes_on_where_it_stopped(
    proxy, small_parts, source, s3_bucket, tmp_path, monkeypatch
):
    storage = open_storage(f"s3://{s3_bucket}/runs")
    storage.upload_folder(source, "made")
    monkeypatch.setenv("S3_RETRY_SECONDS", "0.1")
    arrived = iter(range(100))
    proxy.plan(
        "reset", 10_000, lambda m, path: is_get(m, path) and "shard" in path and next(arrived) > 1
    )
    with pytest.raises(M1Error, match="cannot be reached"):
        storage.download_folder("made", tmp_path / "target")
    assert not (tmp_path / "target").exists()
    proxy.plan("", 0)
    storage.download_folder("made", tmp_path / "target")
    fetched = [path for method, path, _ in proxy.seen if is_get(method, path)]
    assert 1 <= len([path for path in fetched if "shard" in path]) <= 3  # of 4 ranges
    assert folder_digest(tmp_path / "target") == folder_digest(source)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source", "target"]


def test_of_many_that_publish_one_pointer_one_wins_and_all_learn_which(proxy, s3_bucket):
    proxy.plan("lose_answer", 3, is_put)
    results: list[Pointer] = []

    def publish(number: int) -> None:
        storage = open_storage(f"s3://{s3_bucket}/runs")
        mine = Pointer("sft", "a" * 64, storage.uri(f"attempt{number}"), "d" * 64)
        results.append(publish_pointer(storage, "sft/pointer.json", mine))

    threads = [threading.Thread(target=publish, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    held = read_pointer(open_storage(f"s3://{s3_bucket}/runs"), "sft/pointer.json")
    assert results == [held] * 8 and proxy.done == 3


def test_a_lease_waits_for_the_living_and_follows_the_dead(s3_bucket):
    connection = open_storage(f"s3://{s3_bucket}/runs").connection
    pace = {"renew_seconds": 0.2, "expiry_seconds": 2.0}
    with hold_lease(connection, "lock", owner="a", timeout_seconds=1, **pace):
        with (
            pytest.raises(TimeoutError, match="holds s3://"),
            hold_lease(connection, "lock", owner="b", timeout_seconds=3, **pace),
        ):
            pass
        etag = connection.client.stat_object(s3_bucket, "lock").etag
    with hold_lease(connection, "lock", owner="b", timeout_seconds=0, **pace):
        assert connection.client.stat_object(s3_bucket, "lock").etag != etag
    from m1.storage.leases import _content
    from m1.storage.uploads import put_bytes

    put_bytes(connection, "lock", _content("dead"))
    with hold_lease(connection, "lock", owner="dead", timeout_seconds=0, **pace):
        pass  # its own successor need not wait
    put_bytes(connection, "lock", _content("dead"))
    with hold_lease(connection, "lock", owner="b", timeout_seconds=5, **pace):
        pass


def test_a_stream_reads_an_object_by_ranges_and_keeps_to_one_version(
    proxy, small_parts, source, s3_bucket
):
    storage = open_storage(f"s3://{s3_bucket}/runs")
    content = b"".join(b"line %d\n" % number for number in range(1_000_000))
    atomic_write(source / "lines", content)
    storage.upload_file(source / "lines", "lines")
    proxy.plan("truncate", 2, is_get)
    with storage.open_read("lines") as stream:
        assert sum(1 for _ in stream) == 1_000_000
        stream.seek(-8, os.SEEK_END)
        assert stream.read() == content[-8:]
        stream.seek(0)
        storage.write_bytes("lines", b"other")
        with pytest.raises(M1Error, match="was replaced while it was read"):
            stream.read()
    assert proxy.done == 2
    with pytest.raises(FileNotFoundError):
        storage.open_read("absent")


def test_no_transfer_holds_a_whole_object_in_memory(small_parts, s3_bucket, tmp_path):
    storage = open_storage(f"s3://{s3_bucket}/runs")
    path = tmp_path / "source" / "large"
    path.parent.mkdir()
    path.write_bytes(os.urandom(48 << 20))
    tracemalloc.start()
    try:
        storage.upload_folder(path.parent, "made")
        storage.download_folder("made", tmp_path / "target")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 32 << 20
    assert folder_digest(tmp_path / "target") == folder_digest(path.parent)


def test_tls_is_verified_and_a_wrong_authority_is_no_reason_to_wait(
    s3_bucket, s3_server, tmp_path, monkeypatch
):
    certificate = tmp_path / "server.pem"
    certificate.write_bytes(_certificate())
    with faulty_proxy(s3_server.endpoint, certificate=certificate) as (address, _):
        monkeypatch.setenv("S3_ENDPOINT", address)
        started = time.monotonic()
        with pytest.raises(M1Error, match="CERTIFICATE_VERIFY_FAILED"):
            open_storage(f"s3://{s3_bucket}").write_bytes("a", b"one")
        assert time.monotonic() - started < 5
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        storage = open_storage(f"s3://{s3_bucket}")
        storage.write_bytes("a", b"one")
        assert storage.read_bytes("a") == b"one"


def test_keys_come_from_files_that_may_change(s3_bucket, s3_server, tmp_path, monkeypatch):
    keys = {name: s3_server.environment[name] for name in s3_server.environment if "KEY" in name}
    for name, value in keys.items():
        monkeypatch.delenv(name)
        (tmp_path / name).write_text(f"{value}\n")
        monkeypatch.setenv(f"{name}_FILE", str(tmp_path / name))
    storage = open_storage(f"s3://{s3_bucket}")
    storage.write_bytes("a", b"one")
    (tmp_path / "AWS_SECRET_ACCESS_KEY").write_text("revoked")
    with pytest.raises(M1Error, match="SignatureDoesNotMatch"):
        storage.read_bytes("a")
    (tmp_path / "AWS_SECRET_ACCESS_KEY").write_text(keys["AWS_SECRET_ACCESS_KEY"])
    assert storage.read_bytes("a") == b"one"


def test_lifecycle_rules_are_set_beside_those_of_others(s3_bucket):
    from minio.commonconfig import Filter
    from minio.lifecycleconfig import Expiration, LifecycleConfig, Rule

    storage = open_storage(f"s3://{s3_bucket}/runs")
    other = Rule(
        "Enabled", rule_filter=Filter(prefix="x/"), rule_id="x", expiration=Expiration(days=3)
    )
    storage.connection.client.set_bucket_lifecycle(s3_bucket, LifecycleConfig([other]))
    for days in (3, 5):
        set_lifecycle(storage, abort_after_days=days)
    rules = {r.rule_id: r for r in storage.connection.client.get_bucket_lifecycle(s3_bucket).rules}
    assert rules.keys() == {"x", f"{RULE}-runs"}
    mine = rules[f"{RULE}-runs"]
    assert mine.rule_filter.prefix == "runs/"
    assert mine.abort_incomplete_multipart_upload.days_after_initiation == 5


def _certificate() -> bytes:
    """A self-signed certificate for 127.0.0.1 with its key, as PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "m1 test")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return built.public_bytes(serialization.Encoding.PEM) + private
