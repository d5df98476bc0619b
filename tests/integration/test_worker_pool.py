"""Rollout workers behind one engine: who dies, who takes over, and with which weights."""

import os
import signal
import time

import httpx
import pytest
from serving import local_server

from m1.config.schema import SamplingConfig
from m1.inference.client import EngineUnavailableError, HttpEngine
from m1.inference.engine import Request
from m1.inference.weights import publish
from m1.rollout.discovery import Discovery
from m1.rollout.serving import GivenServer, ServedProcess
from m1.rollout.workers import WorkerPool
from m1.types import M1Error

SAMPLING = SamplingConfig(max_new_tokens=60)
REQUESTS = [Request((20 + i, 30, 40), (i, i + 100)) for i in range(12)]


def engine(url, token=None):
    return HttpEngine(url, token=token, stop_token=1, patience_seconds=0.2)


class Switch:
    """A worker that can be cut off from its server, as by a dead machine."""

    def __init__(self, url, name):
        self.url, self.name, self.is_off = url, name, False
        self.num_connects = 0

    def connect(self):
        self.num_connects += 1
        if self.is_off:
            raise EngineUnavailableError(f"{self.name} is off")
        self.engine = engine(self.url)
        return self.engine

    def cut(self):
        self.is_off = True
        http = self.engine._http
        http.close()
        http._make = lambda: httpx.Client(base_url="http://127.0.0.1:9")

    def close(self):
        pass


@pytest.fixture(scope="module")
def urls(served_model, hf_folder):
    with (
        local_server(served_model, hf_folder, is_invariant=True) as one,
        local_server(served_model, hf_folder, is_invariant=True) as two,
    ):
        yield one, two


@pytest.fixture
def switches(urls):
    return [Switch(server.url, name) for server, name in zip(urls, "ab", strict=True)]


def opened(workers, **settings):
    told = []
    return WorkerPool(workers, max_attempts=3, warn=told.append, **settings), told


def test_requests_of_a_dead_worker_are_answered_by_another_with_the_same_tokens(switches):
    pool, told = opened(switches)
    expected = pool.generate(REQUESTS, SAMPLING)
    switches[0].cut()
    assert pool.generate(REQUESTS, SAMPLING) == expected
    assert pool.num_deaths == 1 and "worker a is dead" in told[0]
    pool.close()


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_worker_that_comes_back_gets_the_newest_weights_before_requests(
    switches, urls, served_model, tmp_path
):
    pool, _ = opened(switches)
    switches[1].cut()
    pool.generate(REQUESTS, SAMPLING)
    assert pool.num_deaths == 1
    publish(served_model, str(tmp_path / "w"), version=7)
    pool.load_weights(str(tmp_path / "w"), 7)
    assert [server.loop.core.policy_version for server in urls] == [7, 0]
    switches[1].is_off = False
    wait_for(lambda: urls[1].loop.core.policy_version == 7)
    wait_for(lambda: all(slot.engine is not None for slot in pool._slots))
    found = pool.generate(REQUESTS, SAMPLING)
    assert {v for group in found for c in group for v in c.policy_versions} == {7}
    pool.close()


def test_with_all_workers_dead_the_error_says_why_each_is(switches):
    pool, _ = opened(switches, patience_seconds=0.5)
    for switch in switches:
        switch.cut()
    with pytest.raises(M1Error, match=r"all rollout workers are dead .*a: .*b: "):
        pool.generate(REQUESTS[:1], SAMPLING)
    pool.close()


def test_what_a_worker_refuses_is_not_tried_elsewhere(switches):
    pool, _ = opened(switches)
    with pytest.raises(M1Error, match="max_position"):
        pool.generate(REQUESTS[:1], SamplingConfig(max_new_tokens=5000))
    assert pool.num_deaths == 0
    pool.close()


def test_after_closing_no_request_is_taken(switches):
    pool, _ = opened(switches)
    pool.close()
    with pytest.raises(M1Error, match="closed"):
        pool.generate(REQUESTS, SAMPLING)


def test_a_given_server_that_is_absent_is_named():
    with pytest.raises(EngineUnavailableError, match=r"127\.0\.0\.1:9"):
        opened([GivenServer("http://127.0.0.1:9", engine=engine)])


@pytest.mark.slow
def test_a_started_worker_that_is_killed_is_started_again(hf_folder, tmp_path):
    worker = ServedProcess(
        hf_folder,
        ["--max-sequences", "16"],
        name="worker-0",
        log=tmp_path / "log",
        environment={},
        engine=engine,
    )
    pool, told = opened([worker])
    first = worker.pid
    assert len(pool.generate(REQUESTS[:2], SAMPLING)) == 2
    os.kill(first, signal.SIGKILL)
    assert len(pool.generate(REQUESTS[:2], SAMPLING)) == 2
    assert worker.pid != first and len(told) == 1
    last = worker.pid
    pool.close()  # kills it
    with pytest.raises(ProcessLookupError):
        os.kill(last, 0)


def test_a_worker_that_cannot_start_says_where_its_words_are(tmp_path):
    worker = ServedProcess(
        tmp_path / "nothing",
        [],
        name="worker-0",
        log=tmp_path / "log",
        environment={},
        engine=engine,
    )
    with pytest.raises(EngineUnavailableError, match=r"ended with status .*log"):
        worker.connect()
    assert "nothing" in (tmp_path / "log").read_text()


def test_a_server_that_appears_behind_a_name_joins_with_the_newest_weights(
    urls, served_model, tmp_path
):
    """`localhost` stands for a name whose pods become ready one after the other."""
    first, second = (server.url for server in urls)
    pool, _ = opened([GivenServer(first, engine=engine)])
    publish(served_model, str(tmp_path), version=7)
    pool.load_weights(str(tmp_path), 7)
    name = second.replace("127.0.0.1", "localhost").replace("http://", "dns+http://")
    finder = Discovery(
        pool,
        [first, name],
        [first],
        worker=lambda url: GivenServer(url, engine=engine),
        look_seconds=0.05,
    )
    wait_for(lambda: len([s for s in pool._slots if s.engine is not None]) >= 2)
    assert engine(second).policy_version == 7
    finder.close()
    pool.close()
