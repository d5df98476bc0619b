import pytest

from m1.swe import diffs
from m1.swe.diffs import PatchError

CODE = b"def f(x):\n    y = 1\n    return x\n\n\nclass C:\n    def g(self):\n        return 1\n"
OLD = {"a.py": CODE,
       "gone.py": b"x = 1\n", "same.py": b"pass\n"}  # fmt: skip
NEW = {"a.py": CODE.replace(b"return x", b"return x + 1").replace(b"return 1", b"return 2"),
       "new.py": b"y = 2", "same.py": b"pass\n"}  # fmt: skip


def test_a_diff_applied_gives_the_new_files_and_its_reverse_the_old_ones():
    patch = diffs.tree_diff(OLD, NEW)
    assert diffs.apply(patch, OLD) == NEW
    assert diffs.apply(diffs.reverse(patch), NEW) == OLD
    assert diffs.apply(diffs.reverse(diffs.reverse(patch)), OLD) == NEW


def test_equal_trees_have_an_empty_diff():
    assert diffs.tree_diff(OLD, OLD) == ""


def test_touched_names_files_and_the_functions_of_the_old_side():
    patch = diffs.tree_diff(OLD, NEW)
    sources = {name: data.decode() for name, data in OLD.items()}
    found = diffs.touched(patch, sources)
    assert found.files == {"a.py", "gone.py", "new.py"}
    assert found.functions == {"a.py::f", "a.py::C.g"}


def test_an_inserted_line_belongs_to_the_function_it_stands_in():
    old = {"a.py": b"def f():\n    x = 1\n    return x\n\n\ndef g():\n    return 2\n"}
    new = {"a.py": old["a.py"].replace(b"    return x", b"    x += 1\n    return x")}
    found = diffs.touched(diffs.tree_diff(old, new), {"a.py": old["a.py"].decode()})
    assert found.functions == {"a.py::f"}


@pytest.mark.parametrize(
    "name", ["../x", "/etc/x", "a/../../x", ".git/hooks/post-checkout", "a/.git/config"]
)
def test_a_patch_that_leaves_the_tree_is_refused(name):
    patch = f"--- /dev/null\n+++ b/{name}\n@@ -0,0 +1 @@\n+x\n"
    with pytest.raises(PatchError, match="outside the tree"):
        diffs.parse(patch)


@pytest.mark.parametrize("mode", ["120000", "160000"])
def test_links_and_submodules_are_refused(mode):
    patch = (
        f"diff --git a/l b/l\nnew file mode {mode}\n--- /dev/null\n+++ b/l\n@@ -0,0 +1 @@\n+/etc\n"
    )
    with pytest.raises(PatchError, match="symbolic link or submodule"):
        diffs.parse(patch)


@pytest.mark.parametrize("patch", ["hello", "--- a/x\n+++ b/x\n@@ -1,3 +1,1 @@\n-a\n"])
def test_what_is_no_diff_is_refused(patch):
    with pytest.raises(PatchError):
        diffs.parse(patch)


def test_a_patch_that_does_not_fit_is_refused():
    with pytest.raises(PatchError, match="does not apply"):
        diffs.apply(diffs.tree_diff({"a": b"1\n"}, {"a": b"2\n"}), {"a": b"3\n"})
