"""Cases of a benchmark: their clock, and what happens to one that cannot be done."""

import gc
import signal
import time
from typing import Any

import torch

_clock = time.perf_counter


def clock() -> float:
    """Seconds; of this process alone after `use_processor_time`."""
    return _clock()


def use_processor_time() -> None:
    """Count this process's own time from now on: on a CPU with neighbours, in one thread."""
    global _clock
    _clock = time.process_time


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def attempt(call: Any, *, seconds: int = 0) -> Any:
    """What a case returns, or why it could not; 0 seconds is no limit."""

    def interrupt(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(seconds)
    try:
        return call()
    except (torch.cuda.OutOfMemoryError, TimeoutError) as error:
        return {"error": str(error).partition(".")[0]}
    finally:
        signal.alarm(0)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
