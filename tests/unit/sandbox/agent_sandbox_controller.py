"""Plays kubernetes-sigs/agent-sandbox for tests: its API and its controller.

The API server of the one-node cluster cannot hold custom resources: it accepts the definition, and
dies at the first object (a JSON library of 2018 built with Go 1.19). So the objects are served from
here, held to the published schema with unknown fields refused; its CEL rules are not checked. The
pods that the controller makes are real.
"""

import threading
import time
from datetime import UTC, datetime
from http.server import ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import jsonschema
from json_handler import JsonHandler
from published_schemas import schema_of


class SandboxController:
    """Serves `Sandbox` objects, makes a pod for each, and deletes both at `shutdownTime`."""

    def __init__(self, backend):
        from kubernetes import client

        self.objects, self.lock = {}, threading.Lock()
        self.schema = schema_of("agents.x-k8s.io/v1beta1", "Sandbox")
        self._backend = backend
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        address = f"http://127.0.0.1:{self._server.server_port}"
        backend._objects = client.CustomObjectsApi(client.ApiClient(client.Configuration(address)))
        self._is_closed = threading.Event()
        self._threads = [
            threading.Thread(target=work, daemon=True)
            for work in (self._server.serve_forever, self._watch)
        ]
        for thread in self._threads:
            thread.start()

    def close(self):
        self._is_closed.set()
        self._server.shutdown()
        self._server.server_close()
        for thread in self._threads:
            thread.join()

    def _watch(self):
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        while not self._is_closed.wait(0.05):
            try:
                self._reconcile()
            except (ApiException, HTTPError, OSError):
                time.sleep(0.5)  # the API server is away, or an object changed under us

    def _reconcile(self):
        space, core = self._backend.config.namespace, self._backend.core
        selector = "m1.sandbox/name"
        pods = core.list_namespaced_pod(space, label_selector=selector).items
        ours = {p.metadata.name: p for p in pods if "agents.x-k8s.io/sandbox" in _notes(p)}
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        with self.lock:
            for name, item in list(self.objects.items()):
                if item["spec"].get("shutdownTime", "9") < now:
                    del self.objects[name]
            wanted = dict(self.objects)
        for name in set(ours) - set(wanted):
            if ours[name].metadata.deletion_timestamp is None:
                core.delete_namespaced_pod(name, space, grace_period_seconds=0)
        for name in set(wanted) - set(ours):
            template = wanted[name]["spec"]["podTemplate"]
            notes = {"annotations": {"agents.x-k8s.io/sandbox": name}}
            metadata = {"name": name, **template["metadata"], **notes}
            core.create_namespaced_pod(space, {"metadata": metadata, "spec": template["spec"]})


def _notes(pod):
    return pod.metadata.annotations or {}


def _handler(controller):
    class Handler(JsonHandler):
        def do_POST(self):
            body = self._body()
            try:
                jsonschema.validate(body, controller.schema | {"additionalProperties": True})
            except jsonschema.ValidationError as error:
                self._answer(422, {"message": error.message, "path": list(error.absolute_path)})
                return
            name = body["metadata"]["name"]
            with controller.lock:
                is_new = controller.objects.setdefault(name, body) is body
            self._answer(201 if is_new else 409, body)

        def do_GET(self):
            name = self._name()
            with controller.lock:
                if name:
                    found = controller.objects.get(name)
                    self._answer(200 if found else 404, found or {})
                    return
                query = parse_qs(urlsplit(self.path).query).get("labelSelector", [""])[0]
                wanted = dict(pair.split("=") for pair in query.split(",") if pair)
                items = [
                    item
                    for item in controller.objects.values()
                    if wanted.items() <= item["metadata"].get("labels", {}).items()
                ]
            self._answer(200, {"items": items})

        def do_PATCH(self):
            body = self._body()
            with controller.lock:
                found = controller.objects.get(self._name())
                if found:
                    found["spec"].update(body["spec"])
            self._answer(200 if found else 404, found or {})

        def do_DELETE(self):
            with controller.lock:
                found = controller.objects.pop(self._name(), None)
            self._answer(200 if found else 404, found or {})

        def _name(self):
            parts = urlsplit(self.path).path.split("/")
            return parts[7] if len(parts) > 7 else ""

    return Handler
