"""Registered models in MLflow: versions and their aliases."""

from collections.abc import Mapping
from typing import Any

from m1.tracking.store import (
    PENDING,
    StoreAway,
    has_model,
    is_away,
    open_client,
    without_secret,
)
from m1.types import M1Error


def register_model(
    *,
    uri: str,
    model_name: str,
    source_uri: str,
    alias: str,
    model_id: str | None = None,
    run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> str:
    """Register a model version and point the alias at it.

    Args:
        uri: MLflow tracking URI.
        model_name: Registered model, created where absent.
        source_uri: Where the export lies; kept in the tag source_uri too.
        alias: Alias for the version. MLflow reserves `latest` for the newest one: nothing is set.
        model_id: Logged model it is, if the store has it; kept as a tag. A server refuses local
            paths as sources; then `models:/<model_id>` is the source.
        run_id: Run that registers; absent: the one that made the model.
        tags: Tags of the version; with `stage_hash` a second call finds the first one's version.

    Returns:
        The version.
    """
    try:
        return _register(
            uri=uri,
            model_name=model_name,
            source_uri=source_uri,
            alias=alias,
            model_id=model_id,
            run_id=run_id,
            tags=tags,
        )
    except Exception as error:
        if not is_away(error, uri) or isinstance(error, M1Error):
            raise
        raise StoreAway(
            f"MLflow at {without_secret(uri)} went away while {model_name} was registered "
            f"({error}); a registration cannot wait, so run the same command when it is back"
        ) from error


def _register(
    *,
    uri: str,
    model_name: str,
    source_uri: str,
    alias: str,
    model_id: str | None,
    run_id: str | None,
    tags: Mapping[str, str] | None,
) -> str:
    from mlflow.exceptions import MlflowException

    client = open_client(uri)
    run_id = run_id or None
    if model_id is not None and model_id.startswith(PENDING):
        model_id = None
    all_tags = {**(tags or {}), "source_uri": source_uri}
    try:
        client.create_registered_model(model_name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    version = _registered_version(client, model_name, all_tags.get("stage_hash"))
    if version is None:
        if model_id is not None and not has_model(client, model_id):
            model_id = None
        if run_id is None and model_id is not None:
            # Left to MLflow, the model is looked up in the process's default store.
            run_id = client.get_logged_model(model_id).source_run_id
        is_local = "://" not in source_uri or source_uri.startswith("file://")
        is_refused = is_local and model_id is not None and uri.startswith("http")
        source = f"models:/{model_id}" if is_refused else source_uri
        if model_id is not None:  # MLflow's SQL registry does not keep the argument of that name
            all_tags["model_id"] = model_id
        created = client.create_model_version(
            model_name,
            source,
            run_id=run_id,
            tags=all_tags,
            model_id=model_id,
            await_creation_for=0,
        )
        version = str(created.version)
    if alias.lower() != "latest":
        _set_alias(client, model_name, alias, version)
    return version


def _set_alias(client: Any, model_name: str, alias: str, version: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.set_registered_model_alias(model_name, alias, version)
    except MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        raise M1Error(
            f"register.alias is {alias!r}, which MLflow does not take ({error.message}); choose "
            "another name, such as champion."
        ) from error


def _registered_version(client: Any, model_name: str, stage_hash: str | None) -> str | None:
    if stage_hash is None:
        return None
    for version in client.search_model_versions(f"name = '{model_name}'"):
        if version.tags.get("stage_hash") == stage_hash:
            return str(version.version)
    return None
