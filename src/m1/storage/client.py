"""The minio client, told the SHA-256 of a body that its caller has already taken."""

from datetime import datetime
from typing import Any

from minio import Minio

from m1.storage.parts import BODY_SHA256


class HashedMinio(Minio):
    """Minio that signs a body by the SHA-256 in its headers, where they have one.

    The server compares what it received with that digest, over TLS too. minio itself hashes every
    body again, or leaves it unsigned over TLS; hashing is most of what an upload costs its client.
    """

    def _build_headers(
        self, host: str, headers: Any = None, body: bytes | None = None, creds: Any = None
    ) -> tuple[Any, datetime]:
        given = dict(headers or {})
        known = given.pop(BODY_SHA256, None)
        if known is None or creds is None:
            return super()._build_headers(host, given, body, creds)
        built, date = super()._build_headers(host, given, None, creds)
        built.pop("Content-MD5", None)
        built[BODY_SHA256] = known
        built["Content-Length"] = str(len(body or b""))
        return built, date
