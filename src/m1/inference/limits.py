"""What an engine may hold and compute at a time."""

from dataclasses import dataclass

from m1.inference.scheduler import Preemption


@dataclass(frozen=True)
class EngineLimits:
    """What the engine may hold and compute at a time."""

    num_slots: int = 512
    """Sequences with memory on the device."""
    num_pages: int = 4096
    """Pages of keys and values."""
    page_size: int = 16
    """Tokens of a page."""
    step_tokens: int = 8192
    """Tokens of one model call, decoding and prefill together."""
    preemption: Preemption = "swap"
    """Of a sequence that makes way: its memory is kept on the host, or computed anew."""
    prefix_bytes: int = 0
    """States kept for prompts that go on from earlier turns; 0 for none."""
    cuda_graphs: bool = True
    """Whether decoding on a GPU is replayed from graphs."""
    host_kernel: bool = True
    """Whether decoding on a CPU is compiled, where that is possible (`m1.inference.host`)."""
    is_invariant: bool = False
    """Whether a request's bits must not depend on what else is in the batch."""

    record_experts: bool = False
    """Whether the experts of every token are kept, for routing replay; 2 bytes a token, layer and
    choice."""

    @property
    def num_tokens(self) -> int:
        """Tokens whose keys and values fit."""
        return self.num_pages * self.page_size
