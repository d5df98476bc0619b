"""The MLflow store behind the lineage: which one, how it is opened, and the words both sides share.

MLflow is imported inside functions: it takes two seconds, and `m1 plan` must not pay for that.
"""

import functools
import logging
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from m1.config.schema import TrackingConfig
from m1.types import M1Error

TAG_PARENT_RUN = "mlflow.parentRunId"
TAG_STAGE = "m1.stage"
TAG_STAGE_HASH = "m1.stage_hash"
TAG_CACHED = "m1.cached"
TAG_ORIGINAL_RUN = "m1.stage_run_id"
TAG_RECIPE_HASH = "m1.recipe_hash"
TAG_RECIPE_NAME = "m1.recipe_name"
TAG_GIT_COMMIT = "m1.git_commit"

PENDING = "pending:"
"""Before the stage hash: a model that the store has not seen."""

_MAX_DIGEST_CHARACTERS = 36
_MAX_PARAMS_PER_BATCH = 100


def tracking_uri(config: TrackingConfig, root: Path) -> str:
    """Where lineage is written.

    Args:
        config: MLFLOW_TRACKING_URI in the environment wins over its `uri`.
        root: Local run root; it holds `mlflow.db` (and `mlartifacts/`) when neither names a store.

    Returns:
        An MLflow tracking URI.
    """
    named = os.environ.get("MLFLOW_TRACKING_URI") or config.uri
    return named or f"sqlite:///{root.resolve()}/mlflow.db"


@functools.cache
def open_client(uri: str) -> Any:
    """An `MlflowClient` of the store at `uri`, quiet and without telemetry.

    Raises:
        StoreAway: If `uri` is a server that does not answer.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    # A server that is down would otherwise hold a stage for minutes of retries.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    require_answer(uri)
    from mlflow import MlflowClient

    for name in ("mlflow.store.db.utils", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if uri.startswith("sqlite:///"):
        _sqlite_folder(uri).mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


class StoreAway(M1Error):
    """The MLflow server does not answer."""


def require_answer(uri: str, *, num_attempts: int = 3, timeout_seconds: float = 5) -> None:
    """Raise `StoreAway` unless `uri` is a file or a server that answers."""
    if not uri.startswith(("http://", "https://")):
        return
    for attempt in range(num_attempts):
        try:
            urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=timeout_seconds).close()
            return
        except urllib.error.HTTPError as error:
            if error.code < 500:
                return  # An answer, if only that of a gateway that has no such page.
            reason: OSError = error
        except OSError as error:
            reason = error
        if attempt + 1 < num_attempts:
            time.sleep(1)
    raise StoreAway(
        f"The MLflow tracking URI is {without_secret(uri)}, but nothing answers there ({reason}); "
        "start the server, or unset MLFLOW_TRACKING_URI and tracking.uri for a local file."
    ) from reason


def is_away(error: BaseException, uri: str) -> bool:
    """Whether an error says that the server at `uri` is out of order, rather than the request."""
    if isinstance(error, StoreAway):
        return True
    if not uri.startswith(("http://", "https://")):
        return False
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return int(error.get_http_status_code()) >= 500
    return isinstance(error, OSError)  # requests' exceptions are


def without_secret(uri: str) -> str:
    """`uri` without a user name and password."""
    return re.sub(r"(://)[^/@]*@", r"\1", uri)


def ensure_experiment(client: Any, experiment: str) -> str:
    """Id of the experiment of that name, which is created where absent."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(experiment)
    if found is None:
        uri = client.tracking_uri
        location = None
        if uri.startswith("sqlite:///"):
            location = (_sqlite_folder(uri) / "mlartifacts").as_uri()
        try:
            return str(client.create_experiment(experiment, artifact_location=location))
        except MlflowException:
            # Another process was faster, unless it is still absent.
            found = client.get_experiment_by_name(experiment)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise M1Error(
            f"MLflow experiment {experiment!r} was deleted; restore it (mlflow experiments restore "
            f"-x {found.experiment_id}) or set tracking.experiment to another name."
        )
    return str(found.experiment_id)


def find_run(client: Any, run_id: str) -> Any | None:
    """The run, or None where the store has no such run or only a deleted one."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
    return run if run.info.lifecycle_stage == "active" else None


def has_model(client: Any, model_id: str) -> bool:
    """Whether the store knows the logged model; after the tracking URI changed, it may not."""
    from mlflow.exceptions import MlflowException

    try:
        client.get_logged_model(model_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    return True


def child_runs(client: Any, parent: Any, stage_hash: str) -> list[Any]:
    """Runs nested under `parent` for that stage hash, newest first."""
    return list(
        client.search_runs(
            [parent.info.experiment_id],
            filter_string=f"tags.`{TAG_PARENT_RUN}` = '{parent.info.run_id}' "
            f"AND tags.`{TAG_STAGE_HASH}` = '{stage_hash}'",
        )
    )


def log_new_params(client: Any, run: Any, params: Mapping[str, Any]) -> None:
    """Log the parameters that the run lacks, as MLflow's cannot change; nested names get dots."""
    from mlflow.entities import Param

    new = [
        Param(metric_key(key), str(value))
        for key, value in _flatten(params)
        if metric_key(key) not in run.data.params
    ]
    for start in range(0, len(new), _MAX_PARAMS_PER_BATCH):
        client.log_batch(run.info.run_id, params=new[start : start + _MAX_PARAMS_PER_BATCH])


def metric_key(name: str) -> str:
    """`name` in the characters MLflow allows: `pass@4` becomes `pass_at_4`."""
    return re.sub(r"[^\w\-. :/]", "_", name.replace("@", "_at_"))


def short_digest(digest: str) -> str:
    """What fits in MLflow's field for dataset digests; the whole one stands in a tag."""
    return digest.removeprefix("sha256:")[:_MAX_DIGEST_CHARACTERS]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _sqlite_folder(uri: str) -> Path:
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]).resolve().parent
