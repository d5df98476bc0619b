"""A real Kubernetes of one node for tests: started once, with an image, a namespace, a CRD.

The programs come from a folder beside the checkout (`../shared/k8s`, or M1_K8S) and Debian packages
that `.ci/run` installs. kustomize's output is applied, so the manifests are tested too.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import yaml

PROJECT = Path(__file__).parents[3]
TOOLS = Path(os.environ.get("M1_K8S", PROJECT.parent / "shared" / "k8s"))
SCHEMAS = Path(os.environ.get("M1_CRDS", PROJECT.parent / "shared" / "schemas" / "crds"))
PROGRAMS = ("etcd", "containerd", "runc", "iptables", "ip", "openssl", "xz")
PACKAGES = (
    "bash",
    "coreutils",
    "dash",
    "findutils",
    "grep",
    "sed",
    "tar",
    "procps",
    "python3",
    "git",
)
DROPPED = {
    "x-kubernetes-validations",
    "x-kubernetes-list-map-keys",
    "x-kubernetes-list-type",
}
IMAGE = "localhost/python:1"


def missing():
    """Why no cluster can be started here; None when it can."""
    if os.geteuid() != 0:
        return "a one-node cluster needs root"
    if not (TOOLS / "cluster").exists():
        return f"no one-node cluster in {TOOLS} (M1_K8S)"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"programs are missing: {', '.join(absent)}" if absent else None


class OneNodeCluster:
    """Up on construction; `close` leaves nothing but unpacked programs."""

    def __init__(self):
        os.environ["NO_PROXY"] = os.environ["no_proxy"] = "10.0.0.0/8,localhost,127.0.0.1"
        for name in [name for name in os.environ if name.lower() in ("http_proxy", "https_proxy")]:
            del os.environ[name]
        self.tools = TOOLS
        self.is_kept = "M1_K8S_DIR" in os.environ  # for work on these tests: up once, used often
        folder = os.environ.get("M1_K8S_DIR") or f"{tempfile.gettempdir()}/m1-k8s-{os.getpid()}"
        self.folder = Path(folder)
        archive = Path(tempfile.gettempdir()) / "m1-k8s-python.tar"
        try:
            net = "10.78.251" if self.is_kept else f"10.78.{os.getpid() % 250}"
            self.kubeconfig = self.run("up", "--net", net).strip().splitlines()[-1]
            maker = [sys.executable, str(TOOLS / "make_image.py"), "--packages", ",".join(PACKAGES)]
            subprocess.run([*maker, "--name", IMAGE, str(archive)], check=True, capture_output=True)
            self.run("load", str(archive))
            self.kubectl("apply", "-k", str(PROJECT / "manifests" / "base" / "sandbox"))
        except BaseException:
            self.close()
            raise
        finally:
            archive.unlink(missing_ok=True)

    def run(self, *arguments):
        command = [sys.executable, str(TOOLS / "cluster"), "--dir", str(self.folder), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def kubectl(self, *arguments):
        return self.run("kubectl", *arguments)

    def processes(self, name):
        """Ids on this machine of the cluster's programs of a name."""
        found = []
        for path in Path("/proc").iterdir():
            if path.name.isdigit():
                try:
                    words = (path / "cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue
                if words[0].endswith(name.encode()) and str(self.folder).encode() in b" ".join(
                    words
                ):
                    found.append(int(path.name))
        return found

    def close(self):
        if not self.is_kept:
            self.run("down", "--purge")


class SandboxController:
    """Plays the controller of agent-sandbox, which does not run on Kubernetes 1.20.

    The CRD is installed without what that version refuses: CEL rules, empty defaults, and the merge
    keys that need them. For each `Sandbox` a pod of its template is made, owned by it; at
    `shutdownTime` it is deleted.
    """

    def __init__(self, cluster, backend):
        self._backend = backend
        path = SCHEMAS / "agents.x-k8s.io_sandboxes.yaml"
        definition = _without_rules(yaml.safe_load(path.read_text()))
        target = cluster.folder / "crd.yaml"
        target.write_text(yaml.safe_dump(definition))
        cluster.kubectl("apply", "--validate=false", "-f", str(target))
        cluster.kubectl(
            "wait", "--for", "condition=established", f"crd/{definition['metadata']['name']}"
        )
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def close(self):
        self._is_closed.set()
        self._thread.join()

    def _watch(self):
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        while not self._is_closed.wait(0.1):
            try:
                self._reconcile()
            except (ApiException, HTTPError, OSError):
                time.sleep(0.5)  # the API server is away, or an object changed under us

    def _reconcile(self):
        place = self._backend._place
        objects = self._backend._objects.list_namespaced_custom_object(*place)["items"]
        pods = self._backend.core.list_namespaced_pod(self._backend.config.namespace).items
        have = {pod.metadata.name for pod in pods}
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        for item in objects:
            name, spec = item["metadata"]["name"], item["spec"]
            if spec.get("shutdownTime", "9") < now and spec.get("shutdownPolicy") == "Delete":
                self._backend._objects.delete_namespaced_custom_object(*place, name)
            elif name not in have and "deletionTimestamp" not in item["metadata"]:
                owner = {
                    "apiVersion": item["apiVersion"], "kind": item["kind"], "name": name,
                    "uid": item["metadata"]["uid"], "controller": True,
                }  # fmt: skip
                template = spec["podTemplate"]
                metadata = {"name": name, "ownerReferences": [owner], **template["metadata"]}
                body = {"metadata": metadata, "spec": template["spec"]}
                self._backend.core.create_namespaced_pod(self._backend.config.namespace, body)


def _without_rules(value):
    if isinstance(value, dict):
        return {
            key: _without_rules(item)
            for key, item in value.items()
            if key not in DROPPED and (key, item) != ("default", "")
        }
    return [_without_rules(item) for item in value] if isinstance(value, list) else value
