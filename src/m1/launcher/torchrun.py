"""A stage of several processes on this machine, started by torchrun.

What the ranks print is in `ranks.log` in the stage's folder. One rank that fails ends the others,
and all of them end with the launcher, even by SIGKILL.
"""

import os
import subprocess
import sys

from m1.config.stages import image_digest
from m1.launcher.job import StageJob
from m1.stage import exit_with_launcher
from m1.types import Pointer

LOG = "ranks.log"


class TorchrunLauncher:
    """Processes of this machine; see `m1.launcher.job.Launcher`."""

    def run(self, job: StageJob) -> Pointer:
        """Run a job; see `Launcher.run`."""
        exit_with_launcher()
        job.prepare()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={job.num_processes}", "-m", "m1.rank", str(job.folder)]
        environment = {
            **os.environ,
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # megatron's overlap of collectives asks for it
            "M1_IMAGE_DIGEST": image_digest(),
            "M1_LAUNCHER_PID": str(os.getpid()),
        }
        log = job.folder / LOG
        with log.open("wb") as file:
            ended = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False
            )
        return job.outcome(
            f"stage {job.name} failed on one of its {job.num_processes} processes (torchrun ended "
            f"with status {ended.returncode}); its words are in {log}. Run the same command to go "
            "on"
        )
