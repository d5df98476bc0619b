"""What a pointer says of where its output came from."""

from m1.config.loading import load_recipe
from m1.stage_records import origin


def test_the_container_image_is_named_in_a_cluster_only(monkeypatch, pytestconfig):
    recipe = load_recipe(
        [pytestconfig.rootpath / "tests/recipes/mini.toml"],
        overrides=["image=registry.example/m1@sha256:" + "a" * 64],
    )
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    outside = origin("sft", recipe, {}, {})
    assert outside["container"] == ""
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    inside = origin("sft", recipe, {}, {})
    assert inside.pop("container") == "registry.example/m1@sha256:" + "a" * 64
    assert inside == {key: value for key, value in outside.items() if key != "container"}
