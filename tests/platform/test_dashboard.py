import json
import re

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from rendering import MANIFESTS

from m1.inference.core import EngineCore
from m1.inference.limits import EngineLimits
from m1.inference.loop import EngineLoop
from m1.inference.server.metrics import Metrics
from m1.sandbox.farm.metrics import FarmMetrics

MONITORING = MANIFESTS / "base" / "monitoring"


@pytest.fixture(scope="module")
def exported(tiny_model):
    """Samples' names, and the labels of each, as Prometheus reads them."""
    core = EngineCore(tiny_model, num_tokens=64, limits=EngineLimits(num_slots=1, num_pages=4))
    server = Metrics(EngineLoop(core, tiny_model, max_waiting=1))
    server.requests.labels("/generate", "200").inc()
    server.finished.labels("length").inc()
    farm = FarmMetrics("bubblewrap")
    farm.failed("open")
    from prometheus_client import generate_latest

    found = {}
    for text in (server.render().decode(), generate_latest(farm.registry).decode()):
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found.setdefault(sample.name, set()).update(sample.labels)
    return found


def expressions():
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"], target["legendFormat"]
    for item in yaml.safe_load_all((MONITORING / "alerts.yaml").read_text()):
        for rule in item["spec"]["groups"][0]["rules"]:
            yield rule["alert"], rule["expr"], ""


def test_every_panel_and_alert_asks_for_what_is_exported(exported):
    names = {name for _, text, _ in expressions() for name in re.findall(r"\bm1_\w+", text)}
    assert len(names) > 20
    assert names <= exported.keys()


def test_every_panel_groups_and_names_by_labels_that_exist(exported):
    scraped = {"namespace", "pod"}  # which Prometheus adds
    for title, text, legend in expressions():
        (*_, last) = re.findall(r"\bm1_\w+", text)
        labels = exported[last] | scraped
        grouped = {
            name.strip() for by in re.findall(r"by \((.*?)\)", text) for name in by.split(",")
        }
        assert grouped <= labels, title
        used = set(re.findall(r"\{\{(\w+)\}\}", legend))
        assert used <= (grouped or labels), title


def test_everything_exported_but_bookkeeping_is_on_the_dashboard(exported):
    shown = {name for _, text, _ in expressions() for name in re.findall(r"\bm1_\w+", text)}
    absent = {
        n for n in exported if not n.endswith(("_created", "_sum", "_count")) and n not in shown
    }
    assert absent == set()


def test_the_autoscaler_s_metric_is_exported_and_adapted(exported):
    scaling = yaml.safe_load_all((MANIFESTS / "base" / "rollout" / "scaling.yaml").read_text())
    (scaler,) = [item for item in scaling if item["kind"] == "HorizontalPodAutoscaler"]
    (name,) = [metric["pods"]["metric"]["name"] for metric in scaler["spec"]["metrics"]]
    assert name in exported
    (rule,) = yaml.safe_load((MONITORING / "adapter_rules.yaml").read_text())["rules"]
    assert re.fullmatch(rule["name"]["matches"], name)
    assert rule["seriesQuery"].startswith(name)
