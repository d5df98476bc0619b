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
    if not os.environ.get("S3_ENDPOINT") and not os.environ.get("AWS_ENDPOINT_URL"):
        return None, "no endpoint set"
    import urllib3
    from minio.error import MinioException

    from m1.storage.connection import endpoint, make_client
    from m1.types import M1Error

    try:
        client = make_client(timeout_seconds=timeout_seconds, needs_credentials=False)
        return True, f"{endpoint()}, {len(client.list_buckets())} buckets"
    except M1Error as error:
        return False, str(error)
    except (MinioException, urllib3.exceptions.HTTPError) as error:
        return False, f"{endpoint()}: {error}"


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
