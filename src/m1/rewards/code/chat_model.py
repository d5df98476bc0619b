"""A language model behind any OpenAI-compatible endpoint, for writing tests."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import httpx
from tenacity import retry, retry_if_exception, stop_after_attempt, wait_exponential

from m1.types import M1Error

_TIMEOUT_SECONDS = 300.0
_ATTEMPTS = 4


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


class ChatModel(Protocol):
    """What writes generators and solutions."""

    def complete(self, messages: Sequence[Message]) -> str:
        """The reply to a conversation."""


class OpenAIChat:
    """`POST {base_url}/chat/completions`; the key comes from OPENAI_API_KEY, if there is one."""

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        temperature: float = 0.7,
        top_p: float | None = None,
        max_tokens: int | None = None,
    ) -> None:
        """Name an endpoint, up to and with its /v1; what is None is left to it."""
        key = os.environ.get("OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(base_url=base_url, headers=headers, timeout=_TIMEOUT_SECONDS)
        options = {"top_p": top_p, "max_tokens": max_tokens}
        given = {name: value for name, value in options.items() if value is not None}
        self._body: dict[str, Any] = {"model": model, "temperature": temperature, **given}

    @retry(
        retry=retry_if_exception(lambda error: _is_transient(error)),
        stop=stop_after_attempt(_ATTEMPTS),
        wait=wait_exponential(multiplier=0.2, max=20),
        reraise=True,
    )
    def complete(self, messages: Sequence[Message], *, seed: int | None = None) -> str:
        """The reply, from the seed where the endpoint knows seeds.

        Raises:
            M1Error: The endpoint refuses, or answers in another form.
        """
        body = {
            **self._body,
            "messages": [{"role": m.role, "content": m.content} for m in messages],
        }
        if seed is not None:
            body["seed"] = seed
        response = self._client.post("chat/completions", json=body)
        if response.status_code >= 500 or response.status_code == 429:
            response.raise_for_status()
        try:
            content = response.json()["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise M1Error(
                f"{self._client.base_url} answered {response.status_code} without a completion: "
                f"{response.text[:200]!r}; check the address, the model's name and OPENAI_API_KEY"
            ) from error
        return str(content)


def _is_transient(error: BaseException) -> bool:
    return isinstance(error, httpx.TransportError | httpx.HTTPStatusError)
