"""The connection to an S3 server: endpoint, credentials, TLS, retries, and what errors mean.

All of it comes from the environment or from secret files, never from a recipe:

- S3_ENDPOINT or AWS_ENDPOINT_URL (absent: AWS), AWS_REGION, SSL_CERT_FILE or AWS_CA_BUNDLE;
- AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or files that hold them, named by
  the same names with `_FILE` (as Kubernetes mounts secrets; read at every request, so that they may
  be renewed), or AWS_SHARED_CREDENTIALS_FILE with AWS_PROFILE.
"""

import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from m1.types import M1Error

if TYPE_CHECKING:
    from minio import Minio

T = TypeVar("T")

MAX_CONNECTIONS = 32
STALL_SECONDS = 30.0
"""A transfer that moves (nearly) nothing for this long is given up and the request repeated;
S3_STALL_SECONDS changes it."""
PATIENCE_SECONDS = 120.0
"""How long transfers are retried; S3_RETRY_SECONDS changes it."""
_TRANSIENT_CODES = {
    "BadDigest",
    "IncompleteBody",
    "InternalError",
    "OperationAborted",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "XAmzContentChecksumMismatch",
    "XAmzContentSHA256Mismatch",
}
_REFUSALS = {"AccessDenied", "ExpiredToken", "InvalidAccessKeyId", "SignatureDoesNotMatch"}


class BadTransfer(Exception):
    """Bytes that arrived torn, altered or too slowly; the transfer is repeated."""


class Changed(Exception):
    """A conditional request met another state than it asked for."""


def endpoint() -> str:
    """Address of the S3 server.

    Raises:
        M1Error: It holds a user name or password.
    """
    given = os.environ.get("S3_ENDPOINT") or os.environ.get("AWS_ENDPOINT_URL")
    if given and "@" in given:
        raise M1Error(
            "the S3 endpoint in S3_ENDPOINT or AWS_ENDPOINT_URL holds credentials (…@host), which "
            "logs would repeat; set it to scheme://host:port and export AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY"
        )
    return given or "https://s3.amazonaws.com"


def secret(name: str) -> str | None:
    """A secret from the environment variable `name`, or from the file that `name`_FILE names.

    Raises:
        M1Error: The file cannot be read.
    """
    value, file = os.environ.get(name), os.environ.get(f"{name}_FILE")
    if value or not file:
        return value or None
    try:
        return Path(file).read_text().strip() or None
    except OSError as error:
        raise M1Error(
            f"{name}_FILE names {file}, which cannot be read ({error.strerror}); mount the secret "
            f"there or export {name}"
        ) from error


def make_client(*, timeout_seconds: float | None = None, needs_credentials: bool = True) -> "Minio":
    """A client of the configured server, without retries of its own.

    Args:
        timeout_seconds: Longest wait for a connection (at most 5) and for data; absent:
            `stall_seconds`.
        needs_credentials: Otherwise a client without any asks as everybody may.

    Raises:
        M1Error: There are no credentials, or the endpoint is no address.
    """
    import certifi
    import urllib3

    from m1.storage.client import HashedMinio

    address = endpoint()
    timeout = stall_seconds() if timeout_seconds is None else timeout_seconds
    has_credentials = needs_credentials or secret("AWS_ACCESS_KEY_ID")
    scheme, separator, host = address.partition("://")
    authorities = os.environ.get("SSL_CERT_FILE") or os.environ.get("AWS_CA_BUNDLE")
    http = urllib3.PoolManager(
        maxsize=MAX_CONNECTIONS,
        timeout=urllib3.Timeout(connect=min(5.0, timeout), read=timeout),
        retries=False,
        ca_certs=authorities or certifi.where(),
    )
    try:
        return HashedMinio(
            (host if separator else scheme).rstrip("/"),
            credentials=_provider(address) if has_credentials else None,
            secure=not separator or scheme == "https",
            # A given region saves a request that many compatible servers do not answer.
            region=os.environ.get("AWS_REGION", "us-east-1"),
            http_client=http,
        )
    except ValueError as error:
        raise M1Error(
            f"S3 endpoint {address!r} is not usable ({error}); "
            "set S3_ENDPOINT to scheme://host:port without a path"
        ) from error


def _provider(address: str) -> Any:
    from minio.credentials.credentials import Credentials
    from minio.credentials.providers import AWSConfigProvider, Provider

    class Secrets(Provider):
        """Keys as they stand now, so that renewed secret files take effect."""

        def retrieve(self) -> Credentials:
            key, word = secret("AWS_ACCESS_KEY_ID"), secret("AWS_SECRET_ACCESS_KEY")
            if key and word:
                return Credentials(key, word, secret("AWS_SESSION_TOKEN"))
            if os.environ.get("AWS_SHARED_CREDENTIALS_FILE"):
                return shared()
            raise M1Error(
                f"{address} needs credentials, but AWS_ACCESS_KEY_ID or AWS_SECRET_ACCESS_KEY is "
                "not set; export both, or name files that hold them in AWS_ACCESS_KEY_ID_FILE and "
                "AWS_SECRET_ACCESS_KEY_FILE"
            )

    def shared() -> Credentials:
        try:
            return AWSConfigProvider().retrieve()
        except (ValueError, OSError) as error:
            raise M1Error(
                f"AWS_SHARED_CREDENTIALS_FILE gives no credentials for {address} "
                f"({type(error).__name__}); correct the file or AWS_PROFILE"
            ) from None

    provider = Secrets()
    provider.retrieve()
    return provider


class Connection:
    """Requests to one bucket, repeated with backoff and jitter where that helps."""

    def __init__(self, bucket: str) -> None:
        self.bucket = bucket
        self.endpoint = endpoint()

    @cached_property
    def client(self) -> "Minio":
        """The client, made at first use."""
        return make_client()

    def call(
        self, operation: "Callable[[Minio], T]", *, patience_seconds: float | None = None
    ) -> T:
        """Run one idempotent operation.

        Args:
            operation: May be called several times.
            patience_seconds: How long failures of the network and the server are retried.

        Raises:
            M1Error: The server is out of reach or refuses, with the remedy.
            FileNotFoundError: There is no such object.
            Changed: A condition of the request does not hold.
        """
        from xml.etree.ElementTree import ParseError

        import tenacity
        from minio.error import MinioException, S3Error
        from urllib3.exceptions import HTTPError

        client = self.client
        patience = _patience() if patience_seconds is None else patience_seconds
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(is_transient),
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=10),
            stop=tenacity.stop_after_delay(patience),
            reraise=True,
        )
        try:
            return retrying(operation, client)
        except HTTPError as error:
            raise M1Error(
                f"S3 endpoint {self.endpoint} cannot be reached ({error}); "
                "start the server or correct S3_ENDPOINT"
            ) from error
        except S3Error as error:
            raise self._explained(error) from error
        except (MinioException, BadTransfer, ParseError) as error:
            raise M1Error(
                f"{self.endpoint} failed on s3://{self.bucket} for {patience:g} s: {error}; look "
                "at the server, then run the same command to go on"
            ) from error

    def missing_bucket(self) -> M1Error:
        """The error for a bucket that does not exist."""
        return M1Error(
            f"bucket {self.bucket!r} does not exist at {self.endpoint}; create it: "
            f'mc alias set m1 {self.endpoint} "$AWS_ACCESS_KEY_ID" "$AWS_SECRET_ACCESS_KEY" && '
            f"mc mb m1/{self.bucket}"
        )

    def _explained(self, error: Any) -> Exception:
        code, message = error.code, str(error)
        if code == "NoSuchKey":
            return FileNotFoundError(f"{message} at {self.endpoint}")
        if code in {"PreconditionFailed", "ConditionalRequestConflict"}:
            return Changed(message)
        if code == "NoSuchUpload":
            return Changed(message)
        if code == "NoSuchBucket":
            return self.missing_bucket()
        if code in _REFUSALS:
            return M1Error(
                f"{self.endpoint} refuses s3://{self.bucket} ({code}); correct AWS_ACCESS_KEY_ID "
                "and AWS_SECRET_ACCESS_KEY, or let that user read and write the bucket"
            )
        return M1Error(f"{self.endpoint} failed on s3://{self.bucket}: {message}")


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    from xml.etree.ElementTree import ParseError

    from minio.error import InvalidResponseError, S3Error, ServerError
    from urllib3.exceptions import HTTPError, LocationValueError, SSLError

    if isinstance(error, S3Error):
        status = getattr(error.response, "status", 0)
        return error.code in _TRANSIENT_CODES or status >= 500 or status == 429
    if isinstance(error, InvalidResponseError):  # a gateway's page instead of S3's words
        return error._code >= 500 or error._code == 429
    if isinstance(error, SSLError | LocationValueError):
        return False
    # ParseError: an answer in XML that was cut off.
    return isinstance(error, HTTPError | ServerError | BadTransfer | ParseError)


def stall_seconds() -> float:
    """How long a transfer may stand still."""
    return _seconds("S3_STALL_SECONDS", STALL_SECONDS)


def _patience() -> float:
    return _seconds("S3_RETRY_SECONDS", PATIENCE_SECONDS)


def _seconds(name: str, default: float) -> float:
    given = os.environ.get(name)
    try:
        return float(given) if given else default
    except ValueError:
        raise M1Error(f"{name} is {given!r}; give a number of seconds") from None
