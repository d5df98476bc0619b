"""What the rooms share: megatron-core on this machine, a tiny model, a tiny tokenizer."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports Triton, whose interpreter runs kernels
    os.environ["TRITON_INTERPRET"] = "1"

from hypothesis import settings

from m1.config.schema import ModelConfig, MoeConfig
from m1.data.tokenizer import Tokenizer, train_tokenizer
from m1.model import cpu

settings.register_profile("m1", deadline=None)  # shared machines stall
settings.load_profile("m1")
torch.set_num_threads(1)
cpu.without_compilation()  # before any test imports megatron-core


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under xdist one worker has a whole module, the pipeline's run, or the cluster."""
    for item in items:
        folder = item.path.parent
        name = folder if folder.name == "pipelines" else item.path
        if item.get_closest_marker("cluster"):  # one cluster for all
            name = Path("cluster")
        item.add_marker(pytest.mark.xdist_group(str(name)))


ModelFactory = Callable[..., torch.nn.Module]
CommandLine = Callable[..., subprocess.CompletedProcess[str]]
PROJECT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def m1() -> CommandLine:
    """Run `m1` with arguments, and the environment with keywords, in the checkout."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        program = "from m1.cli import main; main()"
        return subprocess.run(
            [sys.executable, "-c", program, *arguments],
            cwd=PROJECT,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=800,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def process_group() -> None:
    from m1.model.parallel import initialize

    initialize()


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    """Seven lightning layers and one softmax layer; weights so large that every branch matters."""
    return ModelConfig(
        num_layers=8,
        hidden_size=32,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        rotary_dim=16,
        moe=MoeConfig(num_experts=4, top_k=2, ffn_hidden_size=32),
        max_position=256,
        init_std=0.2,
    )


@pytest.fixture(scope="session")
def make_model(process_group: None) -> ModelFactory:
    """Build a model in eval mode whose norm weights all differ, so that none can be mistaken."""

    def make(config: ModelConfig, *, vocab_size: int = 64, seed: int = 1) -> torch.nn.Module:
        from m1.model.build import build_model

        model = build_model(config, vocab_size=vocab_size, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def tiny_model(make_model: ModelFactory, tiny_config: ModelConfig) -> torch.nn.Module:
    """64 tokens; shared by all tests, so none may change it."""
    return make_model(tiny_config)


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tiny_tokenizer")
    train_tokenizer(["what is one and one", "one and two is three"], vocab_size=300, folder=folder)
    return Tokenizer(folder)
