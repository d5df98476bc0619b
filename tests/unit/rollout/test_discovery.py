"""Names that stand for several inference servers."""

import pytest

from m1.rollout.discovery import SERVERS_VARIABLE, expand
from m1.types import M1Error


def test_addresses_stay_and_names_become_what_they_resolve_to():
    found = expand(["http://given:1", "dns+http://127.0.0.1:8000", "http://given:1"])
    assert found == ["http://given:1", "http://127.0.0.1:8000"]
    assert "http://127.0.0.1:80" in expand(["dns+http://localhost:80"])


def test_an_ipv6_address_is_bracketed():
    assert expand(["dns+http://[::1]:80"]) == ["http://[::1]:80"]


def test_the_clusters_servers_are_where_the_launcher_says(monkeypatch):
    monkeypatch.setenv(SERVERS_VARIABLE, "dns+http://127.0.0.1:8000")
    assert expand(["cluster"]) == ["http://127.0.0.1:8000"]
    monkeypatch.delenv(SERVERS_VARIABLE)
    with pytest.raises(M1Error, match=r"no resources\.rollout"):
        expand(["cluster"])


def test_a_name_that_is_not_known_is_named():
    with pytest.raises(M1Error, match=r"no inference server is found at nowhere\.invalid"):
        expand(["dns+http://nowhere.invalid:80"])
