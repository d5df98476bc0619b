"""Answers to completions and chats: whole, or as a stream of server-sent events."""

import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from m1.inference.server.errors import error_body
from m1.inference.server.formats import Choice, Format
from m1.inference.server.running import Running
from m1.inference.text import TOOL_MARK, split_tool_calls
from m1.types import M1Error


def whole(choices: list[Choice], form: Format, *, has_tools: bool) -> dict[str, Any]:
    """The body of an answer that is not streamed."""
    found = []
    for index, choice in enumerate(choices):
        entry = form.common(index, choice.outputs)
        if not form.is_chat:
            entry["text"] = choice.text
        else:
            entry["message"] = _message(choice.text, entry, has_tools=has_tools)
        found.append(entry)
    usage = form.usage(sum(len(choice.outputs) for choice in choices))
    return {**form.head(is_chunk=False), "choices": found, "usage": usage}


def _message(text: str, entry: dict[str, Any], *, has_tools: bool) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if has_tools:
        content, calls = split_tool_calls(text)
        if calls:
            message |= {"content": content or None, "tool_calls": calls}
            entry["finish_reason"] = "tool_calls"
    return message


async def stream(
    running: Running, form: Format, *, has_tools: bool, with_usage: bool
) -> AsyncIterator[str]:
    """Server-sent events; an error after the first byte is an event too."""
    choices = [Choice() for _ in range(form.num_choices)]
    begun: set[int] = set()
    try:
        async with aclosing(running.pieces()) as pieces:
            async for piece in pieces:
                choice = choices[piece.index]
                choice.add(piece)
                for entry in _parts(choice, piece.index, piece.text, form, begun, has_tools):
                    yield _event({**form.head(is_chunk=True), "choices": [entry]})
    except TimeoutError as error:
        yield _event(error_body(504, str(error)))
        return
    except M1Error as error:
        yield _event(error_body(503, str(error)))
        return
    if with_usage:
        usage = form.usage(sum(len(choice.outputs) for choice in choices))
        yield _event({**form.head(is_chunk=True), "choices": [], "usage": usage})
    yield "data: [DONE]\n\n"


def _parts(
    choice: Choice,
    index: int,
    text: str,
    form: Format,
    begun: set[int],
    has_tools: bool,
) -> list[dict[str, Any]]:
    """Parts of a stream that one more token gives rise to."""
    entry = form.common(index, choice.outputs[-1:])
    if not form.is_chat:
        return [{**entry, "text": text}]
    parts = []
    if index not in begun:
        begun.add(index)
        opening = {"role": "assistant", "content": ""}
        parts.append({"index": index, "delta": opening, "finish_reason": None, "logprobs": None})
    if has_tools and TOOL_MARK in choice.text:  # calls are told whole, at the end
        return parts + _tool_parts(choice, entry)
    return [*parts, {**entry, "delta": {"content": text} if text else {}}]


def _tool_parts(choice: Choice, entry: dict[str, Any]) -> list[dict[str, Any]]:
    if entry["finish_reason"] is None:
        return []
    _, calls = split_tool_calls(choice.text)
    if not calls:
        rest = choice.text[choice.text.index(TOOL_MARK) :]
        return [{**entry, "delta": {"content": rest}}]
    numbered = [{"index": number, **call} for number, call in enumerate(calls)]
    delta = {"tool_calls": numbered}
    return [{**entry, "delta": delta, "finish_reason": "tool_calls"}]


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
