"""On one node of Kubernetes 1.20: what the API server takes, and what runs there."""

import json

import httpx
import pytest
from one_node_platform import KEY, NEWER_APIS, SECRET, TOKEN
from rendering import MANIFESTS, is_builtin, render

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def store(platform):
    """A client of the S3 server, whose buckets the setup has made."""
    from minio import Minio

    platform.ready_pod("m1-platform", "minio-setup")
    address = platform.url(platform.ready_pod("m1-platform", "minio"), 9000)
    host = address.removeprefix("http://")
    return Minio(host, access_key=KEY, secret_key=SECRET, secure=False)


@pytest.fixture(scope="module")
def rollout(platform, make_model, tiny_config, tmp_path_factory, store):
    """A tiny model where the inference server looks for it, and that server's address."""
    from m1.data.tokenizer import Tokenizer, train_tokenizer
    from m1.model.hf import export_hf

    folder = tmp_path_factory.mktemp("policy")
    train_tokenizer(["what is one and one", "one and two is three"], vocab_size=300, folder=folder)
    tokenizer = Tokenizer(folder)
    model = make_model(tiny_config, vocab_size=320)
    export_hf(model, tiny_config, folder, eos_token_id=tokenizer.end, pad_token_id=tokenizer.pad)
    for path in folder.iterdir():
        store.fput_object("m1-runs", f"m1/register/model/{path.name}", str(path))
    platform.start_rollout()
    return platform.url(platform.ready_pod("kubeflow", "m1-rollout"), 8000)


@pytest.mark.parametrize("name", ["kind", "cluster"])
def test_the_api_server_takes_every_object_of_its_kinds(platform, name):
    text = json.dumps(render(MANIFESTS / "overlays" / name))
    sent = [i for i in json.loads(text) if is_builtin(i) and i["apiVersion"] not in NEWER_APIS]
    for item in sent:
        if item["kind"] in ("StatefulSet", "Job"):  # of those that run little may change
            item["metadata"]["name"] += "-again"
    assert len(sent) > 30
    said = platform.apply(sent, "--dry-run=server")
    assert said.count("(server dry run)") == len(sent)


def test_the_api_server_refuses_a_manifest_that_cannot_be(platform):
    (item,) = [
        i for i in platform.items if i["kind"] == "Deployment" and "mlflow" in str(i["metadata"])
    ]
    changed = json.loads(json.dumps(item))
    changed["metadata"]["name"] = "broken"
    changed["spec"]["selector"]["matchLabels"] = {"app": "other"}
    with pytest.raises(AssertionError, match=r"selector.*does not match template"):
        platform.apply([changed], "--dry-run=server")


def test_the_setup_makes_buckets_whose_scratch_expires(store):
    assert {bucket.name for bucket in store.list_buckets()} >= {"m1-runs", "mlflow"}
    (rule,) = store.get_bucket_lifecycle("m1-runs").rules
    assert (rule.rule_filter.prefix, rule.expiration.days) == ("scratch/", 7)


def test_mlflow_keeps_artifacts_in_the_store(platform, store, tmp_path):
    from mlflow import MlflowClient

    address = platform.url(platform.ready_pod("m1-platform", "mlflow"), 5000)
    client = MlflowClient(address)
    run = client.create_run(client.create_experiment("one-node"))
    (tmp_path / "report.txt").write_text("kept")
    client.log_metric(run.info.run_id, "rl/reward", 0.5)
    client.log_artifact(run.info.run_id, str(tmp_path / "report.txt"))
    assert client.get_run(run.info.run_id).data.metrics == {"rl/reward": 0.5}
    (found,) = [
        o for o in store.list_objects("mlflow", recursive=True) if "report.txt" in o.object_name
    ]
    assert store.get_object("mlflow", found.object_name).read() == b"kept"


def test_mlflow_refuses_requests_for_other_hosts(platform):
    address = platform.url(platform.ready_pod("m1-platform", "mlflow"), 5000)
    path = f"{address}/api/2.0/mlflow/experiments/search?max_results=1"
    assert httpx.get(path).status_code == 200
    assert httpx.get(path, headers={"Host": "evil.example"}).status_code == 403


def test_an_inference_server_loads_its_model_from_the_store_and_answers(rollout):
    body = {"prompt": "what is one", "max_tokens": 4, "seed": 1}
    assert httpx.post(f"{rollout}/v1/completions", json=body).status_code == 401
    headers = {"Authorization": f"Bearer {TOKEN}"}
    answer = httpx.post(f"{rollout}/v1/completions", json=body, headers=headers, timeout=60)
    assert answer.json()["usage"]["completion_tokens"] > 0
    metrics = httpx.get(f"{rollout}/metrics", headers=headers).text
    assert 'm1_requests_total{path="/v1/completions",status="200"} 1.0' in metrics


@pytest.mark.parametrize(
    ("namespace", "group", "resource", "verb", "is_allowed"),
    [
        ("kubeflow", "trainer.kubeflow.org", "trainjobs", "create", True),
        ("kubeflow", "apps", "deployments", "delete", True),
        ("kubeflow", "", "pods/log", "get", True),
        ("m1-sandbox", "batch", "jobs", "create", True),
        ("m1-sandbox", "", "pods/exec", "create", True),
        ("kubeflow", "", "pods/exec", "create", False),
        ("kubeflow", "", "secrets", "list", False),
        ("m1-platform", "", "secrets", "get", False),
        ("m1-platform", "apps", "deployments", "delete", False),
        ("m1-sandbox", "networking.k8s.io", "networkpolicies", "delete", False),
        ("default", "", "pods", "list", False),
    ],
)
def test_pipelines_may_do_what_they_need_and_no_more(
    platform, namespace, group, resource, verb, is_allowed
):
    from kubernetes import client

    resource, _, part = resource.partition("/")
    asked = {"namespace": namespace, "group": group, "resource": resource, "verb": verb}
    user = "system:serviceaccount:kubeflow:m1-pipeline"
    review = {"spec": {"user": user, "resourceAttributes": asked | {"subresource": part}}}
    answer = client.AuthorizationV1Api(platform.api).create_subject_access_review(review)
    assert answer.status.allowed is is_allowed
