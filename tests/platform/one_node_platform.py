"""The base of the manifests on a real Kubernetes: applied, waited for, reached."""

import contextlib
import json
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import host_image
import yaml
from one_node_cluster import OneNodeCluster
from rendering import render

OVERLAY = Path(__file__).parent / "one_node"
NEWER_APIS = ("autoscaling/v2", "policy/v1")
"""Which the test cluster's API server, of 1.20, does not have."""
KEY, SECRET, TOKEN = "m1-test", "m1-test-secret", "m1-test-token"


def platform_secrets():
    """(namespace, name) -> values: the Secrets of the runbook, and SeaweedFS's accounts."""
    s3 = {"access_key_id": KEY, "secret_access_key": SECRET}
    account = {"name": "m1", "credentials": [{"accessKey": KEY, "secretKey": SECRET}]}
    account["actions"] = ["Admin", "Read", "Write", "List", "Tagging"]
    return {
        ("m1-platform", "minio-root"): {"user": KEY, "password": SECRET},
        ("m1-platform", "mlflow-postgres"): {"password": "unused"},
        ("m1-platform", "mlflow-s3"): s3,
        ("m1-platform", "m1-s3"): s3,
        ("kubeflow", "m1-s3"): s3,
        ("kubeflow", "m1-rollout"): {"token": TOKEN},
        ("m1-platform", "seaweed-identities"): {"s3.json": json.dumps({"identities": [account]})},
    }


def is_rollout(item):
    return item["kind"] == "Deployment" and item["metadata"]["name"] == "m1-rollout"


class Platform:
    """A cluster with the platform on it."""

    def __init__(self, ours):
        """`ours` writes the archive of the image of our programs."""
        from kubernetes import client, config

        self.cluster = OneNodeCluster("open")
        self.forwards = []
        try:
            self._load(ours)
            self.api = config.new_client_from_config(self.cluster.kubeconfig)
            self.core = client.CoreV1Api(self.api)
            self._prepare()
            first = [i for i in self.items if "minio" in i["metadata"]["name"]]
            self.apply([i for i in first if i["kind"] != "Job"])  # a Job's pods cannot change later
            store = self.ready_pod("m1-platform", "minio")
            self._name({"minio": store.status.pod_ip})
            self.apply([i for i in self.items if not is_rollout(i)])
        except BaseException:
            self.close()
            raise

    def close(self):
        for forward in self.forwards:
            forward.kill()
            forward.wait()
        self.cluster.close()

    def _load(self, ours):
        with tempfile.TemporaryDirectory(dir=self.cluster.folder) as name:
            folder = Path(name)
            for number, write in enumerate((ours, host_image.write_store)):
                archive = folder / f"{number}.tar"
                write(archive)
                self.cluster.load(archive)

    def _prepare(self):
        text = json.dumps(render(OVERLAY)).replace("PACKAGES", str(host_image.PACKAGES))
        self.items = [i for i in json.loads(text) if i["apiVersion"] not in NEWER_APIS]
        names = ["kubeflow", "m1-platform", "m1-sandbox", "monitoring"]
        self.apply(
            [{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": n}} for n in names]
            + [
                {
                    "apiVersion": "v1",
                    "kind": "Secret",
                    "metadata": {"namespace": namespace, "name": name},
                    "stringData": values,
                }
                for (namespace, name), values in platform_secrets().items()
            ]
        )

    def _name(self, addresses):
        """Let pods find services by name: there is neither DNS nor kube-proxy."""
        aliases = [
            {"ip": ip, "hostnames": [name, f"{name}.m1-platform.svc.cluster.local"]}
            for name, ip in addresses.items()
        ]
        for item in self.items:
            if item["kind"] in ("Deployment", "Job"):
                item["spec"]["template"]["spec"]["hostAliases"] = aliases

    def start_rollout(self):
        """Start the inference server, once there is a model."""
        self.apply([item for item in self.items if is_rollout(item)])

    def apply(self, items, *options):
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            yaml.safe_dump_all(items, file)
            file.flush()
            return self.cluster.kubectl("apply", *options, "-f", file.name)

    def ready_pod(self, namespace, app, seconds=240):
        """The pod of an app, once it is ready or has succeeded."""
        deadline = time.monotonic() + seconds
        selector = f"app.kubernetes.io/name={app}"
        while time.monotonic() < deadline:
            for pod in self.core.list_namespaced_pod(namespace, label_selector=selector).items:
                conditions = {c.type: c.status for c in pod.status.conditions or ()}
                if pod.status.phase == "Succeeded" or conditions.get("Ready") == "True":
                    return pod
            time.sleep(0.5)
        raise TimeoutError(f"{app} is not ready:\n{self.describe(namespace, selector)}")

    def describe(self, namespace, selector):
        place = ("--namespace", namespace, "--selector", selector)
        text = self.cluster.kubectl("describe", "pods", *place)[-3000:]
        with contextlib.suppress(AssertionError):
            text += self.cluster.kubectl("logs", *place, "--all-containers", "--tail=40")
        return text

    def url(self, pod, port):
        """Address here of a pod's port."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            local = free.getsockname()[1]
        command = [f"{self.cluster.folder}/bin/kubectl", "--kubeconfig", self.cluster.kubeconfig]
        command += ["port-forward", "--namespace", pod.metadata.namespace]
        command += [f"pod/{pod.metadata.name}", f"{local}:{port}"]
        forward = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.forwards.append(forward)
        line = forward.stdout.readline().decode()
        assert line.startswith("Forwarding from"), line
        return f"http://127.0.0.1:{local}"
