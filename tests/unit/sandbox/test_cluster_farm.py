"""What a farm in a real cluster must stand: numbers, and the death of every side."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from sandbox_limits import LIMITS

from m1.sandbox.base import SandboxError, SandboxGone
from m1.sandbox.farm.leasing import Farm, FarmConfig
from m1.sandbox.kubernetes import KubernetesBackend
from m1.sandbox.pods import ClusterConfig

pytestmark = pytest.mark.cluster
SMALL = replace(LIMITS, memory_mib=64, scratch_mib=8)
OPENER = """
import sys, time
from m1.sandbox.kubernetes import KubernetesBackend
from m1.sandbox.pods import ClusterConfig
backend = KubernetesBackend(ClusterConfig(kubeconfig=sys.argv[1], lease_seconds=20, farm="killed"))
box = backend.open()
print(box.name, flush=True)
box.exec(["sleep", "600"])
"""


def until(test, seconds=150):  # a busy node's controllers take their time
    deadline = time.monotonic() + seconds
    while not test():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def pods(backend):
    return [p.metadata.name for p in backend.core.list_namespaced_pod("m1-sandbox").items]


def jobs(backend):
    return {job.metadata.name for job in backend._batch.list_namespaced_job("m1-sandbox").items}


def test_thirty_sandboxes_at_once(kubernetes_backend):
    barrier = threading.Barrier(30)

    def episode(number):
        with farm.lease(limits=SMALL) as sandbox:
            barrier.wait(200)  # all thirty are open now
            result = sandbox.exec(["sh", "-c", f"echo {number} > n; cat n"])
            return int(result.stdout)

    sizes = FarmConfig(max_sandboxes=30)
    with Farm(kubernetes_backend, sizes) as farm, ThreadPoolExecutor(30) as threads:
        assert list(threads.map(episode, range(30))) == list(range(30))
    until(lambda: not pods(kubernetes_backend))


def test_a_killed_client_leaves_nothing_after_its_lease(cluster, kubernetes_backend):
    command = [sys.executable, "-c", OPENER, cluster.kubeconfig]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    name = owner.stdout.readline().strip()
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert name in jobs(kubernetes_backend)
    until(lambda: name not in jobs(kubernetes_backend))  # nobody of ours deletes it
    until(lambda: not any(pod.startswith(name) for pod in pods(kubernetes_backend)))


def test_a_deleted_pod_is_an_infrastructure_error(kubernetes_backend):
    with kubernetes_backend.open(limits=SMALL) as sandbox:
        pod = next(p for p in pods(kubernetes_backend) if p.startswith(sandbox.name))
        found = []

        def run():
            try:
                found.append(sandbox.exec(["sleep", "30"]))
            except SandboxError as error:
                found.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        time.sleep(1.5)
        kubernetes_backend.core.delete_namespaced_pod(pod, "m1-sandbox", grace_period_seconds=0)
        thread.join()
        assert isinstance(found[0], SandboxError), found
        with pytest.raises(SandboxGone):
            sandbox.exec(["true"])
    until(lambda: not pods(kubernetes_backend))


def test_without_the_api_server_for_ten_seconds_every_episode_ends(cluster, kubernetes_backend):
    (server,) = cluster.processes("kube-apiserver")
    verdicts, errors = [], []

    def episode(_):
        try:
            with kubernetes_backend.open(limits=SMALL) as sandbox:
                for _ in range(4):
                    result = sandbox.exec(["sh", "-c", "sleep 1; echo ok"])
                    assert result.stdout == b"ok\n"
                verdicts.append(result.exit_code)
        except SandboxError as error:
            errors.append(error)

    with ThreadPoolExecutor(3) as threads:
        work = [threads.submit(episode, number) for number in range(6)]
        time.sleep(4)
        os.kill(server, signal.SIGSTOP)
        time.sleep(10)
        os.kill(server, signal.SIGKILL)  # the cluster starts another after a second
        for future in work:
            future.result(timeout=150)
    assert len(verdicts) + len(errors) == 6
    assert verdicts
    until(lambda: not jobs(kubernetes_backend))
    until(lambda: not pods(kubernetes_backend))


def test_a_lease_can_be_renewed(cluster):
    backend = KubernetesBackend(ClusterConfig(kubeconfig=cluster.kubeconfig, lease_seconds=6))
    with backend.open(limits=SMALL) as sandbox:
        sandbox.renew(120)
        time.sleep(8)
        assert sandbox.exec(["echo", "on"]).stdout == b"on\n"


def test_a_namespace_without_policy_is_refused(cluster):
    config = ClusterConfig(kubeconfig=cluster.kubeconfig, namespace="default")
    with pytest.raises(SandboxError, match="manifests/base/sandbox"):
        KubernetesBackend(config)


def test_an_image_that_does_not_exist_is_an_error_with_its_reason(cluster):
    config = ClusterConfig(
        kubeconfig=cluster.kubeconfig, image="localhost/missing:1", image_pull_policy="Never"
    )
    with pytest.raises(SandboxError, match="ErrImageNeverPull"):
        KubernetesBackend(config).open(limits=SMALL)


def test_the_farm_account_may_open_sandboxes_and_no_more(cluster):
    user = "system:serviceaccount:m1-sandbox:m1-sandbox-farm"

    def may(*words):
        done = subprocess.run(
            [sys.executable, str(cluster.tools / "cluster"), "--dir", str(cluster.folder),
             "kubectl", "-n", "m1-sandbox", "auth", "can-i", *words, "--as", user],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        return done.stdout.strip() == "yes"

    assert may("create", "jobs")
    assert may("create", "pods", "--subresource=exec")
    assert not may("create", "pods")
    assert not may("get", "secrets")
    assert not may("delete", "networkpolicies")
