"""Buckets, lifecycle rules, and an account for each use that reaches its own bucket only.

Runs in the `ops` image, as often as one likes. ACCOUNTS=none leaves accounts out, for S3 servers
without MinIO's administration.
"""

import json
import os
import time
from pathlib import Path
from urllib.parse import urlsplit

import urllib3
from minio import Minio, MinioAdmin
from minio.commonconfig import ENABLED, Filter
from minio.credentials import StaticProvider
from minio.error import S3Error
from minio.lifecycleconfig import Expiration, LifecycleConfig, Rule

BUCKETS = ("m1-runs", "mlflow")
SCRATCH_DAYS = 7
PATIENCE_SECONDS = 300.0


def secret(name: str) -> str:
    """One key of the Secrets mounted below /secrets."""
    return (Path("/secrets") / name).read_text().strip()


def make_bucket(client: Minio, bucket: str) -> None:
    """Make it once the server answers; objects below scratch/ expire."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            if not client.bucket_exists(bucket):
                client.make_bucket(bucket)
            break
        except (urllib3.exceptions.HTTPError, S3Error) as error:
            if time.monotonic() > deadline:
                raise
            print(f"waiting for the server: {error}", flush=True)
            time.sleep(3)
    rule = Rule(
        ENABLED,
        rule_filter=Filter(prefix="scratch/"),
        rule_id="scratch",
        expiration=Expiration(days=SCRATCH_DAYS),
    )
    client.set_bucket_lifecycle(bucket, LifecycleConfig([rule]))


def make_account(admin: MinioAdmin, bucket: str, key: str, value: str) -> None:
    """An account that may read and write one bucket."""
    text = Path(__file__).with_name("access.json").read_text().replace("BUCKET", bucket)
    admin.policy_add(f"use-{bucket}", policy=json.loads(text))
    admin.user_add(key, value)
    admin.policy_set(f"use-{bucket}", user=key)


def main() -> None:
    """Set the store up."""
    address = urlsplit(os.environ["ENDPOINT"])
    is_secure = address.scheme == "https"
    user, password = secret("root/user"), secret("root/password")
    client = Minio(address.netloc, access_key=user, secret_key=password, secure=is_secure)
    admin = MinioAdmin(
        endpoint=address.netloc, credentials=StaticProvider(user, password), secure=is_secure
    )
    for bucket in BUCKETS:
        make_bucket(client, bucket)
        if os.environ.get("ACCOUNTS") != "none":
            make_account(
                admin,
                bucket,
                secret(f"{bucket}/access_key_id"),
                secret(f"{bucket}/secret_access_key"),
            )
        print(f"{bucket} is ready", flush=True)


if __name__ == "__main__":
    main()
