"""Whether S3 and a cluster answer, for `m1 doctor`; (None, why) where neither is configured."""

import importlib.util
import os
from pathlib import Path

_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")


def s3_state(*, timeout_seconds: float) -> tuple[bool | None, str]:
    """Ask the configured endpoint for its buckets.

    Args:
        timeout_seconds: Longest wait for a connection, and for the answer.

    Returns:
        Whether it answered (None: no endpoint is set) and what was found.
    """
    endpoint = os.environ.get("S3_ENDPOINT") or os.environ.get("AWS_ENDPOINT_URL")
    if not endpoint:
        return None, "no endpoint set"
    import urllib3
    from minio import Minio
    from minio.error import MinioException

    scheme, separator, host = endpoint.partition("://")
    authorities = os.environ.get("SSL_CERT_FILE") or os.environ.get("AWS_CA_BUNDLE")
    pool = urllib3.PoolManager(timeout=timeout_seconds, retries=False, ca_certs=authorities)
    try:
        client = Minio(
            (host if separator else scheme).rstrip("/"),
            access_key=os.environ.get("AWS_ACCESS_KEY_ID"),
            secret_key=os.environ.get("AWS_SECRET_ACCESS_KEY"),
            session_token=os.environ.get("AWS_SESSION_TOKEN"),
            secure=not separator or scheme == "https",
            region=os.environ.get("AWS_REGION", "us-east-1"),
            http_client=pool,
        )
        return True, f"{endpoint}, {len(client.list_buckets())} buckets"
    except (MinioException, urllib3.exceptions.HTTPError, ValueError) as error:
        return False, f"{endpoint}: {error}"


def cluster_state(*, timeout_seconds: float) -> tuple[bool | None, str]:
    """Ask the API server of the kubeconfig, or of the pod's own cluster, for its version.

    Args:
        timeout_seconds: Longest wait for a connection, and for the answer.

    Returns:
        Whether it answered (None: no cluster is configured) and what was found.
    """
    named = os.environ.get("KUBECONFIG")
    default = Path.home() / ".kube" / "config"
    if not named and not default.exists() and not _SERVICE_ACCOUNT.exists():
        return None, f"no KUBECONFIG, no {default}, not in a pod"
    if importlib.util.find_spec("kubernetes") is None:
        return False, "Python package kubernetes is not installed"
    import urllib3
    from kubernetes import client, config

    configuration = client.Configuration()
    try:
        if named or default.exists():
            config.load_kube_config(client_configuration=configuration)
        else:
            config.load_incluster_config(client_configuration=configuration)
        configuration.retries = False
        with client.ApiClient(configuration) as api:
            version = client.VersionApi(api).get_code(
                # A plain float is ignored there, and the wait has no end.
                _request_timeout=(timeout_seconds, timeout_seconds)
            )
    except (
        config.ConfigException,
        client.ApiException,
        urllib3.exceptions.HTTPError,
        OSError,
    ) as error:
        return False, f"{configuration.host}: {error}"
    return True, f"Kubernetes {version.git_version} at {configuration.host}"
