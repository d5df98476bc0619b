import hashlib
import io
import tarfile
import zipfile

import pytest

from m1.swe.builder import Pair, Rejected, _gold_patch, build_pair
from m1.swe.files import is_source, is_test, python_path, steers
from m1.swe.releases import IndexUnreachable, PackageIndex, ReleaseError, Sdist, read_archive
from m1.swe.search import is_free
from m1.swe.store import EnvironmentStore

SDIST = Sdist("p", "1", "p-1.tar.gz", "")


def archive(path, members):
    with tarfile.open(path, "w:gz") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = tarfile.SYMTYPE, content
                file.addfile(info)
    return path


def test_files_are_read_below_the_top_folder_and_links_left_out(tmp_path):
    path = archive(tmp_path / "p.tar.gz", {"p-1/a.py": b"x", "p-1/l": "/etc/passwd"})
    assert read_archive(path, SDIST).files == {"a.py": b"x"}


def test_zip_archives_are_read_too(tmp_path):
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as file:
        file.writestr("p-1/a.py", "x")
    assert read_archive(tmp_path / "p.zip", SDIST).files == {"a.py": b"x"}


@pytest.mark.parametrize("name", ["p-1/../../x", "/p-1/x"])
def test_a_member_outside_its_folder_is_refused(tmp_path, name):
    with pytest.raises(ReleaseError, match="outside its folder"):
        read_archive(archive(tmp_path / "p.tar.gz", {name: b""}), SDIST)


def test_what_is_no_archive_is_refused(tmp_path):
    (tmp_path / "p.tar.gz").write_bytes(b"hello")
    with pytest.raises(ReleaseError, match="cannot be read"):
        read_archive(tmp_path / "p.tar.gz", SDIST)


def test_a_kept_archive_needs_no_index_and_an_absent_one_names_it(tmp_path):
    index = PackageIndex(tmp_path, url="http://127.0.0.1:9/simple")
    path = archive(tmp_path / "p.tar.gz", {"p-1/a.py": b"x"})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / digest[:16]).mkdir()
    path.rename(tmp_path / digest[:16] / "p-1.tar.gz")
    assert index.fetch("p", "1", sha256=digest).files == {"a.py": b"x"}
    with pytest.raises(IndexUnreachable, match="PIP_INDEX_URL"):
        index.fetch("p", "2")


@pytest.mark.parametrize(
    "path, test, source",
    [
        ("pkg/a.py", False, True),
        ("pkg/data.json", False, True),
        ("tests/a.py", True, False),
        ("pkg/tests/helper.txt", True, False),
        ("pkg/test_a.py", True, False),
        ("pkg/conftest.py", True, False),
        ("pkg/contest.py", False, True),
        ("test.py", True, False),
        ("pkg/test.py", False, True),
        ("setup.py", False, False),
        ("docs/conf.py", False, False),
        ("README.md", False, False),
        ("pkg/CHANGES.rst", False, False),
    ],
)
def test_files_are_tests_or_sources_or_neither(path, test, source):
    assert (is_test(path), is_source(path)) == (test, source)


@pytest.mark.parametrize(
    "path",
    ["sitecustomize.py", "a.pth", "pytest.ini", "setup.cfg", "x.egg-info/entry_points.txt",
     "json.py", "src/json/__init__.py", "pluggy.py", "src/_pytest/x.py", "pkg/a.so", "a.pyc"],
)  # fmt: skip
def test_files_that_steer_tests_are_known(tmp_path, path):
    (tmp_path / "pluggy").mkdir()
    (tmp_path / "_pytest").mkdir()
    assert steers(path, ["src"], str(tmp_path))
    assert not steers("src/pkg/json.py", ["src"], str(tmp_path))


def test_the_importable_folder_is_src_where_it_holds_code():
    assert python_path(["src/a/b.py", "tests/t.py"]) == ("src",)
    assert python_path(["a/b.py", "src/readme"]) == (".",)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("MIT; OSI Approved :: MIT License", True),
        ("BSD-3-Clause", True),
        ("OSI Approved :: Mozilla Public License 2.0 (MPL 2.0)", False),
        ("GNU GPL v3", False),
        ("MIT or GPLv2", False),
        ("", False),
    ],
)
def test_only_permissive_licences_are_free(text, expected):
    assert is_free(text) is expected


def test_changes_that_are_no_fault_are_rejected():
    with pytest.raises(Rejected, match="does not change"):
        _gold_patch({"a.py": b"x", "tests/t.py": b"1"}, {"a.py": b"x", "tests/t.py": b"2"})
    with pytest.raises(Rejected, match="a release, not a fault"):
        _gold_patch({"p/a.py": b""}, {"p/a.py": b"x = 1\n" * 700})
    with pytest.raises(Rejected, match="binary"):
        _gold_patch({"p/a.png": b"\0"}, {"p/a.png": b"\0\1"})


def test_a_pair_the_wrong_way_round_says_so(tmp_path):
    pair = Pair(package="p", base_version="1.10", fix_version="1.9")
    store = EnvironmentStore(tmp_path)
    with pytest.raises(Rejected, match="swap them"):
        build_pair(pair, PackageIndex(store.archives), store, None)


def test_a_version_that_is_absent_is_answered_with_its_neighbours(tmp_path, monkeypatch):
    index = PackageIndex(tmp_path, url="http://127.0.0.1:9")
    there = dict.fromkeys(("0.9", "1.0", "1.1", "1.3", "1.10", "2.0"))
    monkeypatch.setitem(index._listed, "p", there)
    with pytest.raises(ReleaseError, match=r"such as 1\.0, 1\.1, 1\.3, 1\.10, 2\.0$"):
        index.fetch("p", "1.4")
    with pytest.raises(ReleaseError, match="no version of it has one"):
        monkeypatch.setitem(index._listed, "p", {})
        index.fetch("p", "1.4")
