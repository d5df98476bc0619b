"""The HTTP interface: OpenAI's completions and chats, and tokens in and out for RL."""

import asyncio
import time
from collections.abc import Coroutine
from contextlib import aclosing
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

from m1.config.schema import RepetitionStopConfig
from m1.inference.loop import EngineLoop
from m1.inference.params import SamplingParams
from m1.inference.server.answers import stream, whole
from m1.inference.server.errors import (
    BodyLimit,
    Guard,
    error_response,
    install_handlers,
)
from m1.inference.server.formats import Choice, Format
from m1.inference.server.metrics import Metrics
from m1.inference.server.running import Outbox, Running, seeds_for
from m1.inference.server.schemas import (
    ChatRequest,
    CompletionRequest,
    GenerateRequest,
    SamplingFields,
    WeightsRequest,
)
from m1.inference.text import TextTokenizer
from m1.types import M1Error

T = TypeVar("T")


@dataclass(frozen=True)
class ServerLimits:
    """What the server takes."""

    token: str | None = None
    """Bearer token; absent: anyone may ask."""
    timeout_seconds: float = 600.0
    """Of a request, from its first to its last byte."""
    max_body_bytes: int = 32 << 20


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class UnknownModel(Exception):
    """The request names a model that is not served."""


def create_app(
    loop: EngineLoop, tokenizer: TextTokenizer, *, model_name: str, limits: ServerLimits
) -> FastAPI:
    """The server around a running loop."""
    app = FastAPI(title="m1", docs_url=None, redoc_url=None)
    handlers = Handlers(loop, tokenizer, model_name, limits)
    install_handlers(app)

    async def unknown(_: Request, error: Exception) -> JSONResponse:
        return error_response(404, str(error), param="model")

    async def late(_: Request, error: Exception) -> JSONResponse:
        return error_response(504, str(error))

    async def gone(_: Request, error: Exception) -> Response:
        return Response(status_code=499)

    app.add_exception_handler(ClientGone, gone)
    app.add_exception_handler(UnknownModel, unknown)
    app.add_exception_handler(TimeoutError, late)
    app.add_middleware(BodyLimit, max_bytes=limits.max_body_bytes)
    app.add_middleware(Guard, token=limits.token, note=handlers.note)
    app.get("/health")(handlers.health)
    app.get("/metrics")(handlers.show_metrics)
    app.get("/v1/models")(handlers.models)
    app.post("/v1/completions", response_model=None)(handlers.completions)
    app.post("/v1/chat/completions", response_model=None)(handlers.chat)
    app.post("/generate")(handlers.generate)
    app.post("/weights")(handlers.weights)
    return app


class Handlers:
    """The endpoints."""

    def __init__(
        self, loop: EngineLoop, tokenizer: TextTokenizer, model_name: str, limits: ServerLimits
    ) -> None:
        self.loop, self.tokenizer, self.model_name = loop, tokenizer, model_name
        self.limits, self.metrics = limits, Metrics(loop)
        self.outbox = Outbox()
        loop.after_step = self.outbox.flush
        self.started = int(time.time())

    def note(self, path: str, status: int) -> None:
        """Count an answer."""
        self.metrics.requests.labels(path, str(status)).inc()

    async def health(self) -> Response:
        """200 while the engine lives."""
        if self.loop.failure is not None:
            return error_response(503, f"the engine has failed ({self.loop.failure!r})")
        return JSONResponse({"status": "ok", "policy_version": self.loop.core.policy_version})

    async def show_metrics(self) -> Response:
        """Prometheus text."""
        return PlainTextResponse(self.metrics.render(), media_type="text/plain; version=0.0.4")

    async def models(self) -> dict[str, Any]:
        """The one model."""
        entry = {
            "id": self.model_name,
            "object": "model",
            "created": self.started,
            "owned_by": "m1",
            "max_model_len": self.loop.core.max_position,
        }
        return {"object": "list", "data": [entry]}

    async def completions(self, request: Request, body: CompletionRequest) -> Response:
        """POST /v1/completions."""
        self._require_model(body.model)
        prompts = self._prompts(body.prompt)
        params = self._params(body, body.max_tokens, top_logprobs=body.logprobs or 0)
        form = self._format(body, prompts, is_chat=False, logprobs=body.logprobs)
        return await self._answer(request, body, prompts, params, form)

    async def chat(self, request: Request, body: ChatRequest) -> Response:
        """POST /v1/chat/completions."""
        self._require_model(body.model)
        tools = [] if body.tool_choice == "none" else body.tools
        messages = [message.model_dump() for message in body.messages]
        prompts = [tuple(self.tokenizer.render_chat(messages, tools))]
        room = self.loop.core.max_position - len(prompts[0])
        if room < 1:
            raise M1Error(
                f"the messages are {len(prompts[0])} tokens, but the model has positions for "
                f"{self.loop.core.max_position}; shorten them"
            )
        asked = body.max_completion_tokens or body.max_tokens
        room = min(room, self.loop.core.limits.num_tokens - len(prompts[0]))
        params = self._params(body, asked or max(room, 1), top_logprobs=body.top_logprobs or 0)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        form = self._format(body, prompts, is_chat=True, logprobs=logprobs)
        return await self._answer(request, body, prompts, params, form, has_tools=bool(tools))

    async def generate(self, request: Request, body: GenerateRequest) -> Response:
        """POST /generate."""
        params = SamplingParams(
            max_new_tokens=body.max_new_tokens,
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=body.top_k,
            min_p=body.min_p,
            stop_tokens=tuple(body.stop_tokens),
            repetition=RepetitionStopConfig(
                num_tokens=body.repetition_num_tokens, probability=body.repetition_probability
            ),
        )
        running = self._running([tuple(body.prompt_tokens)], params, [tuple(body.seeds)])
        await running.submit(whole=True)
        completions = [
            {
                "tokens": sequence.tokens,
                "logprobs": sequence.logprobs,
                "sampling_logprobs": sequence.sampling_logprobs,
                "entropies": sequence.entropies,
                "policy_versions": sequence.versions,
                "finish_reason": sequence.finish_reason,
                "routed_experts": sequence.routed_experts and asdict(sequence.routed_experts),
            }
            for sequence in await _unless_gone(request, running.ended())
        ]
        return JSONResponse({"completions": completions})

    async def weights(self, body: WeightsRequest) -> dict[str, Any]:
        """POST /weights: answers when the engine samples from the new ones."""
        await asyncio.to_thread(
            self.loop.load_weights, body.uri, body.version, recompute=body.recompute
        )
        return {"policy_version": self.loop.core.policy_version}

    async def _answer(
        self,
        request: Request,
        body: SamplingFields,
        prompts: list[tuple[int, ...]],
        params: SamplingParams,
        form: Format,
        *,
        has_tools: bool = False,
    ) -> Response:
        running = self._running(prompts, params, seeds_for(body.seed, len(prompts), body.n))
        if not body.stream:
            await running.submit()
            choices = await _unless_gone(request, _collect(running, len(prompts) * body.n))
            return JSONResponse(whole(choices, form, has_tools=has_tools))
        await running.submit()
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        parts = stream(running, form, has_tools=has_tools, with_usage=with_usage)
        return StreamingResponse(parts, media_type="text/event-stream")

    def _running(
        self,
        prompts: list[tuple[int, ...]],
        params: SamplingParams,
        seeds: list[tuple[int, ...]],
    ) -> Running:
        return Running(
            loop=self.loop,
            tokenizer=self.tokenizer,
            metrics=self.metrics,
            prompts=prompts,
            params=params,
            seeds=seeds,
            timeout_seconds=self.limits.timeout_seconds,
            outbox=self.outbox,
        )

    def _require_model(self, name: str | None) -> None:
        if name is not None and name != self.model_name:
            raise UnknownModel(f"the model {name!r} is not served here; it is {self.model_name!r}")

    def _prompts(self, prompt: Any) -> list[tuple[int, ...]]:
        if isinstance(prompt, str):
            return [tuple(self.tokenizer.encode(prompt))]
        if isinstance(prompt[0], int):
            return [tuple(prompt)]
        return [tuple(self.tokenizer.encode(p)) if isinstance(p, str) else tuple(p) for p in prompt]

    def _params(
        self, body: SamplingFields, max_tokens: int, *, top_logprobs: int
    ) -> SamplingParams:
        stops = [body.stop] if isinstance(body.stop, str) else (body.stop or [])
        ends = () if body.ignore_eos else self.tokenizer.stop_tokens
        return SamplingParams(
            max_new_tokens=max_tokens,
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=max(body.top_k, 0),
            min_p=body.min_p,
            stop_tokens=(*ends, *body.stop_token_ids),
            stop_strings=tuple(stops),
            top_logprobs=top_logprobs,
        )

    def _format(
        self,
        body: SamplingFields,
        prompts: list[tuple[int, ...]],
        *,
        is_chat: bool,
        logprobs: int | None,
    ) -> Format:
        return Format(
            tokenizer=self.tokenizer,
            model=self.model_name,
            is_chat=is_chat,
            prompts=tuple(prompts),
            num_choices=len(prompts) * body.n,
            logprobs=logprobs,
            as_token_ids=body.return_tokens_as_token_ids,
            with_token_ids=body.return_token_ids,
        )


async def _collect(running: Running, count: int) -> list[Choice]:
    """All completions of a request, with their texts."""
    choices = [Choice() for _ in range(count)]
    async with aclosing(running.pieces()) as pieces:
        async for piece in pieces:
            choices[piece.index].add(piece)
    return choices


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What the work results in, unless the client leaves first, which cancels it."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.create_task(work), asyncio.create_task(gone())
    await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
    leaving.cancel()
    if not working.done():
        working.cancel()
        raise ClientGone
    return working.result()
