import configparser
import json
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from m1.service_files import claim_ports, write_configuration, write_program, write_s3
from m1.storage import LocalStorage


def test_supervisord_reads_back_the_command_that_was_written(tmp_path):
    (tmp_path / "programs").mkdir()
    command = ["/bin/x", "a b", "50%", "it's", '"quoted"']
    write_program(tmp_path, "p", command, environment={"A": "b c"}, extra={"autorestart": "false"})
    parser = configparser.ConfigParser()  # interpolates %, as supervisord does
    parser.read(tmp_path / "programs" / "p.conf")
    assert shlex.split(parser["program:p"]["command"])[-len(command) :] == command
    assert parser["program:p"]["environment"] == 'A="b c"'
    assert parser["program:p"]["autorestart"] == "false"
    write_configuration(tmp_path, tmp_path / "socket")
    parser.read(tmp_path / "supervisord.conf")
    assert parser["include"]["files"] == f"{tmp_path}/programs/*.conf"


def test_a_service_that_starts_again_ends_what_its_last_start_left(tmp_path):
    start = [sys.executable, "-m", "m1.service_alone"]
    leaves = ["sh", "-c", "sleep 300 & echo $!; exec sleep 300"]

    def begin(name):
        process = subprocess.Popen([*start, str(tmp_path / name), *leaves], stdout=subprocess.PIPE)
        return process, psutil.Process(int(process.stdout.readline()))

    (first, orphan), (other, bystander) = begin("one"), begin("other")
    first.kill()
    first.wait()
    assert orphan.is_running()
    again, child = begin("one")
    try:
        orphan.wait(timeout=5)
        assert child.is_running() and bystander.is_running()
        assert again.poll() is None
    finally:
        for process in (again, child, other, bystander):
            process.kill()
            process.wait()


def test_keys_of_the_s3_server_stand_in_files_of_this_user_only(tmp_path):
    for name in ("programs", "secrets"):
        (tmp_path / name).mkdir()
    for name in ("access_key", "secret_key"):
        (tmp_path / "secrets" / name).write_text(f"the-{name}")
    claim_ports(tmp_path)
    write_s3(tmp_path, json.loads((tmp_path / "services.json").read_text()))
    for name in ("s3.json", "aws"):
        path = tmp_path / "secrets" / name
        assert path.stat().st_mode & 0o777 == 0o600 and "the-secret_key" in path.read_text()
    assert "the-" not in (tmp_path / "programs" / "s3.conf").read_text()


def claimed(folder):
    folder.mkdir(exist_ok=True)
    claim_ports(folder)
    ports = json.loads((folder / "services.json").read_text()).values()
    return {*ports, *(port + 10_000 for port in ports)}


def test_folders_have_distinct_ports_and_keep_them(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(claimed, [tmp_path / name for name in "abcd"]))
    assert len(set().union(*found)) == 4 * 12
    assert claimed(tmp_path / "b") == found[1]
    (tmp_path / "a" / "services.json").unlink()  # what is gone has no claim
    listed = json.loads(next(tmp_path.glob("m1-services-*.json")).read_text())
    assert len(listed) == 4
    claimed(tmp_path / "b")
    listed = json.loads(next(tmp_path.glob("m1-services-*.json")).read_text())
    assert sorted(Path(name).name for name in listed) == ["b", "c", "d"]


def test_a_file_is_created_once_and_a_lock_has_one_holder(tmp_path):
    storage = LocalStorage(tmp_path)
    assert storage.create_bytes("a/b", b"one") and not storage.create_bytes("a/b", b"two")
    assert storage.read_bytes("a/b") == b"one" and storage.list() == ("a/b",)
    with storage.hold("lock", owner="", timeout_seconds=0):
        refused = False
        try:
            with LocalStorage(tmp_path).hold("lock", owner="", timeout_seconds=0.1):
                pass
        except TimeoutError:
            refused = True
    assert refused
