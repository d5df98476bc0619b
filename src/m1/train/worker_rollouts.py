"""Rollouts of workers, to which the trainer hands its weights."""

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from m1.inference import weights
from m1.inference.client import HttpEngine
from m1.model.hf.checkpoints import model_toml
from m1.rollout.asynchronous import AsyncRollouts, SampleOne
from m1.rollout.discovery import Discovery, expand
from m1.rollout.filtering import SampledBatch, screen
from m1.rollout.groups import requests_for, score_groups
from m1.rollout.journal import Journal
from m1.rollout.serving import Connect, GivenServer, ServedProcess
from m1.rollout.workers import Worker, WorkerPool
from m1.storage import atomic_write
from m1.train.sampling import Parts, Rollouts, synchronous
from m1.types import RolloutGroup, Task

T = TypeVar("T")
_PATIENCE_SECONDS = 2.0
"""How long one worker is asked again before another one is."""
_MANY = 1 << 20


def with_workers(
    parts: Parts, saved: Mapping[str, Any], parent: Path, stack: ExitStack, *, step: int
) -> Rollouts:
    """Workers sample; the first rank talks to them.

    Args:
        parts: What sampling needs.
        saved: The state of these rollouts in the checkpoint.
        parent: Checkpoint that started workers begin with.
        stack: Gets what is to be closed; it is emptied into the result.
        step: From which the stage goes on; after 0 the weights are others than the parent's.

    Raises:
        M1Error: A worker does not come up.
    """
    config = parts.config.rollout
    journal = Journal(parts.context.folder / "rollouts")
    version = int(saved.get("version", 0))
    pool = _open_pool(parts, parent, stack) if parts.replicas.is_first else None
    if pool is not None:
        known = max(pool.policy_version, journal.newest_version())
        # Weights made after the checkpoint are lost; their versions are not given again.
        version = known + 1 if known > version else version
    version = _from_first(version)

    def load(number: int) -> None:
        uri = _publish(parts, number)
        if pool is not None:
            pool.load_weights(uri, number)

    if step or version or config.urls:
        load(version)
    if config.mode == "sync":
        source = synchronous(parts, pool)
        return Rollouts(
            lambda step, _: source.next(step=step),
            load,
            version=version,
            state=dict,
            stack=stack.pop_all(),
        )
    ahead = None
    if pool is not None:
        sample = _sample_one(parts, pool)
        journal.rewind(step)
        ahead = AsyncRollouts(sample, parts.tasks, parts.config, journal=journal, state=saved)
        stack.callback(ahead.close)

    def take(step: int, number: int) -> SampledBatch:
        parts.phase("sample")
        batch = ahead.next(step=step, version=number) if ahead is not None else SampledBatch([], [])
        return _from_first(batch)

    return Rollouts(
        take,
        load,
        version=version,
        state=ahead.state if ahead is not None else dict,
        stack=stack.pop_all(),
    )


def _open_pool(parts: Parts, parent: Path, stack: ExitStack) -> WorkerPool:
    rollout, context = parts.config.rollout, parts.context
    workers = _workers(parts, parent)
    pool = WorkerPool(workers, max_attempts=rollout.max_attempts, warn=context.warn)
    stack.callback(shutil.rmtree, context.folder / "weights", ignore_errors=True)
    stack.callback(pool.close)
    given = partial(GivenServer, engine=_connect(parts))
    known = [worker.name for worker in workers]
    stack.callback(Discovery(pool, rollout.urls, known, worker=given).close)
    return pool


def _connect(parts: Parts) -> Connect:
    """Makes the client of a worker."""
    config = parts.config.rollout

    def engine(url: str, token: str | None) -> HttpEngine:
        return HttpEngine(
            url,
            token=token,
            stop_token=parts.tokenizer.end,
            repetition_stop=parts.config.repetition_stop,
            timeout_seconds=config.timeout_seconds,
            patience_seconds=_PATIENCE_SECONDS,
            recompute_on_update=config.on_update == "recompute",
        )

    return engine


def _workers(parts: Parts, parent: Path) -> list[Worker]:
    config, engine = parts.config.rollout, _connect(parts)
    if config.urls:
        return [GivenServer(url, engine=engine) for url in expand(config.urls)]
    folder = parts.context.folder / "worker"
    folder.mkdir(exist_ok=True)
    link = folder / "checkpoint"
    link.unlink(missing_ok=True)
    link.symlink_to(parent.absolute())
    atomic_write(folder / "model.toml", model_toml(parts.recipe.model).encode())
    options = {
        "--tokenizer": parts.context.path_of("data") / "tokenizer",
        "--model-name": "policy",
        "--precision": "fp32" if parts.recipe.model.precision == "fp32" else "bf16",
        "--max-sequences": config.worker_sequences,
        "--max-waiting": _MANY,
        "--timeout-seconds": config.timeout_seconds,
        "--prefix-cache-mib": 0,  # every update would empty it
    }
    if config.worker_cache_gib is not None:
        options["--cache-gib"] = config.worker_cache_gib
    arguments = [str(part) for pair in options.items() for part in pair]
    if parts.config.routing_replay == "rollout":
        arguments.append("--record-experts")
    devices = config.worker_devices
    return [
        ServedProcess(
            folder,
            arguments,
            name=f"worker-{number}",
            log=folder / f"worker-{number}.log",
            environment={"CUDA_VISIBLE_DEVICES": devices[number]} if devices else {},
            engine=engine,
        )
        for number in range(config.num_workers)
    ]


def _publish(parts: Parts, version: int) -> str:
    """Write the weights of now where workers can read them; all ranks call it together."""
    folder = parts.context.folder / "weights"
    if dist.get_world_size() == 1:
        weights.publish(parts.trainer.model, str(folder), version=version)
        return str(folder.absolute())
    # A checkpoint is read under any layout, and not the parameters of one rank.
    target = folder / f"version-{version:09d}"
    if dist.get_rank() == 0:
        shutil.rmtree(target, ignore_errors=True)
        for older in sorted(folder.glob("version-*"))[:-1]:
            shutil.rmtree(older)
    dist.barrier()
    parts.trainer.save_weights(target)
    return str(target.absolute())


def _sample_one(parts: Parts, pool: WorkerPool) -> SampleOne:
    config, tokenizer = parts.config, parts.tokenizer

    def sample(task: Task, ticket: int) -> RolloutGroup:
        seed = parts.recipe.seed * 1_000_003 + ticket
        requests = requests_for(
            [task], tokenizer=tokenizer, group_size=config.group_size, seed=seed
        )
        groups = score_groups(
            [task],
            pool.generate(requests, config.sampling),
            tokenizer=tokenizer,
            reward=config.reward,
            max_tokens=config.sampling.max_new_tokens,
            service=parts.service,
        )
        (group,) = screen(groups, num_tokens=tokenizer.vocab_size)
        return group

    return sample


def _from_first(value: T) -> T:
    """The first rank's value, on every rank."""
    if dist.get_world_size() == 1:
        return value
    values: list[Any] = [value]
    dist.broadcast_object_list(values, src=0)
    found: T = values[0]
    return found
