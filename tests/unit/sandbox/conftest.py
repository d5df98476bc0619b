"""The same tests for every backend: those of a cluster are marked so."""

import pytest
from sandbox_limits import LIMITS

from m1.sandbox import bubblewrap
from m1.sandbox.local import BubblewrapBackend


@pytest.fixture(scope="module", params=["bubblewrap"])
def backend(request):
    if bubblewrap.failure() is not None:
        pytest.skip(f"no sandbox here: {bubblewrap.failure()}")
    return BubblewrapBackend()


@pytest.fixture
def sandbox(backend):
    with backend.open(limits=LIMITS) as opened:
        yield opened
