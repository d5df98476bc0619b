"""Rules by which an S3 server cleans up after runs that ended badly."""

from m1.storage.s3 import S3Storage

RULE = "m1-abort-incomplete-uploads"


def set_lifecycle(storage: S3Storage, *, abort_after_days: int = 7) -> None:
    """Let the server drop parts of uploads that nobody finished; other rules of the bucket stay.

    Only the run that started an upload goes on with it, so after its machine is gone for good the
    parts are of no use, and they are not seen in listings.

    Args:
        storage: Whose bucket; the rule covers its prefix.
        abort_after_days: Age of an upload at which its parts are removed.

    Raises:
        M1Error: The server refuses; few compatible ones lack these rules.
    """
    from minio.commonconfig import Filter
    from minio.lifecycleconfig import AbortIncompleteMultipartUpload, LifecycleConfig, Rule

    prefix = f"{storage.prefix}/" if storage.prefix else ""
    name = f"{RULE}-{storage.prefix}" if storage.prefix else RULE
    rule = Rule(
        "Enabled",
        rule_filter=Filter(prefix=prefix),
        rule_id=name,
        abort_incomplete_multipart_upload=AbortIncompleteMultipartUpload(
            days_after_initiation=abort_after_days
        ),
    )
    call = storage.connection.call
    found = call(lambda client: client.get_bucket_lifecycle(storage.bucket))
    others = [other for other in (found.rules if found else []) if other.rule_id != name]
    call(
        lambda client: client.set_bucket_lifecycle(storage.bucket, LifecycleConfig([*others, rule]))
    )
