"""A model ready for `decode.c`, and its steps, spread over threads by rows.

Shapes: B rows, V vocabulary, n pages of a row, R rotary dim.
"""

import ctypes
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch

from m1_kernels.host_decode.shared_library import library
from m1_kernels.host_decode.structs import (
    PANEL,
    BatchStruct,
    LayerStruct,
    ModelStruct,
    fill,
    panels,
)

BLOCK_ROWS = 64
"""Rows that pass through all layers together; their activations stay in the second cache."""
_LEAST_ROWS = 16
"""Rows that are worth a thread."""
_PANELS = frozenset({"in_", "out", "router", "shared_fc1", "shared_fc2", "head"})


class HostModel:
    """Weights as panels beside a cache that is shared with others."""

    def __init__(self, sizes: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> None:
        """Copy weights of products into panels; all else is read in place.

        Args:
            sizes: Fields of `Model` but `num_layers` and `layers`: numbers, and float32 tensors
                embedding [V, h], head [V, h], final_norm [h], inverse_frequencies [R / 2].
            layers: Of each the fields of `Layer`: numbers, weights [N, K] (experts' as lists of
                them), vectors, and the layer's tables of the cache, which steps write.

        Raises:
            OSError: There is no compiled library here.
        """
        found = library()
        if found is None:
            raise OSError(
                "there is no compiled decoding step; see m1_kernels.host_decode.shared_library"
            )
        self._library = found
        self._vocab = int(sizes["vocab"])
        self._layers = (LayerStruct * len(layers))()
        self._model = ModelStruct()
        self._kept: list[torch.Tensor] = []
        self._scratch = threading.local()
        for struct, values in zip(self._layers, layers, strict=True):
            self._kept += fill(struct, {name: _ready(name, x) for name, x in values.items()})
        self._kept += fill(self._model, {name: _ready(name, x) for name, x in sizes.items()})
        self._model.num_layers = len(layers)
        self._model.layers = ctypes.addressof(self._layers)

    def decode(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        pages: torch.Tensor,
    ) -> torch.Tensor:
        """One token for every row; states, keys and values enter the cache.

        A row's bits do not depend on the others or on the number of threads.

        Args:
            tokens: int64 [B].
            positions: int64 [B], tokens of the row before this one.
            slots: int64 [B], distinct, not negative.
            pages: int64 [B, n], a row's pages in order; what follows its last token is not read.

        Returns:
            Logits float32 [B, V].
        """
        count = tokens.shape[0]
        logits = torch.empty(count, -(-self._vocab // PANEL) * PANEL)
        batch = BatchStruct()
        kept = fill(
            batch,
            {
                "row_pages": pages.shape[1],
                "tokens": tokens,
                "positions": positions,
                "slots": slots,
                "pages": pages.contiguous(),
                "logits": logits,
            },
        )
        threads = max(1, min(torch.get_num_threads(), count // _LEAST_ROWS))
        bounds = [count * number // threads for number in range(threads + 1)]
        if threads == 1:
            self._rows(batch, 0, count)
        else:
            tasks = [_pool(threads).submit(self._rows, batch, *bounds[i : i + 2])
                     for i in range(threads)]  # fmt: skip
            for task in tasks:
                task.result()
        del kept
        return logits[:, : self._vocab]

    def _rows(self, batch: BatchStruct, begin: int, end: int) -> None:
        block = ctypes.c_int64(min(BLOCK_ROWS, end - begin))
        model, rows = ctypes.byref(self._model), ctypes.byref(batch)
        size = self._library.m1_decode_scratch(model, rows, block)
        scratch = getattr(self._scratch, "memory", None)
        if scratch is None or scratch.numel() < size:  # fresh memory costs page faults
            scratch = self._scratch.memory = torch.empty(size)
        self._library.m1_decode(
            model, rows, ctypes.c_int64(begin), ctypes.c_int64(end), block,
            ctypes.c_void_p(scratch.data_ptr()),
        )  # fmt: skip


def _ready(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return torch.stack([panels(weight) for weight in value])
    return panels(value) if name in _PANELS and value is not None else value


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="decode")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of the threads
