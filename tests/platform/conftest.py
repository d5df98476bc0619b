"""The platform on a real cluster, for tests marked so."""

import tempfile
from pathlib import Path

import host_image
import pytest
from one_node_cluster import missing
from one_node_platform import Platform
from rendering import renderer


@pytest.fixture(scope="session")
def platform():
    """The base, with our programs from this machine's files."""
    if missing() or renderer() is None:
        pytest.skip(missing() or "needs kustomize 4.5, or a kubectl that holds one")
    with tempfile.TemporaryDirectory() as name:
        running = Platform(lambda archive: host_image.write_ours(archive, Path(name)))
        yield running
        running.close()
