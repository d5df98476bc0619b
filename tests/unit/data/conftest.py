import random
from pathlib import Path

import pytest

from m1.data.tokenizer import Tokenizer, train_tokenizer


def prose(seed: int, num_words: int = 400) -> str:
    """Random words from a vocabulary of 2000, twelve a line."""
    generator = random.Random(seed)
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(random.Random(i).choices(alphabet, k=3 + i % 6)) for i in range(2000)]
    chosen = generator.choices(words, k=num_words)
    return "\n".join(" ".join(chosen[i : i + 12]) for i in range(0, num_words, 12))


@pytest.fixture(scope="session")
def make_prose():
    return prose


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([prose(seed) for seed in range(30)], vocab_size=400, folder=folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer(tokenizer_folder)
