"""The KFP v2beta1 endpoints that `m1 submit` uses, for tests.

Every request and response is checked against the published swagger (KFP 2.17.0), unknown fields and
query parameters refused. What the server does with them is ours: a full KFP did not run.
"""

import json
import os
import re
import threading
import uuid
from datetime import UTC, datetime, timedelta
from email import message_from_bytes
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import jsonschema
import yaml
from json_handler import JsonHandler

PROJECT = Path(__file__).parents[2]
SWAGGER = Path(
    os.environ.get(
        "M1_KFP_SWAGGER", PROJECT.parent / "shared" / "schemas" / "kfp_v2beta1.swagger.json"
    )
)


def closed_definitions(swagger):
    """Definitions that refuse fields they do not name."""
    found = {}
    for name, schema in swagger["definitions"].items():
        if schema.get("properties") and "additionalProperties" not in schema:
            # Any is open by nature: details of errors.
            schema = schema | {"additionalProperties": name == "protobufAny"}
        found[name] = schema
    return found


class KfpApi:
    """A server on a free port. `trouble` holds (status, body) answers that come first."""

    def __init__(self, token="token-1", cookie=None):
        self.swagger = json.loads(SWAGGER.read_text())
        self.definitions = closed_definitions(self.swagger)
        self.token, self.cookie = token, cookie
        self.pipelines, self.versions, self.runs, self.experiments = {}, {}, {}, {}
        self.calls, self.violations, self.trouble = [], [], []
        self.num_looks, self.looks_until_end, self.end = 0, 2, "SUCCEEDED"
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()
        assert not self.violations, self.violations

    def operations(self, word):
        return [name for name in self.calls if word in name]

    def route(self, method, path):
        for template, methods in self.swagger["paths"].items():
            pattern = re.sub(r"\{[^}]+\}", r"([^/:]+)", template)
            found = re.fullmatch(pattern, path)
            if found and method.lower() in methods:
                return methods[method.lower()], [unquote(value) for value in found.groups()]
        return None, []

    def check(self, value, schema, where):
        if "$ref" not in schema and schema.get("type") != "object":
            return
        validator = jsonschema.Draft4Validator({**schema, "definitions": self.definitions})
        for error in validator.iter_errors(value):
            self.violations.append(f"{where}: {error.message} at {list(error.absolute_path)}")

    # What the endpoints do, by operation

    def list_pipelines(self, query):
        return {"pipelines": _selected(self.pipelines, query)}

    def create_pipeline(self, body):
        if any(p["name"] == body["name"] for p in self.pipelines.values()):
            return 409, {"code": 6, "message": "already exists"}
        made = body | {"pipeline_id": str(uuid.uuid4()), "created_at": _now()}
        self.pipelines[made["pipeline_id"]] = made
        return made

    def list_versions(self, pipeline_id, query):
        own = {k: v for k, v in self.versions.items() if v["pipeline_id"] == pipeline_id}
        return {"pipeline_versions": _selected(own, query)}

    def upload_version(self, query, file):
        name = query["name"]
        if any(v["name"] == name for v in self.versions.values()):
            return 409, {"code": 6, "message": f"version {name} already exists"}
        documents = list(yaml.safe_load_all(file))
        made = {
            "pipeline_id": query["pipelineid"],
            "pipeline_version_id": str(uuid.uuid4()),
            "name": name,
            "display_name": name,
            "created_at": _now(),
            "pipeline_spec": {"pipeline_spec": documents[0]},
        }
        self.versions[made["pipeline_version_id"]] = made
        return made

    def list_experiments(self, query):
        return {"experiments": _selected(self.experiments, query)}

    def create_experiment(self, body):
        made = body | {"experiment_id": str(uuid.uuid4()), "created_at": _now()}
        self.experiments[made["experiment_id"]] = made
        return made

    def create_run(self, body):
        version = self.versions[body["pipeline_version_reference"]["pipeline_version_id"]]
        made = body | {
            "run_id": str(uuid.uuid4()),
            "created_at": _now(),
            "state": "PENDING",
            "pipeline_spec": version["pipeline_spec"],
        }
        self.runs[made["run_id"]] = made
        return made

    def list_runs(self, query):
        return {"runs": list(reversed(_selected(self.runs, query)))}

    def get_run(self, run_id):
        run = self.runs.get(run_id)
        if run is None:
            return 404, {"code": 5, "message": f"run {run_id} not found"}
        self.num_looks += 1
        if run["state"] in ("PENDING", "RUNNING"):
            run["state"] = self.end if self.num_looks >= self.looks_until_end else "RUNNING"
        elif run["state"] == "CANCELING":
            run["state"] = "CANCELED"
        tasks = run["pipeline_spec"]["pipeline_spec"]["root"]["dag"]["tasks"]
        run["run_details"] = {
            "task_details": [_task(name, run["state"]) for name in ("root", "root-driver", *tasks)]
        }
        return run

    def terminate(self, run_id):
        self.runs[run_id]["state"] = "CANCELING"
        return {}


def _task(name, state):
    task = {
        "task_id": str(uuid.uuid4()),
        "display_name": name,
        "state": state,
        "start_time": _now(-20),
        "end_time": _now() if state == "SUCCEEDED" else "1970-01-01T00:00:00Z",
    }
    if state == "FAILED" and name == "data":
        task["error"] = {"code": 13, "message": "the disk is full"}
    elif state == "FAILED":
        task["state"] = "SKIPPED"
    return task


def _now(seconds=0):
    return (datetime.now(UTC) + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


def _selected(items, query):
    found = list(items.values())
    for predicate in json.loads(query.get("filter", "{}")).get("predicates", []):
        assert predicate["operation"] in (1, "EQUALS"), predicate
        found = [i for i in found if i.get(predicate["key"]) == predicate["stringValue"]]
    return found


def _handler(api):
    class Handler(JsonHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self._handle("GET")

        def do_POST(self):
            self._handle("POST")

        def _handle(self, method):
            parts = urlsplit(self.path)
            raw = self._raw()
            operation, values = api.route(method, parts.path)
            if operation is None:
                api.violations.append(f"{method} {parts.path} is no published endpoint")
                return self._answer(404, {"code": 5, "message": "no such endpoint"})
            name = operation["operationId"]
            api.calls.append(name)
            query = {k: v[0] for k, v in parse_qs(parts.query).items()}
            known = {p["name"] for p in operation.get("parameters", []) if p["in"] == "query"}
            api.violations += [f"{name}: unknown query {k}" for k in query if k not in known]
            if api.trouble:
                status, body = api.trouble.pop(0)
                return self._answer(status, body)
            if not self._is_known():
                body = {"code": 16, "message": "token is expired"}
                return self._answer(401, body)
            body = None
            for parameter in operation.get("parameters", []):
                if parameter["in"] == "body":
                    body = json.loads(raw or b"{}")
                    api.check(body, parameter["schema"], f"request of {name}")
            answer = self._do(name, values, query, body, raw)
            status, answer = answer if isinstance(answer, tuple) else (200, answer)
            schema = operation["responses"]["200" if status == 200 else "default"]["schema"]
            api.check(answer, schema, f"response of {name}")
            self._answer(status, answer)

        def _is_known(self):
            if api.cookie is not None:
                return self.headers.get("Cookie") == api.cookie
            return self.headers.get("Authorization") == f"Bearer {api.token}"

        def _do(self, name, values, query, body, raw):
            match name.partition("_")[2] or name:
                case "ListPipelines":
                    return api.list_pipelines(query)
                case "CreatePipeline":
                    return api.create_pipeline(body)
                case "ListPipelineVersions":
                    return api.list_versions(values[0], query)
                case "UploadPipelineVersion":
                    return api.upload_version(query, _file(self.headers, raw))
                case "ListExperiments":
                    return api.list_experiments(query)
                case "CreateExperiment":
                    return api.create_experiment(body)
                case "CreateRun":
                    return api.create_run(body)
                case "ListRuns":
                    return api.list_runs(query)
                case "GetRun":
                    return api.get_run(values[0])
                case "TerminateRun":
                    return api.terminate(values[0])
                case "GetHealthz":
                    return {"multi_user": False}
            api.violations.append(f"{name} is not expected of m1 submit")
            return 501, {"code": 12, "message": "not here"}

    return Handler


def _file(headers, raw):
    message = message_from_bytes(
        b"Content-Type: " + headers["Content-Type"].encode() + b"\r\n\r\n" + raw
    )
    (part,) = message.get_payload()
    return part.get_payload(decode=True)
