"""Fig. 1 right: the numbers of each convention (PAPER sec. 6)."""

import pytest

from m1.plan.figure import draw_generation
from m1.plan.inference import (
    DEEPSEEK_R1,
    QWEN3_235B,
    architecture_of,
    compare,
    generation_flops,
)


def shares(m1_456b, convention) -> dict[int, float]:
    return {
        row.length: row.share_of_r1["m1_456b"]
        for row in compare(m1_456b.model, "m1_456b", convention)
    }


def test_counted_in_full_m1_takes_26_percent_of_r1_at_100k(m1_456b) -> None:
    found = shares(m1_456b, "full")
    assert round(100 * found[100_000], 1) == 26.4
    assert round(100 * found[64_000], 1) == 34.3


def test_counted_causally_with_r1s_own_dims_m1_takes_34_percent_at_100k(m1_456b) -> None:
    found = shares(m1_456b, "causal")
    assert round(100 * found[100_000], 1) == 33.5
    assert round(100 * found[64_000], 1) == 43.9


def test_the_papers_claim_of_under_half_at_64k_holds_either_way(m1_456b) -> None:
    assert all(shares(m1_456b, name)[64_000] < 0.5 for name in ("full", "causal"))


def test_r1_and_qwen3_follow_their_published_figures() -> None:
    n = 1000
    assert generation_flops(DEEPSEEK_R1, n, "full") == 74e9 * n + 61 * 128 * 4 * 128 * n**2
    causal = 74e9 * n + 61 * 128 * 2 * (192 + 128) * n**2 / 2
    assert generation_flops(DEEPSEEK_R1, n, "causal") == causal
    assert generation_flops(QWEN3_235B, n, "full") == 44e9 * n + 94 * 64 * 4 * 128 * n**2
    assert generation_flops(QWEN3_235B, n, "causal") == 44e9 * n + 94 * 64 * 2 * 128 * n**2


def test_m1_is_charged_for_ten_softmax_layers_and_seventy_states(m1_456b) -> None:
    n = 1000
    model = architecture_of(m1_456b.model, "m1")
    linear = 2 * 45_944_920_064 + 70 * 64 * 4 * 128 * 128
    assert generation_flops(model, n, "full") == linear * n + 10 * 64 * 4 * 128 * n**2


def test_the_plot_names_models_and_conventions_and_is_reproducible(m1_456b, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    first, second = tmp_path / "first.svg", tmp_path / "second.svg"
    for path in (first, second):
        draw_generation(m1_456b.model, "m1_456b", path)
    text = first.read_text()
    assert text == second.read_text()
    for word in ("m1_456b", "DeepSeek-R1", "Qwen3-235B-A22B", "full n^2", "causal n^2/2"):
        assert word in text
