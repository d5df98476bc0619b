"""Logits of the CPU model, in a process that sees no GPU: `reference_worker.py CONFIG FOLDER`.

Writes a checkpoint of the weights (rounded to BF16, so that every precision can hold them), and
the logits in FP32 and in BF16 arithmetic.
"""

import sys
from pathlib import Path

from m1.model import cpu

cpu.without_compilation()

import torch  # noqa: E402

from m1.config.schema import ModelConfig  # noqa: E402
from m1.model import checkpoint  # noqa: E402
from m1.model.build import build_model  # noqa: E402
from m1.model.packing import pack  # noqa: E402
from m1.model.parallel import initialize  # noqa: E402

VOCAB = 512
LENGTHS = torch.tensor([200, 1, 311])


def tokens() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(VOCAB, (1, int(LENGTHS.sum())), generator=generator)


def main(config: ModelConfig, folder: Path) -> None:
    initialize()
    packing = pack(LENGTHS)
    logits = {}
    with torch.no_grad():
        exact = build_model(config, vocab_size=VOCAB, seed=1).eval()
        generator = torch.Generator().manual_seed(2)
        for parameter in exact.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter.bfloat16())
        checkpoint.save_weights(folder / "weights", exact)
        rounded = build_model(
            config.model_copy(update={"precision": "bf16"}), vocab_size=VOCAB, seed=1
        ).eval()
        for theirs, own in zip(rounded.parameters(), exact.parameters(), strict=True):
            theirs.copy_(own)
        for name, model in (("fp32", exact), ("bf16", rounded)):
            logits[name] = model(tokens(), packing.positions[None], None, packed_seq_params=packing)
    torch.save(logits, folder / "logits.pt")


if __name__ == "__main__":
    main(ModelConfig.model_validate_json(sys.argv[1]), Path(sys.argv[2]))
