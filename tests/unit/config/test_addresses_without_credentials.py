"""Recipes end up in lineage, logs and compiled pipelines, so no address in one holds a password."""

from pathlib import Path

import pytest

from m1.config.loading import RecipeError, load_recipe
from m1.storage import open_storage
from m1.types import M1Error

MINI = Path(__file__).parents[2] / "recipes" / "mini.toml"


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("storage.root=s3://key:topsecret@bucket/runs", "AWS_SECRET_ACCESS_KEY"),
        ("tracking.uri=http://someone:topsecret@host:5000", "MLFLOW_TRACKING_PASSWORD"),
        ("tracking.uri=postgresql://someone:topsecret@host/db", "MLFLOW_TRACKING_PASSWORD"),
    ],
)
def test_an_address_with_a_password_is_refused_without_repeating_it(override, remedy):
    with pytest.raises(RecipeError, match=remedy) as refused:
        load_recipe([MINI], overrides=[override])
    assert "topsecret" not in str(refused.value)


def test_an_address_with_an_at_sign_in_its_path_is_fine():
    recipe = load_recipe([MINI], overrides=["storage.root=s3://bucket/me@home"])
    assert recipe.storage.root == "s3://bucket/me@home"


def test_a_storage_or_an_endpoint_with_a_password_is_refused_too(monkeypatch):
    with pytest.raises(M1Error, match="AWS_SECRET_ACCESS_KEY_FILE") as refused:
        open_storage("s3://key:topsecret@bucket/runs")
    assert "topsecret" not in str(refused.value)
    monkeypatch.setenv("S3_ENDPOINT", "http://key:topsecret@host:9000")
    with pytest.raises(M1Error, match="holds credentials") as refused:
        open_storage("s3://bucket/runs")
    assert "topsecret" not in str(refused.value)
