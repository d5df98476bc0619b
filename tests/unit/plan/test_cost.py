import pytest

from m1.plan.cost import PAPER_PRICE, Gpu, find_gpu, plan_cost
from m1.types import M1Error


def cost_of(laptop, **changes: object):
    gpu = Gpu("toy", bf16_peak=2e12, fp8_peak=4e12, fp32_peak=1e12, memory_bytes=1)
    arguments = {"num_gpus": 4, "flops_per_step": 8e12, "num_steps": 3600, "mfu": 0.5} | changes
    return plan_cost(laptop.model, gpu, **arguments)


def test_time_is_flops_over_gpus_peak_and_mfu(laptop) -> None:
    cost = cost_of(laptop, price_per_gpu_hour=2.5)
    assert cost.step_seconds == 8e12 / (4 * 1e12 * 0.5)
    assert cost.gpu_hours == 4 * 4
    assert cost.dollars == 2.5 * 16


def test_the_peak_is_that_of_the_precision(laptop) -> None:
    gpu = find_gpu("H800")
    peaks = {
        precision: gpu.peak(laptop.model.model_copy(update={"precision": precision}))
        for precision in ("fp32", "bf16", "fp8")
    }
    assert peaks == {"fp32": 67e12, "bf16": 989.4e12, "fp8": 1979e12}


def test_the_papers_rent_is_two_dollars_seven(laptop) -> None:
    assert round(PAPER_PRICE, 2) == 2.07
    assert cost_of(laptop).price_per_gpu_hour == PAPER_PRICE


@pytest.mark.parametrize("mfu", [0.0, -0.1, 1.1])
def test_an_impossible_utilisation_is_refused(laptop, mfu: float) -> None:
    with pytest.raises(M1Error, match="mfu is"):
        cost_of(laptop, mfu=mfu)


def test_a_negative_price_is_refused(laptop) -> None:
    with pytest.raises(M1Error, match="cannot be negative"):
        cost_of(laptop, price_per_gpu_hour=-1)


def test_an_unknown_gpu_is_refused_by_name() -> None:
    with pytest.raises(M1Error, match="gpu is 'tpu', but figures are known of h800, h100, h200"):
        find_gpu("tpu")
