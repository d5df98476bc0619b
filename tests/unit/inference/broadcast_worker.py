"""Two weight updates between a trainer's and an engine's process.

`broadcast_worker.py trainer|engine ADDRESS NUM_LAYERS` prints `done`; run on a CPU (gloo) and,
with a GPU visible to each, on two GPUs (NCCL).
"""

import sys

from m1.model import cpu

cpu.without_compilation()

import torch  # noqa: E402

from m1.config.schema import ModelConfig, MoeConfig  # noqa: E402
from m1.inference.broadcast import WeightSender  # noqa: E402
from m1.inference.weights import stage  # noqa: E402
from m1.model.build import build_model  # noqa: E402
from m1.model.parallel import initialize  # noqa: E402

ROUNDS = 2


def main(role: str, address: str, num_layers: int) -> None:
    initialize()
    config = ModelConfig(
        num_layers=num_layers,
        hidden_size=16,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        rotary_dim=8,
        lightning_per_softmax=1,
        moe=MoeConfig(num_experts=2, top_k=2, ffn_hidden_size=16),
    )
    model = build_model(config, vocab_size=64, seed=1 if role == "trainer" else 2)
    if role == "trainer":
        sender = WeightSender(address)
        for _ in range(ROUNDS):
            sender.send(model)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(2)
        return
    expected = build_model(config, vocab_size=64, seed=1)
    for update in range(ROUNDS):
        staged = stage(address, model)
        for name, parameter in expected.named_parameters():
            assert staged[name].device == parameter.device
            assert torch.equal(staged[name], parameter * 2**update), name


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    print("done")
