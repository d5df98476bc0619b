"""Jobs for the launcher's tests: a recipe of two nodes, pods that fail or hang."""

import subprocess
import sys
from pathlib import Path

from m1.config.loading import load_recipe
from m1.launcher import objects
from m1.launcher.job import RunLabels

RUN = RunLabels("run-1", "monday's run", "high")
SERVERS = [
    'rl.rollout.urls=["cluster"]',
    "resources.rollout.min_replicas=2",
    "resources.rollout.max_replicas=4",
    "resources.rollout.source=/work/base",
]


def program(text):
    """A pod that runs a Python program; of its first node only, the others wait."""

    def play(job, pod):
        code = text if pod["index"] == 0 else "import time; time.sleep(600)"
        log = pod["log"].open("wb")
        command = [sys.executable, "-u", "-c", code]
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )

    return play


HANG = program("import time; print('working', flush=True); time.sleep(600)")


def recipe(folder, *sets):
    volume = f'[{{claim="work", path="{folder}", is_shared=true}}]'
    return load_recipe(
        [Path("tests/recipes/mini.toml")],
        overrides=[
            f"storage.root={folder}",
            'image="registry.example.com/m1@sha256:1"',
            "pretrain.parallel.data=2",
            "resources.trainer.poll_seconds=0.05",
            "resources.pretrain.launcher=trainjob",
            "resources.pretrain.num_nodes=2",
            "resources.pretrain.num_accelerators=1",
            "resources.pretrain.memory=64Gi",
            "resources.pretrain.shared_memory=16Gi",
            'resources.pretrain.node_selector={"gpu"="h100"}',
            'resources.pretrain.tolerations=[{key="nvidia.com/gpu", effect="NoSchedule"}]',
            'resources.pretrain.secrets=[{name="s3", environment={key="S3_KEY"}}]',
            f"resources.pretrain.volumes={volume}",
            *sets,
        ],
    )


def body_of(launcher, job):
    resources = job.recipe.resources
    return objects.train_job(
        launcher._identity(job),
        resources.of("pretrain"),
        resources.trainer,
        image=job.recipe.image,
        folder=str(job.folder),
        num_processes=2,
    )
