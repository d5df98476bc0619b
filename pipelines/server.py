"""The connection to a KFP API server: who we are, what is tried again, errors in our words."""

import contextlib
import io
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import tenacity

from m1.types import M1Error

T = TypeVar("T")
HOST_VARIABLE, TOKEN_VARIABLE = "M1_KFP_HOST", "M1_KFP_TOKEN"
TOKEN_FILE_VARIABLE, COOKIES_FILE_VARIABLE = "M1_KFP_TOKEN_FILE", "M1_KFP_COOKIES_FILE"
_UNTOUCHED = (429, 503)
"""Answers of servers that did not do what was asked."""
_PASSING = (0, 429, 500, 502, 503, 504)
_EQUALS = 1  # kfp.client's number of the operation


@dataclass(frozen=True)
class Connection:
    """Where the server is and who asks. A token in a file may change while we run."""

    host: str = ""
    """http(s)://HOST[:PORT][/PATH]; empty: the cluster this process runs in."""
    ui: str = ""
    """Address of the UI, where it differs."""
    namespace: str = ""
    """Of a multi-user server."""
    token: str = ""
    """Bearer token."""
    token_file: str = ""
    """File with one, such as a service account's projected token."""
    cookies: str = ""
    """Cookie header, for servers behind a login page."""
    ca_file: str = ""
    """Certificate authority of the server."""
    retry_seconds: float = 60.0
    """How long an absent or busy server is asked again."""

    @property
    def ui_url(self) -> str:
        """Address of the UI."""
        return (self.ui or self.host).rstrip("/")


def connection(
    host: str = "",
    *,
    ui: str = "",
    namespace: str = "",
    token_file: str = "",
    cookies_file: str = "",
    ca_file: str = "",
    retry_seconds: float = 60.0,
) -> Connection:
    """A connection from options and, where they are empty, the environment.

    Tokens and cookies come from files or M1_KFP_TOKEN, never from a command line, which others on
    the machine can read.

    Raises:
        M1Error: A file cannot be read.
    """
    cookies_file = cookies_file or os.environ.get(COOKIES_FILE_VARIABLE, "")
    token_file = token_file or os.environ.get(TOKEN_FILE_VARIABLE, "")
    if token_file:
        _read(token_file)
    return Connection(
        host=host or os.environ.get(HOST_VARIABLE, ""),
        ui=ui,
        namespace=namespace,
        token="" if token_file else os.environ.get(TOKEN_VARIABLE, ""),
        token_file=token_file,
        cookies=_read(cookies_file) if cookies_file else "",
        ca_file=ca_file,
        retry_seconds=retry_seconds,
    )


def equals(name: str, value: str) -> str:
    """KFP's filter for one field."""
    predicate = {"operation": _EQUALS, "key": name, "stringValue": value}
    return json.dumps({"predicates": [predicate]})


class KfpServer:
    """KFP's own client with retries and plain errors."""

    def __init__(self, given: Connection) -> None:
        """Make the client; nothing is asked yet.

        Raises:
            M1Error: There is neither a host nor a cluster around us.
        """
        from kfp.client.set_volume_credentials import ServiceAccountTokenVolumeCredentials

        if not given.host and "KUBERNETES_SERVICE_HOST" not in os.environ:
            raise M1Error(
                f"no KFP server is named; give --host, or set {HOST_VARIABLE}, such as "
                "https://kubeflow.example.com/pipeline"
            )
        self.connection = given
        file = given.token_file
        with warnings.catch_warnings(), self._quiet():
            warnings.simplefilter("ignore")
            self.client = _client_class()(
                host=given.host or None,
                ui_host=given.ui_url or None,
                existing_token=given.token or None,
                credentials=ServiceAccountTokenVolumeCredentials(file) if file else None,
                cookies=given.cookies or None,
                ssl_ca_cert=given.ca_file or None,
                **({"namespace": given.namespace} if given.namespace else {}),
            )

    def read(self, call: Callable[[Any], T]) -> T:
        """Ask what changes nothing: again after every passing trouble."""
        return self._calling(call, _PASSING, is_repeatable=True)

    def write(self, call: Callable[[Any], T]) -> T:
        """Ask for a change: again only where it is sure that the server did nothing."""
        return self._calling(call, _UNTOUCHED, is_repeatable=False)

    def _calling(
        self, call: Callable[[Any], T], passing: tuple[int, ...], *, is_repeatable: bool
    ) -> T:
        from kfp_server_api import ApiException
        from urllib3.exceptions import HTTPError, MaxRetryError, NewConnectionError

        def is_passing(error: BaseException) -> bool:
            if isinstance(error, ApiException):
                # A token that has just been renewed in its file is read at the next attempt.
                expired = error.status == 401 and bool(self.connection.token_file)
                return error.status in passing or expired
            if isinstance(error, MaxRetryError) and isinstance(error.reason, NewConnectionError):
                return True  # it never arrived
            return is_repeatable and isinstance(error, HTTPError)

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(is_passing),
            stop=tenacity.stop_after_delay(self.connection.retry_seconds),
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=5),
            reraise=True,
        )
        try:
            with self._quiet():
                return retrying(call, self.client)
        except ApiException as error:
            raise KfpError(self._explained(error), status=int(error.status or 0)) from error
        except HTTPError as error:
            raise KfpError(
                f"the KFP server at {self.connection.host} does not answer since "
                f"{self.connection.retry_seconds:g} seconds: {error}; look at --host and the "
                "network"
            ) from error

    def _explained(self, error: Any) -> str:
        said = _message(error.body) or error.reason
        host = self.connection.host or "in this cluster"
        if error.status == 401:
            return (
                f"the KFP server at {host} does not accept the credentials (401: {said}): they "
                f"are absent or expired; renew the token ({TOKEN_VARIABLE}, --token-file) or the "
                "cookies (--cookies-file)"
            )
        if error.status == 403:
            return f"the KFP server at {host} forbids this (403: {said}); ask for the rights"
        if error.status == 429:
            return (
                f"the KFP server at {host} refuses for now (429: {said}): a quota or rate limit is "
                "reached; wait for other runs, or have it raised"
            )
        return f"the KFP server at {host} answered {error.status}: {said}"

    @contextlib.contextmanager
    def _quiet(self) -> Any:
        """KFP's client prints links."""
        with contextlib.redirect_stdout(io.StringIO()):
            yield


def _client_class() -> Any:
    from kfp import Client
    from kfp_server_api import V2beta1GetHealthzResponse

    class PatientClient(Client):  # type: ignore[misc]
        """KFP's client without the question it asks when it is made.

        That one is tried five times over 25 seconds, with every answer in the log.
        """

        def get_kfp_healthz(self, sleep_duration: int = 5) -> Any:
            return V2beta1GetHealthzResponse(multi_user=False)

    return PatientClient


class KfpError(M1Error):
    """The server refused or stayed away; `status` is HTTP's, 0 where it did not answer."""

    def __init__(self, message: str, *, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


def _message(body: Any) -> str:
    text = body.decode(errors="replace") if isinstance(body, bytes) else str(body or "")
    with contextlib.suppress(ValueError):
        parsed = json.loads(text)
        if isinstance(parsed, dict):
            text = str(parsed.get("message") or parsed.get("error_message") or text)
    return " ".join(text.split())[:300]


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise M1Error(f"{path} cannot be read: {error.strerror}; it should hold a secret") from None
