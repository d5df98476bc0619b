"""Errors with the status and body that OpenAI's clients know; a bound on the size of bodies."""

import secrets
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from m1.inference.loop import BusyError, EngineFailedError
from m1.types import M1Error

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


def error_body(status: int, message: str, *, param: str | None = None) -> dict[str, Any]:
    """The body of an error."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def error_response(status: int, message: str, *, param: str | None = None) -> JSONResponse:
    """A whole error."""
    headers = {"Retry-After": "1"} if status == 429 else None
    return JSONResponse(error_body(status, message, param=param), status, headers)


def install_handlers(app: FastAPI) -> None:
    """Turn exceptions into errors."""

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        text = f"{where}: {first['msg']}" if where else str(first["msg"])
        return error_response(400, text, param=where or None)

    async def refused(_: Request, error: Exception) -> JSONResponse:
        return error_response(400, str(error))

    async def busy(_: Request, error: Exception) -> JSONResponse:
        return error_response(429, str(error))

    async def failed(_: Request, error: Exception) -> JSONResponse:
        return error_response(503, str(error))

    async def http(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return error_response(error.status_code, str(error.detail))

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(M1Error, refused)
    app.add_exception_handler(EngineFailedError, failed)
    app.add_exception_handler(BusyError, busy)
    app.add_exception_handler(HTTPException, http)


class Guard:
    """Asks for the bearer token everywhere but at /health, and tells each answer's status."""

    def __init__(self, app: ASGIApp, token: str | None, note: Callable[[str, int], None]) -> None:
        self.app, self.token, self.note = app, token, note

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                status = message["status"]
                self.note("other" if status == 404 else scope["path"], status)
            await send(message)

        given = dict(scope["headers"]).get(b"authorization", b"").removeprefix(b"Bearer ")
        is_open = self.token is None or scope["path"] == "/health"
        if is_open or secrets.compare_digest(given, (self.token or "").encode()):
            await self.app(scope, receive, noting)
        else:
            text = "the bearer token is missing or wrong"
            await error_response(401, text)(scope, receive, noting)


class BodyLimit:
    """Refuses bodies beyond a size with 413, whether their length is announced or not."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with what it may hold."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        size = int(announced) if announced.isdigit() else 0
        body = bytearray()
        more = size <= self.max_bytes
        while more and len(body) <= self.max_bytes:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        if max(size, len(body)) > self.max_bytes:
            text = f"the body is larger than {self.max_bytes} bytes; send less at a time"
            await error_response(413, text)(scope, receive, send)
            return
        is_given = False

        async def replay() -> Message:
            nonlocal is_given
            if is_given:
                return await receive()
            is_given = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        await self.app(scope, replay, send)
