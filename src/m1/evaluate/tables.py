"""Any JSON object as plain tables: the report knows nothing of what the data stage counts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CardTable:
    """One table; all cells are text."""

    title: str
    columns: tuple[str, ...]
    """Headings; empty for a list of names and values."""
    rows: tuple[tuple[str, ...], ...]


def card_tables(card: Mapping[str, Any], title: str = "") -> list[CardTable]:
    """Tables that together show every value of `card`.

    An object's plain values make a table of names and values; objects of the same kind side by side
    (one per source, say) make one with a row each, and so does a list of objects; anything else
    nested becomes tables of its own, titled by its path.

    Args:
        card: The object.
        title: Path of the object within the whole.

    Returns:
        Tables in the order of the card's keys, plain values first.
    """
    plain = tuple((_words(k), format_value(v)) for k, v in card.items() if _is_plain(v))
    tables = [CardTable(title, (), plain)] if plain else []
    nested = {key: value for key, value in card.items() if not _is_plain(value)}
    if len(nested) > 1 and not plain and all(_is_flat(value) for value in nested.values()):
        return [_matrix(title, list(nested), list(nested.values()))]
    for key, value in nested.items():
        path = f"{title} / {_words(key)}" if title else _words(key)
        if isinstance(value, Mapping):
            tables += card_tables(value, path)
        elif all(isinstance(item, Mapping) for item in value):
            tables.append(_matrix(path, None, value))
        else:
            tables.append(CardTable(path, (), tuple((str(i), str(v)) for i, v in enumerate(value))))
    return tables


def format_value(value: Any) -> str:
    """A value for people: thousands separated, fractions to four digits, lists joined."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(format_value(item) for item in value) or "none"
    if isinstance(value, Mapping):
        return "; ".join(f"{_words(k)} {format_value(v)}" for k, v in value.items()) or "none"
    return str(value)


def _matrix(title: str, names: list[str] | None, items: Sequence[Mapping[str, Any]]) -> CardTable:
    columns = tuple(dict.fromkeys(key for item in items for key in item))
    cells = [tuple(format_value(item[c]) if c in item else "" for c in columns) for item in items]
    headings = tuple(_words(column) for column in columns)
    if names is None:
        return CardTable(title, headings, tuple(cells))
    rows = tuple((name, *row) for name, row in zip(names, cells, strict=True))
    return CardTable(title, ("", *headings), rows)


def _is_plain(value: Any) -> bool:
    """Whether it fits a cell: no object, or a list without objects or lists."""
    if isinstance(value, Mapping):
        return not value
    if isinstance(value, Sequence) and not isinstance(value, str):
        return not any(isinstance(item, Mapping | list | tuple) for item in value)
    return True


def _is_flat(value: Any) -> bool:
    return isinstance(value, Mapping) and all(_is_plain(item) for item in value.values())


def _words(key: str) -> str:
    return key.replace("_", " ")
