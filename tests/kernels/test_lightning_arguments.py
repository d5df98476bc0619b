"""Bad arguments are refused by name, with the value and what is accepted."""

import pytest
import torch

from m1_kernels.lightning_attention import (
    lightning_attention,
    lightning_attention_prefill,
    lightning_attention_qkv,
    lightning_attention_step,
)

GOOD = {
    "q": torch.ones(8, 2, 4),
    "k": torch.ones(8, 2, 4),
    "v": torch.ones(8, 2, 6),
    "slopes": torch.tensor([0.1, 0.0]),
    "cu_seqlens": torch.tensor([0, 3, 8]),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.ones(8, 4)}, r"q has shape \[8, 4\]; give it as \[T, H, D\]"),
        ({"k": torch.ones(8, 2, 5)}, r"k has shape \[8, 2, 5\].*\[8, 2, 4\]"),
        ({"v": torch.ones(7, 2, 6)}, r"v has shape \[7, 2, 6\]"),
        ({"k": torch.ones(8, 2, 4).half()}, "k is torch.float16 and q is torch.float32"),
        ({"q": torch.ones(8, 2, 4).int()}, "q is torch.int32; the kernels take"),
        ({"slopes": torch.ones(3)}, r"slopes is torch.float32 \[3\]; give float32 \[2\]"),
        ({"slopes": torch.tensor([0.1, -0.1])}, "slopes are .*at least 0"),
        ({"slopes": torch.tensor([0.1, float("inf")])}, "slopes are .*finite"),
        ({"cu_seqlens": torch.tensor([0.0, 8.0])}, "cu_seqlens is torch.float32"),
        ({"cu_seqlens": torch.tensor([0])}, "cu_seqlens has 1 entries"),
        ({"cu_seqlens": torch.tensor([0, 5, 3, 8])}, r"cu_seqlens is \[0, 5, 3, 8\].*8 tokens"),
        ({"cu_seqlens": torch.tensor([0, 9])}, r"cu_seqlens is \[0, 9\]"),
        ({"cu_seqlens": torch.tensor([0, 1, 3, 1, 8])[::2]}, "cu_seqlens is strided"),
        ({"initial_state": torch.ones(2, 2, 4, 4)}, r"initial_state is .*\[2, 2, 4, 6\]"),
        ({"v": torch.ones(8, 2, 6, device="meta")}, "v is on meta and q on cpu"),
    ],
)
def test_attention_refuses(changes, message):
    lightning_attention(**GOOD)
    with pytest.raises(ValueError, match=message):
        lightning_attention(**{**GOOD, **changes})


def test_a_fused_projection_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"qkv has shape \[8, 2, 4\]; give it as \[T, H, 3, D\]"):
        lightning_attention_qkv(torch.ones(8, 2, 4), GOOD["slopes"], GOOD["cu_seqlens"])


@pytest.mark.parametrize(
    ("states", "slots", "message"),
    [
        (torch.ones(4, 2, 4, 4), None, r"states is .*give float32 \[4, 2, 4, 6\]"),
        (torch.ones(4, 2, 4, 6).double(), None, "states is torch.float64"),
        (torch.ones(4, 2, 6, 4).transpose(2, 3), None, "states has strides"),
        (torch.ones(4, 2, 4, 6), None, "states has 4 slots for 8 rows"),
        (torch.ones(4, 2, 4, 6), torch.arange(3), r"slots is torch.int64 \[3\]; .*\[8\]"),
        (torch.ones(9, 2, 4, 6), torch.tensor([0, 1, 2, 3, 4, 5, 5, -1]), "must differ"),
        (torch.ones(9, 2, 4, 6), torch.tensor([0, 1, 2, 3, 4, 5, 9, -1]), "lie below 9"),
    ],
)
def test_a_step_refuses(states, slots, message):
    q, k, v, slopes = (GOOD[name] for name in ("q", "k", "v", "slopes"))
    with pytest.raises(ValueError, match=message):
        lightning_attention_step(q, k, v, slopes, states, slots)


def test_prefill_refuses_a_table_of_another_shape():
    with pytest.raises(ValueError, match=r"states is .*\[3, 2, 4, 6\]"):
        lightning_attention_prefill(
            **GOOD, states=torch.ones(3, 2, 6, 4), slots=torch.tensor([0, 1])
        )
