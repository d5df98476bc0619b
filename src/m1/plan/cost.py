"""From FLOPs to time and money, on stated hardware at a stated utilisation and price."""

from dataclasses import dataclass

from m1.config.model_tables import ModelConfig
from m1.types import M1Error

PAPER_PRICE = 534_700 / (512 * 21 * 24)
"""Dollars a GPU hour: M1's 512 H800 for three weeks cost $534,700 (abstract), about $2.07."""
DEFAULT_MFU = 0.35
"""Share of the BF16 peak that model FLOPs reach: an assumption. DeepSeek-V3 (arXiv 2412.19437,
table 1) took 2.664M H800 hours for 14.8T tokens of 37B active parameters, 6 * 37e9 * 14.8e12 /
(2.664e6 * 3600 * 989.4e12) = 0.35."""
_MIB = 2**20


@dataclass(frozen=True)
class Gpu:
    """Published figures of a GPU; peaks are dense, in FLOP/s."""

    name: str
    bf16_peak: float
    fp8_peak: float
    fp32_peak: float
    memory_bytes: int
    """As nvidia-smi reports it."""

    def peak(self, model: ModelConfig) -> float:
        """Peak at the trunk's precision; under FP8 what stays BF16 is charged as FP8 too."""
        peaks = {"bf16": self.bf16_peak, "fp8": self.fp8_peak, "fp32": self.fp32_peak}
        return peaks[model.precision]


# NVIDIA H100 and H200 data sheets, SXM: BF16 989.4, FP8 1,979 (halves of the sparse figures), FP32
# 67 TFLOP/s. The H800 has the H100's arithmetic, and slower NVLink and FP64.
_GPUS = (
    Gpu("h800", 989.4e12, 1979e12, 67e12, 81_559 * _MIB),
    Gpu("h100", 989.4e12, 1979e12, 67e12, 81_559 * _MIB),
    Gpu("h200", 989.4e12, 1979e12, 67e12, 143_771 * _MIB),
)
DEFAULT_GPU = "h800"
"""The paper's."""


@dataclass(frozen=True)
class StepWork:
    """Tokens that pass through the model in one step of a stage."""

    sampled: int
    """Decoded one by one."""
    scored: int
    """Forward only."""
    trained: int
    """Forward and backward."""


@dataclass(frozen=True)
class Cost:
    """Time and price of a stage."""

    gpu: str
    num_gpus: int
    peak_flops: float
    mfu: float
    flops_per_step: float
    step_seconds: float
    num_steps: int
    gpu_hours: float
    price_per_gpu_hour: float
    dollars: float


def find_gpu(name: str) -> Gpu:
    """The GPU of that name.

    Raises:
        M1Error: There is no preset of that name.
    """
    presets = {gpu.name: gpu for gpu in _GPUS}
    if name.lower() not in presets:
        raise M1Error(
            f"gpu is {name!r}, but figures are known of {', '.join(presets)}; choose one of them"
        )
    return presets[name.lower()]


def plan_cost(
    model: ModelConfig,
    gpu: Gpu,
    *,
    num_gpus: int,
    flops_per_step: float,
    num_steps: int,
    mfu: float = DEFAULT_MFU,
    price_per_gpu_hour: float = PAPER_PRICE,
) -> Cost:
    """Step time = FLOPs / (GPUs * peak * MFU); cost = GPU hours * price.

    Raises:
        M1Error: The utilisation is not in (0, 1], or the price is negative.
    """
    if not 0 < mfu <= 1:
        raise M1Error(f"mfu is {mfu}, but must be above 0 and at most 1; change it")
    if price_per_gpu_hour < 0:
        raise M1Error(f"price-per-gpu-hour is {price_per_gpu_hour}, but cannot be negative")
    peak = gpu.peak(model)
    step_seconds = flops_per_step / (num_gpus * peak * mfu)
    gpu_hours = num_steps * step_seconds * num_gpus / 3600
    return Cost(
        gpu=gpu.name,
        num_gpus=num_gpus,
        peak_flops=peak,
        mfu=mfu,
        flops_per_step=flops_per_step,
        step_seconds=step_seconds,
        num_steps=num_steps,
        gpu_hours=gpu_hours,
        price_per_gpu_hour=price_per_gpu_hour,
        dollars=gpu_hours * price_per_gpu_hour,
    )
