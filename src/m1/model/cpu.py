"""Lets megatron-core run without CUDA: the one place where it is patched, and what that mends.

megatron-core reaches for CUDA in a few places that have no device-neutral form. `install()`
redirects them to the CPU;
it does nothing where CUDA is available. Line references are to megatron-core 0.16.1.
"""

import contextlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch


class _NullStream:
    """Stands in for a CUDA stream: CPU work is already in order."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, *_: Any) -> None: ...

    def wait_event(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, *_: Any) -> "_NullStream":
        return self

    def record(self, *_: Any) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def query(self) -> bool:
        return True


def without_compilation() -> None:
    """Make torch.compile return its function, before megatron-core is imported.

    megatron's jit fuser decorates small functions with it, which imports inductor (two seconds)
    and, at the first call, wants a C++ compiler. Optimizers' methods are hidden from the compiler,
    whose import at their first call takes one second (torch/_compile.py, `_disable_dynamo`). Does
    nothing where CUDA is available.
    """
    if torch.cuda.is_available():
        return
    torch.compile = lambda model=None, **_: model if model is not None else lambda f: f  # type: ignore[assignment]
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        hidden = getattr(getattr(torch.optim.Optimizer, name), "__wrapped__", None)
        if hidden is not None:
            hidden.__dynamo_disable = hidden


def install() -> None:
    """Patch torch.cuda and megatron-core for the CPU, once."""
    if torch.cuda.is_available() or getattr(torch.cuda, "_m1_cpu", False):
        return
    if "torch._dynamo" in sys.modules:  # megatron was imported without `without_compilation`
        torch._dynamo.config.disable = True
    _patch_torch_cuda()
    _patch_literal_devices()
    _patch_rng()
    _patch_moe()
    _patch_optimizer()
    torch.cuda._m1_cpu = True  # type: ignore[attr-defined]


@contextlib.contextmanager
def single_threaded() -> Iterator[None]:
    """Keep gloo's threads from starting OpenMP workers of their own.

    A collective on a large tensor runs parallel loops in one of gloo's threads. The workers that
    this starts never end, and OpenMP, which then counts more threads than cores, no longer spins
    between loops: training was twice as slow after the first checkpoint.
    """
    if torch.cuda.is_available():
        yield
        return
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _patch_torch_cuda() -> None:
    cpu, null = torch.device("cpu"), _NullStream()
    cuda: Any = torch.cuda
    cuda.current_device = lambda: cpu  # `device=torch.cuda.current_device()` throughout
    cuda.current_stream = lambda *_: null  # ddp's param_and_grad_buffer.py
    cuda.default_stream = lambda *_: null
    cuda.stream = lambda _=None: contextlib.nullcontext()
    cuda.synchronize = lambda *_: None
    cuda.empty_cache = lambda: None
    cuda.set_device = lambda *_: None
    cuda.is_current_stream_capturing = lambda: False
    cuda.Stream = cuda.Event = _NullStream  # MoEAlltoAllTokenDispatcher.__init__
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *_, **__: self  # optimizer.py, clip_grads.py
    tensor.record_stream = lambda self, *_: None


class _TorchOnCpu(types.ModuleType):
    """`torch` as seen by a module that writes device="cuda" in its calls."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*size: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(*size, **kwargs)

    @staticmethod
    def tensor(data: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return torch.tensor(data, **kwargs)


def _patch_literal_devices() -> None:
    """device="cuda" in schedules.py:596, clip_grads.py:90, optimizer.py:473, utils.py:1207."""
    import megatron.core.optimizer.clip_grads as clip_grads
    import megatron.core.optimizer.optimizer as optimizer
    import megatron.core.pipeline_parallel.schedules as schedules
    import megatron.core.utils as megatron_utils

    for module in (schedules, clip_grads, optimizer, megatron_utils):
        module.torch = _TorchOnCpu("torch")


def _patch_rng() -> None:
    """tensor_parallel/random.py keeps the CUDA generator's state; keep the CPU generator's."""
    import megatron.core.tensor_parallel.random as random

    class CpuRngStatesTracker(random.CudaRNGStatesTracker):  # type: ignore[misc]
        def add(self, name: str, seed: int) -> None:
            saved = torch.get_rng_state()
            torch.manual_seed(seed)
            self.seeds_.add(seed)
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(saved)

        @contextlib.contextmanager
        def fork(self, name: str = random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            saved = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(saved)

    random.CudaRNGStatesTracker = CpuRngStatesTracker
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]


def _patch_moe() -> None:
    """The dispatcher makes lists of split sizes only on CUDA; gloo needs lists too."""
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    def to_host(value: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return value.numpy() if isinstance(value, torch.Tensor) and as_numpy else value

    token_dispatcher.maybe_move_tensor_to_cpu = to_host
    # RouterGatingLinearFunction reads it without TE (NameError), and with TE needs a GPU.
    moe_utils.te_general_gemm = None


def _patch_optimizer() -> None:
    """optimizer.py and clip_grads.py accept only tensors whose type() names torch.cuda."""
    original = torch.Tensor.type

    def typed(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = original(self, *args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if isinstance(name, str) and caller.startswith("megatron.core.optimizer"):
            return name.replace("torch.", "torch.cuda.", 1)
        return name

    torch.Tensor.type = typed  # type: ignore[assignment,method-assign]
