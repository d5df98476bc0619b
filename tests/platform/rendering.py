"""The manifests as kustomize renders them: what `kubectl apply -k` would send."""

import functools
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

PROJECT = Path(__file__).parents[2]
MANIFESTS = PROJECT / "manifests"
OLDEST = (4, 5)
"""Of kustomize: components, labels and patches as we write them."""


@functools.cache
def renderer():
    """The command that renders a folder; None where there is none, or an old one only."""
    if shutil.which("kustomize"):
        return ("kustomize", "build")
    if shutil.which("kubectl") is None:
        return None
    asked = ["kubectl", "version", "--client", "--output", "json"]
    found = json.loads(subprocess.run(asked, capture_output=True, check=True).stdout)
    version = found.get("kustomizeVersion", "v2.0").lstrip("v").split(".")
    return ("kubectl", "kustomize") if tuple(map(int, version[:2])) >= OLDEST else None


@functools.cache
def text_of(folder):
    if renderer() is None:
        pytest.skip("needs kustomize 4.5, or a kubectl that holds one")
    done = subprocess.run([*renderer(), str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr, done.stderr
    return done.stdout


@functools.cache
def render(folder):
    """Objects of a folder, in order."""
    return tuple(yaml.load_all(text_of(folder), yaml.CSafeLoader))


def key_of(item):
    return (item["kind"], item["metadata"].get("namespace", ""), item["metadata"]["name"])


def is_builtin(item):
    """Whether Kubernetes itself has the kind."""
    group = item["apiVersion"].rpartition("/")[0]
    return "." not in group or (group.endswith("k8s.io") and not group.endswith("x-k8s.io"))


def pod_specs(items):
    """(name of the owner, spec) of every pod template, those inside custom resources too."""
    for item in items:
        if item["kind"] in ("Deployment", "StatefulSet", "Job"):
            yield item["metadata"]["name"], item["spec"]["template"]["spec"]
        if item["kind"] == "ClusterTrainingRuntime":
            for job in item["spec"]["template"]["spec"]["replicatedJobs"]:
                yield item["metadata"]["name"], job["template"]["spec"]["template"]["spec"]


def containers(spec):
    return [*spec.get("initContainers", ()), *spec["containers"]]
