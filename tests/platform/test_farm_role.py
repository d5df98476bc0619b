"""The role of the farm beside the calls in the code of sandboxes."""

import re

import yaml
from rendering import MANIFESTS, PROJECT

RESOURCES = {
    "job": ("batch", "jobs"),
    "pod": ("", "pods"),
    "network_policy": ("networking.k8s.io", "networkpolicies"),
    "custom_object": ("agents.x-k8s.io", "sandboxes"),
}
_CALL = re.compile(r"\b(create|read|get|list|patch|replace|delete)_namespaced_(\w+)")
_EXEC = re.compile(r"\bconnect_get_namespaced_pod_exec\b")


def called():
    """(group, resource, verb) of every method of the client that the sandboxes' code names."""
    found = set()
    for path in (PROJECT / "src" / "m1" / "sandbox").rglob("*.py"):
        text = path.read_text()
        for verb, kind in _CALL.findall(text):
            found.add((*RESOURCES[kind], "get" if verb == "read" else verb))
        if _EXEC.search(text):
            # A WebSocket begins with GET; newer API servers ask for the right to create as well.
            found |= {("", "pods/exec", "get"), ("", "pods/exec", "create")}
    return found


def test_the_farm_s_role_allows_what_its_code_calls_and_nothing_else():
    text = (MANIFESTS / "base" / "sandbox" / "farm_account.yaml").read_text()
    (role,) = [item for item in yaml.safe_load_all(text) if item["kind"] == "Role"]
    allowed = {
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert len(called()) > 10 and allowed == called()
