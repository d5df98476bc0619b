"""From recipe files to a validated `Recipe`.

Every mistake that can be found is reported together, so that a recipe is mended in one pass.
"""

import copy
import difflib
import json
import re
import tomllib
import types
from collections.abc import Mapping, Sequence
from datetime import date, datetime, time
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from m1.config.schema import Config, Mistakes, Recipe
from m1.types import M1Error

_MAX_SHOWN_CHARACTERS = 60
_INDEX = re.compile(r"[0-9]+")


class RecipeError(M1Error):
    """Everything found wrong with a recipe, one mistake a line."""

    def __init__(self, origin: str, mistakes: Sequence[str]) -> None:
        count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        super().__init__("\n  ".join([f"{count} in {origin}:", *mistakes]))
        self.mistakes = tuple(mistakes)


def load_recipe(paths: Sequence[Path], *, overrides: Sequence[str] = ()) -> Recipe:
    """Read, merge, override and validate a recipe.

    Args:
        paths: TOML files, merged left to right: tables merge, everything else is replaced.
        overrides: `dotted.key=value` texts, applied in order after the files. A value is TOML, or a
            bare string where it is not; entries of arrays are addressed by index.

    Raises:
        RecipeError: With every mistake. Files that cannot be read are reported before anything
            inside the others.
    """
    origin = ", ".join(map(str, paths))
    if not paths:
        raise RecipeError("the list of recipe files", ["no file is given; name at least one"])
    merged: dict[str, Any] = {}
    unreadable = []
    for path in paths:
        try:
            merged = _merge(merged, _read(path))
        except _UnreadableError as error:
            unreadable.append(str(error))
    if unreadable:
        raise RecipeError(origin, unreadable)
    return parse_recipe(merged, overrides=overrides, origin=origin)


def parse_recipe(
    table: Mapping[str, Any], *, overrides: Sequence[str] = (), origin: str = "the recipe"
) -> Recipe:
    """Override and validate a recipe that was read already.

    Args:
        table: Its tables.
        overrides: As in `load_recipe`.
        origin: Where it comes from, for messages.

    Raises:
        RecipeError: With every mistake.
    """
    merged = copy.deepcopy(dict(table))
    mistakes = []
    for override in overrides:
        try:
            _apply(override, merged)
        except _OverrideError as error:
            mistakes.append(f"override {override!r}: {error}")
    try:
        recipe = Recipe.model_validate(merged)
    except ValidationError as error:
        for details in error.errors():
            mistakes.extend(_describe(details))
        raise RecipeError(origin, mistakes) from None
    if mistakes:
        raise RecipeError(origin, mistakes)
    return recipe


def recipe_json(recipe: Recipe) -> str:
    """The recipe with every default resolved, as indented JSON under the names used in files."""
    dumped = recipe.model_dump(mode="json", by_alias=True)
    return json.dumps(dumped, indent=2, ensure_ascii=False)


def json_schema() -> str:
    """JSON schema of recipe files, as the text of pipelines/recipes/recipe.schema.json."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Recipe.model_json_schema(by_alias=True),
    }
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


# Reading and merging


class _UnreadableError(Exception):
    """A file that yields no TOML."""


class _OverrideError(Exception):
    """An override that names no place in the recipe."""


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise _UnreadableError(
            f"{path} is not UTF-8 (byte {error.start}), but TOML must be; save it as UTF-8"
        ) from None
    except FileNotFoundError:
        raise _UnreadableError(f"{path} does not exist; check the path") from None
    except OSError as error:
        raise _UnreadableError(f"{path} cannot be read: {error.strerror}") from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _UnreadableError(_describe_syntax(path, text, error)) from None


def _describe_syntax(path: Path, text: str, error: tomllib.TOMLDecodeError) -> str:
    """File, line and text of a TOML syntax error; tomllib states the line only in its message."""
    reason, _, place = str(error).removesuffix(")").rpartition(" (at ")
    lines = text.split("\n")
    found = re.match(r"line (\d+), column (\d+)", place)
    line = int(found[1]) if found else len(lines)
    shown = _show(lines[line - 1].strip())
    return f"{path}:{line} is {shown}, which is not TOML: {reason or error}; mend it"


def _merge(base: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """A new table in which tables merge and everything else comes from `above`."""
    merged = dict(base)
    for key, value in above.items():
        known = merged.get(key)
        if isinstance(known, dict) and isinstance(value, dict):
            merged[key] = _merge(known, value)
        else:
            merged[key] = value
    return merged


def _apply(override: str, recipe: dict[str, Any]) -> None:
    """Set one value in place; tables on the way that are absent are made."""
    dotted, equals, text = override.partition("=")
    keys = [key.strip() for key in dotted.split(".")]
    if not equals or not all(keys):
        raise _OverrideError("it is not dotted.key=value; write for example rl.group_size=8")
    place: Any = recipe
    for depth, key in enumerate(keys[:-1]):
        path = ".".join(keys[:depth])
        if isinstance(place, dict):
            place = place.setdefault(key, {})
        else:
            place = place[_index(key, place, path=path)]
    *parents, last = keys
    slot = last if isinstance(place, dict) else _index(last, place, path=".".join(parents))
    place[slot] = _parse_value(text)


def _index(key: str, place: Any, *, path: str) -> int:
    """`key` as an index of the array at `path`."""
    if not isinstance(place, list):
        raise _OverrideError(f"{path} is {_show(place)}, which has no {key}; shorten the key")
    if not _INDEX.fullmatch(key) or int(key) >= len(place):
        indices = "it is empty" if not place else f"its indices are 0 to {len(place) - 1}"
        raise _OverrideError(f"{path} is an array without an entry {key}; {indices}")
    return int(key)


def _parse_value(text: str) -> Any:
    """A TOML value; anything else, dates included (no field holds one), is a bare string."""
    text = text.strip()
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    if table.keys() != {"value"} or isinstance(table["value"], date | datetime | time):
        return text
    return table["value"]


# Describing mistakes


def _describe(details: ErrorDetails) -> list[str]:
    """One line for each mistake in a pydantic error: path, what was given, why not, what to do."""
    path = _dotted(details["loc"])
    given = f"{path or 'the recipe'} is {_show(details['input'])}"
    match details["type"]:
        case "extra_forbidden":
            return [_describe_unknown_key(details["loc"])]
        case "missing":
            return [f"{path} is missing, but required; add it{_meaning(details['loc'])}"]
        case "value_error":
            error = details["ctx"]["error"]
            texts = error.texts if isinstance(error, Mistakes) else (str(error),)
            return [f"{path}.{text}" if path else text for text in texts]
        case "model_type" | "dict_type":
            return [f"{given}, but it should be a table; write [{path}] and its keys below"]
        case "tuple_type":
            return [f"{given}, but it should be an array; write [...], or [[{path}]] for tables"]
    reason = re.sub(r"^(Input|String|Tuple) | after validation, not \d+$", "", details["msg"])
    return [f"{given}, but it {reason}; change it"]


def _describe_unknown_key(location: tuple[int | str, ...]) -> str:
    table = _annotation_at(location[:-1])
    known = list(_fields(table))
    near = difflib.get_close_matches(str(location[-1]), known, n=1)
    advice = f"did you mean {near[0]}?" if near else f"remove it or use one of {', '.join(known)}"
    return f"unknown key {_dotted(location)}; {advice}"


def _meaning(location: tuple[int | str, ...]) -> str:
    """The documentation of a field in brackets, or nothing."""
    field = _fields(_annotation_at(location[:-1])).get(str(location[-1]))
    description = " ".join((field.description or "").split()).rstrip(".") if field else ""
    return f" ({description})" if description else ""


def _fields(table: Any) -> dict[str, Any]:
    """Fields of a table under the names used in files."""
    if not (isinstance(table, type) and issubclass(table, Config)):
        return {}
    return {field.alias or name: field for name, field in table.model_fields.items()}


def _annotation_at(location: Sequence[int | str]) -> Any:
    """Type of the value at `location` in a recipe, without `None`; of arrays, that of entries."""
    annotation: Any = Recipe
    for key in location:
        if isinstance(key, str):
            field = _fields(annotation).get(key)
            annotation = field.annotation if field else None
        if get_origin(annotation) in (Union, types.UnionType):
            annotation = next(a for a in get_args(annotation) if a is not types.NoneType)
        if get_origin(annotation) is tuple:
            annotation = get_args(annotation)[0]
    return annotation


def _dotted(location: Sequence[int | str]) -> str:
    return ".".join(map(str, location))


def _show(value: Any) -> str:
    """A value on one line, close to how TOML writes it, shortened."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    if len(text) > _MAX_SHOWN_CHARACTERS:
        return text[: _MAX_SHOWN_CHARACTERS - 3] + "..."
    return text
