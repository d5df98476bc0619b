"""A real Kubernetes of one node for tests: started once, with an image and a namespace.

The programs come from a folder beside the checkout (`../shared/k8s`, or M1_K8S) and Debian packages
that `.ci/run` installs. kustomize's output is applied, so the manifests are tested too.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).parents[1]
TOOLS = Path(os.environ.get("M1_K8S", PROJECT.parent / "shared" / "k8s"))
PROGRAMS = ("etcd", "containerd", "runc", "iptables", "ip", "openssl", "xz")
PACKAGES = (
    "bash",
    "coreutils",
    "dash",
    "findutils",
    "grep",
    "sed",
    "tar",
    "procps",
    "python3",
    "git",
)
IMAGE = "localhost/python:1"


def missing():
    """Why no cluster can be started here; None when it can."""
    if os.geteuid() != 0:
        return "a one-node cluster needs root"
    if not (TOOLS / "cluster").exists():
        return f"no one-node cluster in {TOOLS} (M1_K8S)"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"programs are missing: {', '.join(absent)}" if absent else None


class OneNodeCluster:
    """Up on construction; `close` leaves nothing but unpacked programs.

    With `pod_net` none a pod reaches nothing; with open, pods reach each other and the API server.
    """

    def __init__(self, pod_net="none"):
        os.environ["NO_PROXY"] = os.environ["no_proxy"] = "10.0.0.0/8,localhost,127.0.0.1"
        for name in [name for name in os.environ if name.lower() in ("http_proxy", "https_proxy")]:
            del os.environ[name]
        self.tools = TOOLS
        self.is_kept = "M1_K8S_DIR" in os.environ  # for work on these tests: up once, used often
        folder = os.environ.get("M1_K8S_DIR") or f"{tempfile.gettempdir()}/m1-k8s-{os.getpid()}"
        self.folder = Path(f"{folder}-{pod_net}")
        net = f"10.{78 if pod_net == 'none' else 79}"
        net += ".251" if self.is_kept else f".{os.getpid() % 250}"
        try:
            started = self.run("up", "--net", net, "--pod-net", pod_net)
            self.kubeconfig = started.strip().splitlines()[-1]
        except BaseException:
            self.close()
            raise

    def prepare_sandboxes(self):
        """Load the sandboxes' image, and apply their manifests."""
        archive = self.folder / "python.tar"
        maker = [sys.executable, str(TOOLS / "make_image.py"), "--packages", ",".join(PACKAGES)]
        subprocess.run([*maker, "--name", IMAGE, str(archive)], check=True, capture_output=True)
        self.load(archive)
        self.kubectl("apply", "-k", str(PROJECT / "manifests" / "base" / "sandbox"))

    def load(self, archive):
        """Load an image's archive, and remove it."""
        try:
            self.run("load", str(archive))
        finally:
            archive.unlink()

    def run(self, *arguments):
        command = [sys.executable, str(TOOLS / "cluster"), "--dir", str(self.folder), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def kubectl(self, *arguments):
        return self.run("kubectl", *arguments)

    def processes(self, name):
        """Ids on this machine of the cluster's programs of a name."""
        found = []
        for path in Path("/proc").iterdir():
            if path.name.isdigit():
                try:
                    words = (path / "cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue
                if words[0].endswith(name.encode()) and str(self.folder).encode() in b" ".join(
                    words
                ):
                    found.append(int(path.name))
        return found

    def close(self):
        if not self.is_kept:
            self.run("down", "--purge")
