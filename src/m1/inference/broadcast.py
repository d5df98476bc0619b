"""Weights from a trainer to engines by collective broadcast: NCCL between GPUs, gloo on CPUs.

The group is its own: neither side's default group takes part, so a trainer's ranks and an engine's
need not know of each other. Ranks of a parallel layout pair up: rank r of the trainer sends to rank
r of every engine, on port + r.
"""

import hashlib
import json
from datetime import timedelta
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch
import torch.distributed as dist

from m1.types import M1Error

TIMEOUT_SECONDS = 120.0


class WeightSender:
    """The trainer's side: one group with every engine, for as many updates as one likes."""

    def __init__(self, address: str, *, num_engines: int = 1) -> None:
        """Wait until every engine has joined.

        Args:
            address: tcp://HOST:PORT to listen on.
            num_engines: How many will join; each loads
                `tcp://HOST:PORT?rank=1..num_engines&world=num_engines+1`.
        """
        self._group = _join(address, rank=0, world=num_engines + 1)

    @torch.no_grad()
    def send(self, model: torch.nn.Module) -> None:
        """Send every parameter; returns when all engines have them."""
        header = json.dumps(_describe(model)).encode()
        device = next(model.parameters()).device
        _broadcast(self._group, torch.tensor([len(header)], device=device))
        _broadcast(self._group, torch.frombuffer(bytearray(header), dtype=torch.uint8).to(device))
        for _, parameter in model.named_parameters():
            _broadcast(self._group, parameter.detach().contiguous())
        _meet(self._group, device)


_joined: dict[str, Any] = {}


@torch.no_grad()
def receive(uri: str, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The engine's side: join at the first call, then receive one update.

    Args:
        uri: tcp://HOST:PORT, with `?rank=R&world=W` where there are several engines.
        model: Whose parameters are expected.

    Raises:
        M1Error: The trainer is not there, went away, or has another model.
    """
    query = parse_qs(urlsplit(uri).query)
    rank, world = (
        int(query.get(key, [default])[0]) for key, default in (("rank", "1"), ("world", "2"))
    )
    try:
        group = _joined.get(uri) or _join(uri, rank=rank, world=world)
        _joined[uri] = group
        return _receive(group, model)
    except (RuntimeError, dist.DistError) as error:
        _joined.pop(uri, None)
        reason = str(error).splitlines()[0]
        raise M1Error(
            f"no weights came from {uri} ({reason}); the weights stay as they are. Start the "
            "trainer's WeightSender, then load again"
        ) from error


def _receive(group: Any, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    device = next(model.parameters()).device
    size = torch.zeros(1, dtype=torch.int64, device=device)
    _broadcast(group, size)
    header = torch.zeros(int(size), dtype=torch.uint8, device=device)
    _broadcast(group, header)
    described = json.loads(bytes(header.tolist()))
    staged = {}
    for name, shape, dtype in described["tensors"]:  # all of them, or the sender would wait
        staged[name] = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        _broadcast(group, staged[name])
    _meet(group, device)
    if described["digest"] != _describe(model)["digest"]:
        raise M1Error(
            "the trainer's model has other parameters than this engine's; the weights stay as they "
            "are. Start both from the same [model] and layout"
        )
    return staged


def _describe(model: torch.nn.Module) -> dict[str, Any]:
    tensors = [
        [name, list(p.shape), str(p.dtype).removeprefix("torch.")]
        for name, p in model.named_parameters()
    ]
    digest = hashlib.sha256(json.dumps(tensors).encode()).hexdigest()
    return {"tensors": tensors, "digest": digest}


def _join(address: str, *, rank: int, world: int) -> Any:
    parts = urlsplit(address)
    if parts.scheme != "tcp" or not parts.hostname or not parts.port:
        raise M1Error(f"{address} is no address of a trainer; write tcp://HOST:PORT")
    port = parts.port + (dist.get_rank() if dist.is_initialized() else 0)
    timeout = timedelta(seconds=TIMEOUT_SECONDS)
    store = dist.TCPStore(  # type: ignore[attr-defined]
        parts.hostname, port, world, is_master=rank == 0, timeout=timeout, wait_for_workers=False
    )
    if torch.cuda.is_available():
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(store, rank, world, options)
    return dist.ProcessGroupGloo(store, rank, world, timeout)


def _meet(group: Any, device: torch.device) -> None:
    """Return when every member has all it was sent; NCCL's own waits only order the GPU's work."""
    group.allreduce([torch.zeros(1, device=device)], dist.AllreduceOptions()).wait()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _broadcast(group: Any, tensor: torch.Tensor) -> None:
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    group.broadcast([tensor], options).wait()
