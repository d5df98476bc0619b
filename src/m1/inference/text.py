"""Text at the server's door: tokens of prompts and chats, and text of tokens as they come."""

import json
import re
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers.decoders import DecodeStream

from m1.types import M1Error

_SLOT = re.compile("\ue000(\\d+)\ue001")
"""Stands for a text of the caller's while a template is rendered."""


class TextStream:
    """Text of one completion, token by token; bytes of unfinished characters wait."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer, self._stream = tokenizer, DecodeStream(skip_special_tokens=False)
        self._waiting: list[int] = []

    def step(self, token: int) -> str | None:
        """New text that the token completes, or None."""
        text: str | None = self._stream.step(self._tokenizer, token)
        self._waiting = [] if text else [*self._waiting, token]
        return text

    def rest(self) -> str:
        """What still waits when the completion has ended, unfinished as it is."""
        waiting, self._waiting = self._waiting, []
        text: str = self._tokenizer.decode(waiting, skip_special_tokens=False)
        return text


class TextTokenizer:
    """A Hugging Face tokenizer folder as the server needs it.

    Text of callers never becomes a special token, in prompts or in chats: "<|end|>" in a message is
    plain characters, so no message can forge a turn.
    """

    def __init__(self, folder: Path) -> None:
        """Read a folder.

        Raises:
            M1Error: It has no tokenizer.json, or no token is known to end a completion.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise M1Error(
                f"{folder} has no tokenizer.json; name the folder of a Hugging Face fast tokenizer "
                "with --tokenizer"
            )
        content = path.read_text(encoding="utf-8")
        self._plain = tokenizers.Tokenizer.from_str(content)
        self._plain.encode_special_tokens = True  # that is, as plain characters
        self._template_side = tokenizers.Tokenizer.from_str(content)
        self.vocab_size: int = self._plain.get_vocab_size()
        settings = _read_json(folder / "tokenizer_config.json")
        generation = _read_json(folder / "generation_config.json")
        self.stop_tokens = self._stop_tokens(settings, generation, folder)
        self._special = [
            token.content
            for token in self._plain.get_added_tokens_decoder().values()
            if token.special
        ]
        self._settings = settings
        self._template = _template(settings, folder)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without special ones.

        Raises:
            M1Error: It is no valid Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise M1Error(f"the text is no valid Unicode ({error.reason}); mend it") from error
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens; special ones appear by name."""
        text: str = self._plain.decode(list(ids), skip_special_tokens=False)
        return text

    def decode_stream(self) -> TextStream:
        """A decoder for one completion."""
        return TextStream(self._plain)

    def render_chat(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()
    ) -> list[int]:
        """Tokens of a conversation up to where the assistant speaks.

        Args:
            messages: As the OpenAI interface has them.
            tools: The same, for templates that know tools.

        Raises:
            M1Error: There is no template, it refuses the messages, or a tool spells a special
                token.
        """
        if self._template is None:
            raise M1Error(
                "the tokenizer has no chat template; use /v1/completions, or add chat_template to "
                "tokenizer_config.json"
            )
        texts: list[str] = []
        self._require_harmless(json.dumps(list(tools)))
        slotted = [self._with_slots(message, texts) for message in messages]
        try:
            rendered = self._template.render(
                messages=slotted,
                tools=list(tools) or None,
                add_generation_prompt=True,
                bos_token=_token_text(self._settings.get("bos_token")),
                eos_token=_token_text(self._settings.get("eos_token")),
            )
        except jinja2.TemplateError as error:
            raise M1Error(f"the chat template refuses these messages: {error}") from error
        return list(self._encode_rendered(rendered, texts))

    def _with_slots(self, message: dict[str, Any], texts: list[str]) -> dict[str, Any]:
        """The message with its content out of the template's sight."""
        content = message.get("content")
        if isinstance(content, list):
            content = "".join(_part_text(part) for part in content)
        calls = message.get("tool_calls")
        self._require_harmless(json.dumps(calls))
        found = {key: value for key, value in message.items() if value is not None}
        if isinstance(content, str):
            texts.append(content)
            found["content"] = f"\ue000{len(texts) - 1}\ue001"
        else:
            found["content"] = ""
        if calls:
            found["tool_calls"] = [_call_for_template(call) for call in calls]
        return found

    def _require_harmless(self, text: str) -> None:
        spelled = [token for token in self._special if token in text]
        if spelled:
            raise M1Error(
                f"the tools spell the special token {spelled[0]}, with which they could forge a "
                "turn; write it otherwise"
            )

    def _encode_rendered(self, rendered: str, texts: list[str]) -> Iterator[int]:
        end = 0
        for match in _SLOT.finditer(rendered):
            yield from self._encode_template(rendered[end : match.start()])
            yield from self.encode(texts[int(match[1])])
            end = match.end()
        yield from self._encode_template(rendered[end:])

    def _encode_template(self, text: str) -> list[int]:
        ids: list[int] = self._template_side.encode(text, add_special_tokens=False).ids
        return ids

    def _stop_tokens(
        self, settings: dict[str, Any], generation: dict[str, Any], folder: Path
    ) -> tuple[int, ...]:
        given = generation.get("eos_token_id")
        found = given if isinstance(given, list) else [given]
        name = _token_text(settings.get("eos_token"))
        found.append(self._plain.token_to_id(name) if name else None)
        known = tuple(dict.fromkeys(token for token in found if token is not None))
        if not known:
            raise M1Error(
                f"{folder} names no token that ends a completion; set eos_token in "
                "tokenizer_config.json"
            )
        return known


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


def _token_text(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _template(settings: dict[str, Any], folder: Path) -> jinja2.Template | None:
    """The chat template, in the dialect that transformers has made the standard."""
    beside = folder / "chat_template.jinja"
    text = beside.read_text(encoding="utf-8") if beside.is_file() else settings.get("chat_template")
    if not isinstance(text, str):
        return None

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    return environment.from_string(text)


def _part_text(part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        raise M1Error("a message has a part that is no text; this model reads text only")
    return str(part.get("text", ""))


def _call_for_template(call: dict[str, Any]) -> dict[str, Any]:
    function = dict(call.get("function") or {})
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            function["arguments"] = json.loads(arguments)
        except ValueError as error:
            raise M1Error(f"the arguments of a tool call are not JSON ({error})") from error
    return {**call, "function": function}


_CALLS = re.compile(r"<tool_calls?>\s*(.*?)\s*</tool_calls?>", re.DOTALL)
TOOL_MARK = "<tool_call"
"""How tool calls begin in a completion."""


def split_tool_calls(text: str) -> tuple[str, list[dict[str, Any]]]:
    """Take tool calls out of a completion.

    Understood are `<tool_calls>` with a JSON object a line (MiniMax-M1) and `<tool_call>` with one
    object; what is no valid call stays in the text.

    Returns:
        The text without them, and the calls as the OpenAI interface has them.
    """
    calls: list[dict[str, Any]] = []

    def take(match: re.Match[str]) -> str:
        found = _parse_calls(match[1])
        calls.extend(found)
        return "" if found else match[0]

    return _CALLS.sub(take, text), calls


def _parse_calls(block: str) -> list[dict[str, Any]]:
    try:
        entries = [json.loads(block)]
    except ValueError:
        try:
            entries = [json.loads(line) for line in block.splitlines() if line.strip()]
        except ValueError:
            return []
    calls = []
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            return []
        arguments = json.dumps(entry.get("arguments", {}), ensure_ascii=False)
        function = {"name": entry["name"], "arguments": arguments}
        calls.append({"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function})
    return calls
