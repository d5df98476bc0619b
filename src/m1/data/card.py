"""The data card: what went in, what was dropped and why, and what came out, as JSON and Markdown.

The builder fills the fields; this module only derives numbers from them and lays them out.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m1.data.sources import Document
from m1.storage import atomic_write


def source_counts(
    *,
    read: dict[str, int],
    skipped: dict[str, Counter[str]],
    dropped: dict[str, Counter[str]],
    cleaned: Sequence[Document],
    kept: Sequence[Document],
) -> list[dict[str, Any]]:
    """One row per source: documents before and after each step, with the reasons in between."""
    after_cleaning = Counter(document.source for document in cleaned)
    after_dedup = Counter(document.source for document in kept)
    return [
        {
            "name": name,
            "num_read": read[name],
            "skipped": dict(sorted(skipped[name].items())),
            "dropped": dict(sorted(dropped[name].items())),
            "num_cleaned": after_cleaning[name],
            "num_deduplicated": after_dedup[name],
        }
        for name in read
    ]


def overlap_summary(shares: Sequence[float], *, num_words: int) -> dict[str, Any]:
    """How much of the held-out documents' n-grams the training documents contain."""
    return {
        "num_words": num_words,
        "mean_share": round(sum(shares) / len(shares), 4),
        "max_share": round(max(shares), 4),
        "num_documents_above_half": sum(share > 0.5 for share in shares),
    }


def write_card(folder: Path, card: dict[str, Any]) -> None:
    """Write card.json and card.md."""
    atomic_write(folder / "card.json", (json.dumps(card, indent=2) + "\n").encode())
    atomic_write(folder / "card.md", card_markdown(card).encode())


def card_markdown(card: dict[str, Any]) -> str:
    """The card on one page."""
    lines = ["# Data card", "", f"Seed {card['seed']}.", ""]
    lines += [*_documents(card), "", *_tokens(card), "", *_tasks(card["tasks"]), ""]
    return "\n".join(lines)


def _documents(card: dict[str, Any]) -> list[str]:
    rows = [
        [
            row["name"],
            row["num_read"],
            _reasons(row["skipped"]),
            _reasons(row["dropped"]),
            row["num_cleaned"],
            row["num_deduplicated"],
        ]
        for row in card["sources"]
    ]
    header = ["source", "read", "unreadable", "dropped by cleaning", "cleaned", "deduplicated"]
    dedup = card["dedup"]
    removed = f"Duplicates removed: {dedup['exact']} exact, {dedup['near']} near."
    return ["## Documents", "", *_table(header, rows), "", removed]


def _tokens(card: dict[str, Any]) -> list[str]:
    tokenizer, overlap = card["tokenizer"], card["pretrain"]["overlap"]
    rows = []
    for stage in ("pretrain", "sft"):
        for split in ("train", "heldout") if card[stage] else ():
            part = card[stage][split]
            counts = [part["num_documents"], part["num_rows"], part["num_tokens"]]
            rows.append([stage, split, *counts])
    lines = [
        "## Tokens",
        "",
        f"Vocabulary {tokenizer['vocab_size']}, {tokenizer['bytes_per_token']} bytes per token.",
        "",
        *_table(["stage", "split", "documents", "rows", "tokens"], rows),
        "",
        f"Held-out text: of a document's {overlap['num_words']}-grams, training documents contain "
        f"{overlap['mean_share']:.1%} on average and {overlap['max_share']:.1%} at most; "
        f"{overlap['num_documents_above_half']} documents are above half.",
    ]
    if card["sft"]:
        lines += ["", f"Demonstrations too long for a row: {card['sft']['num_too_long']}."]
    return lines


def _tasks(tasks: dict[str, Any]) -> list[str]:
    rows = [
        [row["name"], row["num_sft"], row["num_rl"], row["num_heldout"], _reasons(row["draws"])]
        for row in tasks["sources"]
    ]
    shared = f"Prompts that occur twice: {tasks['num_shared_prompts']}."
    return ["## Tasks", "", *_table(["source", "SFT", "RL", "held-out", "draws"], rows), "", shared]


def _reasons(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.items()) or "0"


def _table(header: list[str], rows: list[list[Any]]) -> list[str]:
    cells = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(str(cell) for cell in row) + " |" for row in cells]
