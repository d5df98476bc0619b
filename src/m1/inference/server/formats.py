"""Completions in the shapes of the OpenAI interface, whole and in parts."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from m1.inference.params import TokenOutput
from m1.inference.server.running import Piece
from m1.inference.text import TextTokenizer


@dataclass
class Choice:
    """One completion as it is put together."""

    text: str = ""
    outputs: list[TokenOutput] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        """Append what a token added."""
        self.text += piece.text
        self.outputs.append(piece.output)


@dataclass(frozen=True)
class Format:
    """How a request wants its completions."""

    tokenizer: TextTokenizer
    model: str
    is_chat: bool
    prompts: tuple[tuple[int, ...], ...]
    num_choices: int
    """Of all prompts."""
    logprobs: int | None = None
    """Alternatives at every place; None without log-probabilities."""
    as_token_ids: bool = False
    with_token_ids: bool = False
    identity: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def head(self, *, is_chunk: bool) -> dict[str, Any]:
        """What every answer and every part of a stream begins with."""
        kind = "text_completion"
        if self.is_chat:
            kind = "chat.completion.chunk" if is_chunk else "chat.completion"
        prefix = "chatcmpl" if self.is_chat else "cmpl"
        return {
            "id": f"{prefix}-{self.identity}",
            "object": kind,
            "created": self.created,
            "model": self.model,
        }

    def usage(self, num_completion_tokens: int) -> dict[str, int]:
        """Token counts."""
        num_prompt_tokens = sum(map(len, self.prompts))
        return {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": num_completion_tokens,
            "total_tokens": num_prompt_tokens + num_completion_tokens,
        }

    def common(self, index: int, outputs: Sequence[TokenOutput]) -> dict[str, Any]:
        """Index, finish reason, log-probabilities and token ids of (a part of) a completion."""
        last = outputs[-1].finish_reason if outputs else None
        found: dict[str, Any] = {
            "index": index,
            "finish_reason": openai_reason(last),
            "logprobs": self._logprobs(outputs),
        }
        if last is not None:
            found["stop_reason"] = outputs[-1].stop_string or last
        if self.with_token_ids:
            found["token_ids"] = [output.token for output in outputs]
            found["policy_versions"] = [output.policy_version for output in outputs]
            found["sampling_logprobs"] = [output.sampling_logprob for output in outputs]
            each = self.num_choices // len(self.prompts)
            found["prompt_token_ids"] = list(self.prompts[index // each])
        return found

    def _logprobs(self, outputs: Sequence[TokenOutput]) -> dict[str, Any] | None:
        if self.logprobs is None:
            return None
        if self.is_chat:
            return {"content": [self._chat_logprob(output) for output in outputs]}
        names = [self._name(output.token) for output in outputs]
        offsets, end = [], 0
        for name in names:
            offsets.append(end)
            end += len(name)
        return {
            "tokens": names,
            "token_logprobs": [output.logprob for output in outputs],
            "top_logprobs": [
                {self._name(token): value for token, value in output.top} for output in outputs
            ]
            if self.logprobs
            else None,
            "text_offset": offsets,
        }

    def _chat_logprob(self, output: TokenOutput) -> dict[str, Any]:
        def entry(token: int, value: float) -> dict[str, Any]:
            name = self._name(token)
            return {"token": name, "logprob": value, "bytes": list(name.encode())}

        top = [entry(token, value) for token, value in output.top]
        return {**entry(output.token, output.logprob), "top_logprobs": top}

    def _name(self, token: int) -> str:
        return f"token_id:{token}" if self.as_token_ids else self.tokenizer.decode([token])


def openai_reason(reason: str | None) -> str | None:
    """The interface knows `stop` and `length`; a repetition stop cuts off, as a length does."""
    return "length" if reason == "repetition" else reason
