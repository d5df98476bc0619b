import http.server
import io
import socket
import threading
import time

import pytest
from rich.console import Console

from m1 import doctor
from m1.doctor import Finding, examine, render
from m1.doctor_remote import cluster_state, s3_state
from m1.types import M1Error
from m1.ui import serve


@pytest.fixture
def bare_environment(monkeypatch, tmp_path):
    for name in ("S3_ENDPOINT", "AWS_ENDPOINT_URL", "KUBECONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def silent_port():
    """Accepts connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_examination_names_every_topic_once_and_is_quick(bare_environment):
    started = time.monotonic()
    findings = examine()
    assert time.monotonic() - started < 15
    topics = [finding.topic for finding in findings]
    assert len(set(topics)) == len(topics)
    expected = {"Python", "torch", "GPU", "Sandbox", "S3", "Cluster", "kfp", "mlflow", "Disk"}
    assert expected <= set(topics)


def test_everything_missing_says_what_to_do(bare_environment):
    for finding in examine():
        assert finding.detail
        if finding.status == "missing":
            assert finding.remedy


def test_look_that_raises_becomes_a_finding(monkeypatch):
    def explode():
        raise RuntimeError("boom")

    monkeypatch.setattr(doctor, "_LOOKS", {"Bomb": explode})
    [finding] = examine()
    assert (finding.topic, finding.status) == ("Bomb", "missing")
    assert "boom" in finding.detail


def test_look_that_hangs_becomes_a_finding(monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(doctor, "_LOOK_SECONDS", 0.2)
    monkeypatch.setattr(doctor, "_LOOKS", {"Slow": release.wait})
    [finding] = examine()
    release.set()
    assert "no answer" in finding.detail


def test_table_shows_details_and_remedies_literally():
    console = Console(file=io.StringIO(), width=120)
    render([Finding("GPU", "missing", "none [x]", "pip install 'm1[gpu]'")], console)
    text = console.file.getvalue()
    assert "none [x]" in text
    assert "m1[gpu]" in text


def test_unset_services_are_no_failure(bare_environment):
    assert s3_state(timeout_seconds=1)[0] is None
    assert cluster_state(timeout_seconds=1)[0] is None


def test_s3_that_never_answers_is_given_up(bare_environment, monkeypatch, silent_port):
    monkeypatch.setenv("S3_ENDPOINT", f"http://127.0.0.1:{silent_port}")
    started = time.monotonic()
    is_ok, detail = s3_state(timeout_seconds=0.5)
    assert is_ok is False
    assert str(silent_port) in detail
    assert time.monotonic() - started < 4


def test_buckets_of_an_answering_s3_are_counted(bare_environment, monkeypatch):
    body = (
        b"<ListAllMyBucketsResult><Buckets><Bucket><Name>corpus</Name>"
        b"<CreationDate>2026-01-01T00:00:00.000Z</CreationDate></Bucket></Buckets>"
        b"</ListAllMyBucketsResult>"
    )

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("S3_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        is_ok, detail = s3_state(timeout_seconds=5)
        server.shutdown()
    assert is_ok
    assert "1 buckets" in detail


def test_cluster_that_never_answers_is_given_up(
    bare_environment, monkeypatch, silent_port, tmp_path
):
    pytest.importorskip("kubernetes")
    path = tmp_path / "kubeconfig"
    path.write_text(
        f"""apiVersion: v1
kind: Config
current-context: c
clusters: [{{name: c, cluster: {{server: "http://127.0.0.1:{silent_port}"}}}}]
users: [{{name: u, user: {{token: t}}}}]
contexts: [{{name: c, context: {{cluster: c, user: u}}}}]
"""
    )
    # The client's default location is read once, at import.
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(path))
    monkeypatch.setenv("KUBECONFIG", str(path))
    started = time.monotonic()
    is_ok, detail = cluster_state(timeout_seconds=0.5)
    assert is_ok is False
    assert str(silent_port) in detail
    assert time.monotonic() - started < 4


def test_lineage_page_refuses_a_busy_port(tmp_path, silent_port):
    with pytest.raises(M1Error, match=f"Port {silent_port} cannot be used"):
        serve(f"sqlite:///{tmp_path}/mlflow.db", root=tmp_path, port=silent_port)


def test_lineage_page_of_a_server_names_its_address(tmp_path):
    with pytest.raises(M1Error, match="http://mlflow:5000"):
        serve("http://mlflow:5000", root=tmp_path, port=1)
