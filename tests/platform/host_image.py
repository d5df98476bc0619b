"""Images of this machine's files, built in seconds: Debian's Python, our sources, an S3 server.

They stand in for those of images/, whose packages would take minutes. Python packages are not in
them: the overlay of the tests mounts this environment's.
"""

import site
import subprocess
import sys
from pathlib import Path

from one_node_cluster import PROJECT, TOOLS

PACKAGES = Path(site.getsitepackages()[0])
OURS, STORE = "localhost/m1:1", "localhost/s3:1"
DEBIAN = "bash,coreutils,dash,libgomp1,libstdc++6,python3"


def write_ours(archive, folder):
    """`m1`, `mlflow` and `python3`, as user 65532."""
    for program, module in {"m1": "m1.cli:main", "mlflow": "mlflow.cli:cli"}.items():
        where, _, what = module.partition(":")
        script = folder / program
        script.write_text(f"#!/usr/bin/python3\nfrom {where} import {what}\n{what}()\n")
        script.chmod(0o755)
    paths = [f"{folder / name}:/usr/local/bin/{name}" for name in ("m1", "mlflow")]
    paths += [f"{PROJECT / name}:/opt/m1/{name}" for name in ("src", "kernels")]
    _write(archive, OURS, paths, "PYTHONPATH=/opt/m1/src:/opt/m1/kernels:/opt/packages")


def write_store(archive):
    """SeaweedFS, in the place of MinIO."""
    weed = Path(sys.executable).with_name("weed").resolve()
    _write(archive, STORE, [f"{weed}:/usr/local/bin/weed"])


def _write(archive, name, paths, *variables):
    command = [sys.executable, str(TOOLS / "make_image.py"), "--name", name, "--user", "65532"]
    command += ["--packages", DEBIAN, "--env", "PYTHONDONTWRITEBYTECODE=1"]
    for option, values in (("--path", paths), ("--env", variables)):
        for value in values:
            command += [option, value]
    subprocess.run([*command, str(archive)], check=True, capture_output=True)
