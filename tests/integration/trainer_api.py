"""Plays a cluster with Kubeflow Trainer for tests of the launcher: an API and a controller.

TrainJobs are held to the published schema, what Kubernetes itself knows to its own, unknown fields
refused; CEL rules are not checked. `rights` is what a Role has to allow for all that was asked.
Pods are processes here: the controller starts the job's command as Trainer's torch plugin would,
with PET_* in the environment, and `play` decides what becomes of it. Deployments, Services and
autoscalers are kept, and become ready when told to.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import jsonschema
import kubernetes_validate
import yaml
from json_handler import JsonHandler
from published_schemas import schema_of

KUBERNETES = "1.33"
_ROUTE = re.compile(
    r"/(?:api|apis/(?P<group>[^/]+))/(?P<version>[^/]+)/namespaces/(?P<space>[^/]+)/(?P<kind>[^/]+)"
    r"(?:/(?P<name>[^/]+))?(?:/(?P<part>[^/]+))?$"
)


def run_command(job, pod):
    """Start what a pod of a TrainJob runs, on this machine."""
    trainer = job["spec"]["trainer"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={trainer['numProcPerNode']}", *trainer["args"]]
    given = {e["name"]: e["value"] for e in trainer["env"] if "value" in e}
    log = pod["log"].open("wb")
    return subprocess.Popen(
        command,
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**os.environ, **given},
        start_new_session=True,
    )


class TrainerApi:
    """A cluster of one namespace. `play(job, pod)` returns a process, or a final phase."""

    def __init__(self, folder, play=run_command):
        self.schema, self.play, self.folder = (
            schema_of("trainer.kubeflow.org/v1alpha1", "TrainJob"),
            play,
            Path(folder),
        )
        self.kept = {}  # (kind, name): object
        self.made, self.deleted, self.refused = [], [], []
        self.rights = set()  # (group, resource, verb)
        self.pods, self.lock = {}, threading.RLock()
        self.trouble, self.are_servers_ready = [], True
        self._closed = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        for work in (self._server.serve_forever, self._control):
            threading.Thread(target=work, daemon=True).start()

    def kubeconfig(self):
        path = self.folder / "kubeconfig"
        one = {
            "clusters": [{"name": "c", "cluster": {"server": self.url}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "users": [{"name": "u", "user": {}}],
        }
        path.write_text(yaml.safe_dump({"current-context": "c", **one}))
        return path

    def close(self):
        self._closed.set()
        self._server.shutdown()
        self._server.server_close()
        with self.lock:
            for pod in self.pods.values():
                _end(pod)

    def jobs(self):
        with self.lock:
            return [item for (kind, _), item in self.kept.items() if kind == "trainjobs"]

    def _control(self):
        while not self._closed.wait(0.05):
            with self.lock:
                for job in self.jobs():
                    self._reconcile(job)
                for name, pod in list(self.pods.items()):
                    if ("trainjobs", pod["job"]) not in self.kept:
                        _end(pod)
                        del self.pods[name]

    def _reconcile(self, job):
        name = job["metadata"]["name"]
        if job["spec"].get("suspend") or _is_over(job):
            return
        own = [pod for pod in self.pods.values() if pod["job"] == name]
        if not own:
            for index in range(job["spec"]["trainer"]["numNodes"]):
                pod = {"job": name, "index": index, "phase": "Pending", "started": time.time()}
                pod["log"] = self.folder / f"{name}-{index}-{len(self.made)}.log"
                pod["log"].write_text("")
                self.pods[f"{name}-node-0-{index}"] = pod
                self._step(job, pod)
            return
        for pod in own:
            self._step(job, pod)
        phases = {pod["phase"] for pod in own}
        limit = job["spec"].get("activeDeadlineSeconds")
        if "Failed" in phases:
            _conclude(job, "Failed", "JobsFailed", "jobset failed due to one or more job failures")
        elif phases == {"Succeeded"}:
            _conclude(job, "Complete", "JobsCompleted", "jobset completed successfully")
        elif limit and time.time() - own[0]["started"] > limit and self.ends_late:
            _conclude(job, "Failed", "DeadlineExceeded", "TrainJob exceeded its deadline")
            for pod in own:
                _end(pod)

    ends_late = True

    def _step(self, job, pod):
        if pod["phase"] == "Pending":
            pod["process"] = self.play(job, pod)
            pod["phase"] = "Running"
        process = pod["process"]
        if isinstance(process, str):
            pod["phase"] = process
        elif pod["phase"] == "Running" and process.poll() is not None:
            pod["phase"] = "Succeeded" if process.returncode == 0 else "Failed"


def _is_over(job):
    return any(c["status"] == "True" for c in job.get("status", {}).get("conditions", []))


def _conclude(job, kind, reason, message):
    moment = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    condition = {
        "type": kind,
        "status": "True",
        "reason": reason,
        "message": message,
        "lastTransitionTime": moment,
    }
    job["status"] = {"conditions": [condition]}


def _end(pod):
    process = pod.get("process")
    if not isinstance(process, str) and process is not None and process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    pod["phase"] = "Failed"


def _handler(api):
    class Handler(JsonHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body, route = self._body(), self._route()
            if route is None or self._is_troubled():
                return
            try:
                if route["kind"] == "trainjobs":
                    jsonschema.validate(body, api.schema)
                else:
                    kubernetes_validate.validate(body, KUBERNETES, strict=True)
            except (jsonschema.ValidationError, kubernetes_validate.ValidationError) as error:
                api.refused.append(error.message)
                self._answer(422, {"message": error.message})
                return
            key = (route["kind"], body["metadata"]["name"])
            with api.lock:
                if key in api.kept:
                    self._answer(409, {"message": "already exists"})
                    return
                api.kept[key] = body
                api.made.append(key)
            self._answer(201, body)

        def do_GET(self):
            route = self._route()
            if route is None or self._is_troubled():
                return
            if route["kind"] == "pods":
                self._pods(route)
                return
            with api.lock:
                found = api.kept.get((route["kind"], route["name"]))
                if found is not None and route["kind"] == "deployments":
                    ready = found["spec"]["replicas"] if api.are_servers_ready else 0
                    found = found | {"status": {"readyReplicas": ready}}
                if route["name"]:
                    self._answer(200 if found else 404, found or {"message": "not found"})
                    return
                wanted = self._labels()
                items = [
                    item
                    for (kind, _), item in api.kept.items()
                    if kind == route["kind"]
                    and wanted.items() <= item["metadata"].get("labels", {}).items()
                ]
            self._answer(200, {"items": items})

        def do_DELETE(self):
            route = self._route()
            if route is None or self._is_troubled():
                return
            key = (route["kind"], route["name"])
            with api.lock:
                found = api.kept.pop(key, None)
                api.deleted += [key] if found else []
            self._answer(200 if found else 404, {"status": "Success"})

        def _pods(self, route):
            with api.lock:
                pods = dict(api.pods)
            if route["part"] == "log":
                pod = pods.get(route["name"])
                self._log(pod) if pod else self._answer(404, {})
                return
            if route["name"]:
                found = api.kept.get(("pods", route["name"]))
                self._answer(200 if found else 404, found or {"message": "not found"})
                return
            wanted = self._labels().get("jobset.sigs.k8s.io/jobset-name")
            items = [_pod(n, p) for n, p in pods.items() if wanted in (None, p["job"])]
            self._answer(200, {"items": items})

        def _log(self, pod):
            """As an API server does: chunks while the container runs."""
            query = parse_qs(urlsplit(self.path).query)
            self.send_response(200)
            self.send_header("Content-Type", "text/plain")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            with contextlib.suppress(OSError):
                for line in self._lines(pod, query):
                    self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")
                self.wfile.write(b"0\r\n\r\n")

        def _lines(self, pod, query):
            place, number = 0, 0
            while True:
                is_over = pod["phase"] in ("Succeeded", "Failed")
                text = pod["log"].read_text(errors="replace")[place:]
                lines = text.splitlines(keepends=True)
                for line in lines:
                    if not line.endswith("\n") and not is_over:
                        break
                    place += len(line)
                    number += 1
                    stamp = f"2026-01-01T00:00:00.{number:09d}Z "
                    prefix = stamp if "timestamps" in query else ""
                    yield (prefix + line.rstrip("\n") + "\n").encode()
                if is_over or "follow" not in query or api._closed.wait(0.05):
                    return

        def _route(self):
            found = _ROUTE.match(urlsplit(self.path).path)
            if found is None:
                self._answer(404, {"message": f"no such path: {self.path}"})
                return None
            verbs = {"POST": "create", "DELETE": "delete", "PATCH": "patch"}
            verb = verbs.get(self.command, "get" if found["name"] else "list")
            part = f"/{found['part']}" if found["part"] else ""
            api.rights.add((found["group"] or "", found["kind"] + part, verb))
            return found

        def _labels(self):
            query = parse_qs(urlsplit(self.path).query).get("labelSelector", [""])[0]
            return dict(pair.split("=") for pair in query.split(",") if pair)

        def _is_troubled(self):
            if api.trouble:
                self._answer(api.trouble.pop(0), {"message": "trouble"})
                return True
            return False

    return Handler


def _pod(name, pod):
    labels = {
        "jobset.sigs.k8s.io/jobset-name": pod["job"],
        "batch.kubernetes.io/job-completion-index": str(pod["index"]),
    }
    containers = [{"name": "node"}]
    return {
        "metadata": {"name": name, "labels": labels},
        "spec": {"containers": containers},
        "status": {"phase": pod["phase"]},
    }
