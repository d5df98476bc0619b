"""Samples from one checkpoint under many layouts, for tests/parity/test_engine_layouts.py."""

import json
import multiprocessing
import sys
from dataclasses import asdict
from pathlib import Path

from m1.model import cpu

cpu.without_compilation()

import reasoning_gym  # noqa: E402, F401  once, before the ranks are forked
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from m1.config.schema import (  # noqa: E402
    ModelConfig,
    ParallelConfig,
    RewardConfig,
    SamplingConfig,
)
from m1.data.tokenizer import Tokenizer  # noqa: E402
from m1.inference.core import EngineCore  # noqa: E402
from m1.inference.engine import LocalEngine, Request  # noqa: E402
from m1.inference.limits import EngineLimits  # noqa: E402
from m1.inference.loop import EngineLoop  # noqa: E402
from m1.inference.params import SamplingParams  # noqa: E402
from m1.model import checkpoint  # noqa: E402
from m1.model.build import build_model  # noqa: E402
from m1.model.parallel import initialize  # noqa: E402
from m1.rollout.groups import requests_for, score_groups  # noqa: E402
from m1.rollout.replicas import Replicas  # noqa: E402
from m1.types import M1Error, Task  # noqa: E402

NUM_TOKENS = 60
REQUESTS = [Request(tuple(range(3 + i, 10 + 4 * i)), (i, i + 9)) for i in range(5)]


def engine_results(model: torch.nn.Module) -> list[dict]:
    engine = LocalEngine(model, stop_token=7, num_tokens=NUM_TOKENS)
    groups = engine.generate(REQUESTS, SamplingConfig(max_new_tokens=15, top_p=0.9))
    return [{"tokens": c.tokens, "logprobs": c.logprobs} for group in groups for c in group]


def loop_results(model: torch.nn.Module, weights: Path) -> dict:
    """The first rank takes requests and new weights; the others follow."""
    core = EngineCore(model, num_tokens=NUM_TOKENS, limits=EngineLimits(num_pages=100))
    loop = EngineLoop(core, model)
    if dist.get_rank() > 0:
        loop.serve_as_follower()
        return {}
    loop.start()
    found: list[tuple[int, int]] = []
    params = SamplingParams(max_new_tokens=15, temperature=0)
    _, accepted = loop.submit(
        REQUESTS[0].prompt_tokens,
        params,
        (1,),
        on_token=lambda output: found.append((output.token, output.policy_version)),
    )
    accepted.result(timeout=60)
    loop.load_weights(str(weights), 4)
    refusal = ""
    try:
        loop.load_weights(str(weights / "nowhere"), 5)
    except M1Error as error:
        refusal = str(error)
    while len(found) < 15:
        pass
    loop.stop()
    return {"tokens": [t for t, _ in found], "last": found[-1][1], "refusal": refusal}


def rollout_results(model: torch.nn.Module, tokenizer: Tokenizer, replicas: Replicas) -> dict:
    """Groups of five tasks, one of which comes twice, and how many tokens this rank sampled."""
    limits = EngineLimits(num_pages=400, is_invariant=True)
    engine = LocalEngine(
        model, stop_token=tokenizer.end, num_tokens=tokenizer.vocab_size, limits=limits
    )
    names = ("one", "three", "two", "one", "and")
    tasks = [Task(n, "s", f"{n} and two is", "3", "reasoning_gym:chain_sum") for n in names]
    requests = requests_for(tasks, tokenizer=tokenizer, group_size=3, seed=4)
    sampling = SamplingConfig(max_new_tokens=10)
    scored = score_groups(
        replicas.share(tasks),
        engine.generate(replicas.share(requests), sampling),
        tokenizer=tokenizer,
        reward=RewardConfig(),
        max_tokens=10,
        service=None,
    )
    groups = replicas.gather(scored)
    assert engine._core is not None
    return {"groups": [asdict(group) for group in groups], "sampled": engine._core.num_sampled}


def work(rank: int, name: str, job: dict) -> None:
    root, parallel = Path(job["root"]), ParallelConfig.model_validate(job["layouts"][name])
    store = f"file://{root}/store-{name}"
    dist.init_process_group("gloo", store, rank=rank, world_size=parallel.world_size)
    initialize(parallel)
    config = ModelConfig.model_validate(job["model"])
    model = build_model(config, vocab_size=320, seed=1, parallel=parallel).eval()
    if name == "one":
        checkpoint.save_weights(root / "weights", model)
    checkpoint.load_weights(root / "weights", model)
    found = {
        "engine": engine_results(model),
        # Copies of the model have no first rank to follow.
        "loop": {} if name == "dp2" else loop_results(model, root / "weights"),
        "rollouts": rollout_results(model, Tokenizer(root / "tokenizer"), Replicas.of(parallel)),
    }
    (root / f"{name}-{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    context = multiprocessing.get_context("fork")
    for name, layout in job["layouts"].items():
        size = ParallelConfig.model_validate(layout).world_size
        processes = [context.Process(target=work, args=(r, name, job)) for r in range(size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            if process.exitcode:
                sys.exit(f"{name} failed")


if __name__ == "__main__":
    main()
