"""Engines behind HTTP: `m1 serve`, and any OpenAI-compatible server that returns log-probabilities.

Both are `m1.inference.engine.Engine`s, so whoever samples does not know where.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import httpx
from tenacity import (
    Retrying,
    retry_if_exception,
    stop_after_delay,
    wait_exponential_jitter,
)

from m1.config.schema import RepetitionStopConfig, SamplingConfig
from m1.inference.engine import Request
from m1.types import Completion, M1Error, RoutedExperts

_TRANSIENT = (429, 502, 503)


class EngineUnavailableError(M1Error):
    """A server that does not answer, or has failed; another one may do."""


class _Http:
    """JSON requests that wait while the server is busy or being restarted."""

    def __init__(
        self, url: str, *, token: str | None, timeout_seconds: float, patience_seconds: float
    ) -> None:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._make = partial(
            httpx.Client,
            base_url=url.rstrip("/"),
            headers=headers,
            timeout=timeout_seconds,
            verify=httpx.create_ssl_context(),
        )
        # One client a thread at a time: a shared one looks through all of its connections at every
        # request and answer, which for hundreds of them costs more than the requests.
        self._idle: deque[httpx.Client] = deque()
        self.url, self._patience_seconds = url, patience_seconds

    def get(self, path: str) -> Any:
        return self._retried(lambda client: client.get(path))

    def post(self, path: str, body: dict[str, Any]) -> Any:
        return self._retried(lambda client: client.post(path, json=body))

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    @contextmanager
    def _borrowed(self) -> Iterator[httpx.Client]:
        try:
            client = self._idle.pop()
        except IndexError:
            client = self._make()
        try:
            yield client
        except BaseException:
            client.close()
            raise
        self._idle.append(client)

    def _retried(self, call: Callable[[httpx.Client], httpx.Response]) -> Any:
        def once() -> httpx.Response:
            with self._borrowed() as client:
                response = call(client)
            if response.status_code in _TRANSIENT:
                response.raise_for_status()
            return response

        attempts = Retrying(
            retry=retry_if_exception(_is_transient),
            stop=stop_after_delay(self._patience_seconds),
            wait=wait_exponential_jitter(initial=0.1, max=5),
            reraise=True,
        )
        try:
            response = attempts(once)
        except httpx.HTTPError as error:
            raise EngineUnavailableError(
                f"the engine at {self.url} does not answer ({error or type(error).__name__}); "
                "start it, or mend the address"
            ) from error
        if response.is_success:
            return response.json()
        kind = EngineUnavailableError if response.is_server_error else M1Error
        raise kind(f"the engine at {self.url} refuses: {_message(response)}")


def _is_transient(error: BaseException) -> bool:
    return isinstance(error, httpx.TransportError | httpx.HTTPStatusError) and not isinstance(
        error, httpx.UnsupportedProtocol
    )


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{response.status_code} {response.text[:200]}"


class HttpEngine:
    """An `m1 serve` as an engine: tokens in, tokens out.

    A request that was cut off is sent again; with the same seeds it gets the same tokens, as long
    as the weights are the same.
    """

    def __init__(
        self,
        url: str,
        *,
        stop_token: int,
        token: str | None = None,
        repetition_stop: RepetitionStopConfig | None = None,
        max_requests: int = 64,
        timeout_seconds: float = 600.0,
        patience_seconds: float = 120.0,
        recompute_on_update: bool = False,
    ) -> None:
        """Connect.

        Args:
            url: http://HOST:PORT.
            stop_token: Id that ends a completion; it is the completion's last token.
            token: Bearer token.
            repetition_stop: Early truncation rule; absent: the paper's.
            max_requests: Prompts under way at a time.
            timeout_seconds: Of one request.
            patience_seconds: How long a busy or absent server is asked again.
            recompute_on_update: Whether completions under way at `load_weights` go on from states
                made again with the new weights; if not, from those of the old ones.
        """
        self._http = _Http(
            url, token=token, timeout_seconds=timeout_seconds, patience_seconds=patience_seconds
        )
        self.recompute_on_update = recompute_on_update
        self.stop_token, self.max_requests = stop_token, max_requests
        self.repetition_stop = repetition_stop or RepetitionStopConfig()

    @property
    def policy_version(self) -> int:
        """Version of the server's weights."""
        return int(self._http.get("/health")["policy_version"])

    def generate(
        self, requests: Sequence[Request], sampling: SamplingConfig
    ) -> list[list[Completion]]:
        """Completions of every request, in order of its seeds.

        Raises:
            M1Error: The server refuses a request; `EngineUnavailableError`: it does not answer.
        """
        if len(requests) == 1:
            return [self._one(requests[0], sampling)]
        with ThreadPoolExecutor(self.max_requests) as threads:
            return list(threads.map(lambda r: self._one(r, sampling), requests))

    def load_weights(self, uri: str, version: int) -> None:
        """Have the server go on with the weights at `uri`, which it must be able to read.

        Raises:
            M1Error: They are refused; the old ones stay.
        """
        body = {"uri": uri, "version": version, "recompute": self.recompute_on_update}
        self._http.post("/weights", body)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _one(self, request: Request, sampling: SamplingConfig) -> list[Completion]:
        body = {
            "prompt_tokens": list(request.prompt_tokens),
            "seeds": list(request.seeds),
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "stop_tokens": [self.stop_token],
            "repetition_num_tokens": self.repetition_stop.num_tokens,
            "repetition_probability": self.repetition_stop.probability,
        }
        return [
            Completion(
                prompt_tokens=request.prompt_tokens,
                tokens=tuple(found["tokens"]),
                logprobs=tuple(found["logprobs"]),
                entropies=tuple(found["entropies"]),
                finish_reason=found["finish_reason"],
                policy_versions=tuple(found["policy_versions"]),
                routed_experts=RoutedExperts(**told)
                if (told := found.get("routed_experts"))
                else None,
            )
            for found in self._http.post("/generate", body)["completions"]
        ]


class OpenAiEngine:
    """Any server with OpenAI's completions, log-probabilities and token ids as an engine.

    vLLM is one. Token ids come as `token_ids` (`return_token_ids`), or as "token_id:N" in the
    log-probabilities (`return_tokens_as_token_ids`). What such a server does not tell is not made
    up: entropies are NaN, and the policy version is the one that was set here.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str,
        stop_token: int,
        token: str | None = None,
        max_requests: int = 64,
        timeout_seconds: float = 600.0,
        patience_seconds: float = 120.0,
    ) -> None:
        """Connect.

        Args:
            url: Up to and without /v1.
            model: Name of the model there.
            stop_token: Id that ends a completion.
            token: Bearer token.
            max_requests: Completions under way at a time.
            timeout_seconds: Of one request.
            patience_seconds: How long a busy or absent server is asked again.
        """
        self._http = _Http(
            url, token=token, timeout_seconds=timeout_seconds, patience_seconds=patience_seconds
        )
        self.model, self.stop_token, self.max_requests = model, stop_token, max_requests
        self.policy_version = 0

    def generate(
        self, requests: Sequence[Request], sampling: SamplingConfig
    ) -> list[list[Completion]]:
        """Completions of every request, in order of its seeds.

        Raises:
            M1Error: The server refuses, does not answer, or returns no log-probabilities or ids.
        """
        pairs = [(request, seed) for request in requests for seed in request.seeds]
        with ThreadPoolExecutor(self.max_requests) as threads:
            found = iter(
                list(threads.map(lambda pair: self._one(pair[0], pair[1], sampling), pairs))
            )
        return [[next(found) for _ in request.seeds] for request in requests]

    def load_weights(self, uri: str, version: int) -> None:
        """Raises: this interface has no such call.

        Raises:
            M1Error: Always.
        """
        raise M1Error(
            f"an OpenAI-compatible server cannot load {uri}; update it by its own means and set "
            f"policy_version to {version}, or use `m1 serve` with HttpEngine"
        )

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _one(self, request: Request, seed: int, sampling: SamplingConfig) -> Completion:
        body = {
            "model": self.model,
            "prompt": list(request.prompt_tokens),
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            **_filters(sampling),
            "seed": seed >> 1,  # signed 64-bit there
            "logprobs": 0,
            "stop_token_ids": [self.stop_token],
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        choice = self._http.post("/v1/completions", body)["choices"][0]
        logprobs = choice.get("logprobs") or {}
        if not logprobs.get("token_logprobs"):
            raise M1Error(
                f"the server at {self._http.url} returned no log-probabilities, which RL needs; "
                "turn them on there, or use another"
            )
        tokens = choice.get("token_ids") or _ids(logprobs["tokens"], self._http.url)
        return Completion(
            prompt_tokens=request.prompt_tokens,
            tokens=tuple(tokens),
            logprobs=tuple(logprobs["token_logprobs"]),
            entropies=(float("nan"),) * len(tokens),
            finish_reason=choice["finish_reason"],
            policy_versions=(self.policy_version,) * len(tokens),
        )


def _filters(sampling: SamplingConfig) -> dict[str, float]:
    """What OpenAI's interface lacks, where it is asked for: many servers refuse unknown fields."""
    found = {"top_k": sampling.top_k, "min_p": sampling.min_p}
    return {name: value for name, value in found.items() if value}


def _ids(names: Sequence[str], url: str) -> list[int]:
    if not all(name.startswith("token_id:") for name in names):
        raise M1Error(
            f"the server at {url} returned no token ids, and text does not determine them; use one "
            "that knows return_token_ids, as vLLM does"
        )
    return [int(name.removeprefix("token_id:")) for name in names]
