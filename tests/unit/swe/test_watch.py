"""What watches pytest's functions from beside code that nobody trusts."""

import builtins

from _pytest.reports import TestReport

from m1.swe.inside.child import watch


class Equal:
    """Says that it is whatever it is compared with."""

    def __eq__(self, other):
        return True

    def __hash__(self):
        return 0


def test_nothing_is_found_where_nothing_changed():
    changes = watch(builtins)
    changes.look()
    assert changes.found == set()


def test_a_replacement_that_claims_to_be_equal_is_found(monkeypatch):
    changes = watch(builtins)
    with monkeypatch.context() as patched:
        patched.setattr(TestReport, "from_item_and_call", Equal())
        changes.look()
    assert changes.found == {"_pytest.reports.TestReport.from_item_and_call"}


def test_a_replacement_beside_replaced_builtins_is_found(monkeypatch):
    changes = watch(builtins)
    with monkeypatch.context() as patched:
        for name in ("all", "map", "zip", "id", "vars", "getattr"):
            patched.setattr(builtins, name, lambda *_: True)
        patched.delattr(TestReport, "__repr__")
        changes.look()
    names = {f"builtins.{n}" for n in ("all", "map", "zip", "id", "vars", "getattr")}
    assert changes.found == {*names, "_pytest.reports.TestReport.__repr__"}
