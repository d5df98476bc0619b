"""The data stage: from sources and task generators to a folder that every later stage reads.

    tokenizer/                       Hugging Face tokenizer
    pretrain/{train,heldout}         packed documents (.bin, .idx)
    sft/{train,heldout}[_loss_mask]  packed demonstrations, when there are any
    tasks/{sft,rl,heldout}.jsonl     tasks
    card.json, card.md               what happened

The same config, seed and inputs give the same bytes. The corpus is held in memory by one process;
a corpus of terabytes is cleaned elsewhere and enters as JSONL shards.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from m1.config.schema import DataConfig
from m1.data.card import overlap_summary, source_counts, write_card
from m1.data.chat import render_demonstration, render_plain_answer
from m1.data.cleaning import clean
from m1.data.dedup import deduplicate, overlap
from m1.data.demonstrations import write_solution
from m1.data.packing import pack_documents, pack_samples, token_dtype, write_masks, write_rows
from m1.data.sources import Document, read_source
from m1.data.tasks import TaskSplits, make_tasks, num_shared_prompts, write_tasks
from m1.data.tokenizer import Tokenizer, copy_tokenizer, train_tokenizer
from m1.storage import disk_errors
from m1.types import M1Error, Task

Report = Callable[[str, int, int], None]
T = TypeVar("T")

# Byte-pair statistics settle long before this much text.
_MAX_TOKENIZER_CHARACTERS = 32_000_000
# Prompts are few beside the corpus, but every SFT and RL token depends on how they are cut.
_PROMPT_SHARE = 0.1
_OVERLAP_WORDS = 13
_MAX_OVERLAP = 0.5
_BATCH = 64


@dataclass(frozen=True)
class _Split:
    train: list[Document]
    heldout: list[Document]
    num_overlapping: int
    """Held-out documents that were dropped because training holds most of them."""


@dataclass(frozen=True)
class _Demonstration:
    """A rendered demonstration: token ids [T] and which of them are targets [T]."""

    key: str
    tokens: NDArray[Any]
    loss_mask: NDArray[np.bool_]


def build(config: DataConfig, *, seed: int, folder: Path, report: Report) -> dict[str, Any]:
    """Make everything below `folder`, calling `report(phase, done, total)`, and return the card."""
    with disk_errors(folder):
        # Tasks first: they are quick, and most mistakes in a recipe's data table are there.
        tasks = _build_tasks(config, seed, folder / "tasks", report)
        documents, sources, dedup = _corpus(config, report)
        split = _split(documents, config, seed)
        report("tokenizer", 0, 1)
        if config.tokenizer.path:
            copy_tokenizer(Path(config.tokenizer.path), folder / "tokenizer")
        else:
            texts = _tokenizer_texts(split.train, [task.prompt for task in tasks.sft])
            train_tokenizer(
                texts, vocab_size=config.tokenizer.vocab_size, folder=folder / "tokenizer"
            )
        tokenizer = Tokenizer(folder / "tokenizer")
        report("tokenizer", 1, 1)
        pretrain = _build_pretrain(config, split, tokenizer, folder / "pretrain", report)
        sft = _build_sft(config, tasks.sft, tokenizer, seed, folder / "sft", report)
        card = {
            "seed": seed,
            "config": config.model_dump(mode="json"),
            "sources": sources,
            "dedup": dedup,
            "tokenizer": _tokenizer_facts(tokenizer, split.train, pretrain["train"]),
            "pretrain": pretrain,
            "sft": sft,
            "tasks": _task_facts(config, tasks),
        }
        write_card(folder, card)
    return card


def split_by_hash(
    items: Sequence[T], key: Callable[[T], str], heldout_fraction: float, seed: int
) -> tuple[list[T], list[T]]:
    """(train, held-out), each in order, by a hash of key and seed.

    An item's side does not depend on which others exist, unless a side would be empty: each gets at
    least one of two or more items.
    """
    if len(items) < 2:
        raise M1Error(
            f"{len(items)} document or demonstration cannot be split into training and held-out "
            "parts; give at least 2 (data.sources, data.tasks.num_sft)"
        )

    def place(item: T) -> float:
        digest = hashlib.sha256(f"{seed}:{key(item)}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    places = [place(item) for item in items]
    limit = min(max(heldout_fraction, min(places)), np.nextafter(max(places), 0))
    train = [item for item, spot in zip(items, places, strict=True) if spot > limit]
    heldout = [item for item, spot in zip(items, places, strict=True) if spot <= limit]
    return train, heldout


def _split(documents: Sequence[Document], config: DataConfig, seed: int) -> _Split:
    train, heldout = split_by_hash(documents, _document_key, config.heldout_fraction, seed)
    shares = overlap(heldout, train, num_words=_OVERLAP_WORDS)
    fresh = [d for d, share in zip(heldout, shares, strict=True) if share <= _MAX_OVERLAP]
    kept = fresh or heldout
    return _Split(train, kept, num_overlapping=len(heldout) - len(kept))


def _corpus(
    config: DataConfig, report: Report
) -> tuple[list[Document], list[dict[str, Any]], dict[str, int]]:
    """Documents that survive, with counts per source and of duplicates."""
    names = Counter(source.name for source in config.sources)
    repeated = [name for name, count in names.items() if count > 1]
    if repeated:
        raise M1Error(
            f"data.sources has several entries named {repeated[0]!r}, but names tell documents "
            "apart; rename all but one"
        )
    read: dict[str, int] = {}
    skipped: dict[str, Counter[str]] = {}
    dropped: dict[str, Counter[str]] = {}
    cleaned: list[Document] = []
    for number, source in enumerate(config.sources):
        report("read", number, len(config.sources))
        skipped[source.name], dropped[source.name] = Counter(), Counter()
        documents = list(read_source(source, skipped=skipped[source.name]))
        read[source.name] = len(documents)
        cleaned += clean(documents, config.cleaning, dropped=dropped[source.name])
    report("read", len(config.sources), len(config.sources))
    if not cleaned:
        raise M1Error(_empty_corpus(read, skipped, dropped))
    result = deduplicate(
        cleaned, config.dedup, report=lambda done: report("deduplicate", done, len(cleaned))
    )
    report("deduplicate", len(cleaned), len(cleaned))
    counts = source_counts(
        read=read, skipped=skipped, dropped=dropped, cleaned=cleaned, kept=result.documents
    )
    return list(result.documents), counts, {"exact": result.exact, "near": result.near}


def _empty_corpus(
    read: dict[str, int], skipped: dict[str, Counter[str]], dropped: dict[str, Counter[str]]
) -> str:
    facts = []
    for name, number in read.items():
        reasons = {**skipped[name], **dropped[name]}
        listed = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
        facts.append(f"{name}: {number} read" + (f", {listed}" if listed else ""))
    return (
        f"no documents are left for training ({'; '.join(facts)}); correct uri and include of "
        "data.sources, or loosen the data.cleaning rules named here"
    )


def _document_key(document: Document) -> str:
    return f"{document.source}/{document.identifier}"


def _tokenizer_texts(documents: Sequence[Document], prompts: Sequence[str]) -> list[str]:
    """Evenly spaced documents of bounded total length, and prompts repeated to a share of them."""
    total = sum(len(document.text) for document in documents)
    stride = max(1, -(-total // _MAX_TOKENIZER_CHARACTERS))
    texts = [document.text for document in documents[::stride]]
    if not prompts:
        return texts
    wanted = _PROMPT_SHARE * total / stride
    return texts + list(prompts) * max(1, round(wanted / sum(map(len, prompts))))


def _build_pretrain(
    config: DataConfig, split: _Split, tokenizer: Tokenizer, folder: Path, report: Report
) -> dict[str, Any]:
    total = len(split.train) + len(split.heldout)
    dtype = token_dtype(tokenizer.vocab_size)
    facts: dict[str, Any] = {}
    done = 0
    for name, documents in (("train", split.train), ("heldout", split.heldout)):
        encoded: list[NDArray[Any]] = []
        for start in range(0, len(documents), _BATCH):
            report("tokenize", done + start, total)
            texts = [document.text for document in documents[start : start + _BATCH]]
            encoded += [np.array(ids, dtype) for ids in tokenizer.encode_batch(texts)]
        done += len(documents)
        rows = pack_documents(
            encoded, sequence_length=config.sequence_length, end_of_text=tokenizer.end_of_text
        )
        facts[name] = {
            "num_documents": len(documents),
            "num_rows": write_rows(folder / name, rows, dtype=dtype),
            "num_tokens": sum(len(ids) + 1 for ids in encoded),
        }
    report("tokenize", total, total)
    shares = overlap(split.heldout, split.train, num_words=_OVERLAP_WORDS)
    summary = overlap_summary(shares, num_words=_OVERLAP_WORDS)
    return {**facts, "overlap": {**summary, "num_heldout_dropped": split.num_overlapping}}


def _build_sft(
    config: DataConfig,
    tasks: Sequence[Task],
    tokenizer: Tokenizer,
    seed: int,
    folder: Path,
    report: Report,
) -> dict[str, Any] | None:
    if not tasks:
        return None
    rendered = _render(tasks, tokenizer, _worked_tasks(config, tasks, seed), report)
    fitting = [item for item in rendered if len(item.tokens) <= config.sequence_length]
    if len(fitting) < 2:
        shortest = min(len(item.tokens) for item in rendered)
        raise M1Error(
            f"of {len(tasks)} demonstrations {len(fitting)} fit into data.sequence_length "
            f"{config.sequence_length} (the shortest has {shortest} tokens), but SFT needs 2; "
            "raise sequence_length or num_sft"
        )
    facts: dict[str, Any] = {"num_too_long": len(rendered) - len(fitting)}
    parts = split_by_hash(fitting, lambda item: item.key, config.heldout_fraction, seed)
    for name, samples in zip(("train", "heldout"), parts, strict=True):
        lengths = [len(sample.tokens) for sample in samples]
        rows = pack_samples(lengths, sequence_length=config.sequence_length)
        token_rows = [[samples[number].tokens for number in row] for row in rows]
        write_rows(folder / name, token_rows, dtype=token_dtype(tokenizer.vocab_size))
        write_masks(folder / name, [[samples[number].loss_mask for number in row] for row in rows])
        facts[name] = {
            "num_documents": len(samples),
            "num_rows": len(rows),
            "num_tokens": sum(lengths),
            "num_target_tokens": int(sum(sample.loss_mask.sum() for sample in samples)),
        }
    return facts


def _worked_tasks(config: DataConfig, tasks: Sequence[Task], seed: int) -> set[str]:
    """Tasks whose demonstration thinks step by step, drawn per source."""
    worked: set[str] = set()
    for source in config.tasks:
        own = [task.task_id for task in tasks if task.source == source.name]
        shuffled = np.random.default_rng((seed, len(own))).permutation(len(own))
        count = round(source.worked_fraction * len(own))
        worked |= {own[number] for number in shuffled[:count]}
    return worked


def _render(
    tasks: Sequence[Task], tokenizer: Tokenizer, worked: set[str], report: Report
) -> list[_Demonstration]:
    dtype = token_dtype(tokenizer.vocab_size)
    rendered = []
    for number, task in enumerate(tasks):
        if number % _BATCH == 0:
            report("demonstrations", number, len(tasks))
        if task.task_id in worked:
            think = write_solution(task)
            tokens, mask = render_demonstration(tokenizer, task.prompt, think, task.reference)
        else:
            tokens, mask = render_plain_answer(tokenizer, task.prompt, task.reference)
        rendered.append(_Demonstration(task.task_id, np.array(tokens, dtype), np.array(mask)))
    report("demonstrations", len(tasks), len(tasks))
    return rendered


def _build_tasks(config: DataConfig, seed: int, folder: Path, report: Report) -> TaskSplits:
    report("tasks", 0, 1)
    splits = make_tasks(config.tasks, seed)
    for name in ("sft", "rl", "heldout"):
        write_tasks(folder / f"{name}.jsonl", getattr(splits, name))
    report("tasks", 1, 1)
    return splits


def _task_facts(config: DataConfig, splits: TaskSplits) -> dict[str, Any]:
    return {
        "sources": [
            {
                "name": source.name,
                "dataset": source.uri or source.dataset,
                "num_sft": source.num_sft,
                "num_rl": source.num_rl,
                "num_heldout": source.num_heldout,
                "draws": splits.draws[source.name],
            }
            for source in config.tasks
        ],
        "num_shared_prompts": num_shared_prompts(splits),
    }


def _tokenizer_facts(
    tokenizer: Tokenizer, documents: Sequence[Document], packed: dict[str, int]
) -> dict[str, Any]:
    num_bytes = sum(len(document.text.encode()) for document in documents)
    num_tokens = packed["num_tokens"] - len(documents)
    return {
        "vocab_size": tokenizer.vocab_size,
        "bytes_per_token": round(num_bytes / num_tokens, 3),
    }
