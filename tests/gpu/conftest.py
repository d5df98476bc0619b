import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder needs a GPU; tests marked `multigpu` need two."""
    available = torch.cuda.device_count()
    for item in items:
        if "tests/gpu" not in str(item.path):
            continue
        needed = 2 if item.get_closest_marker("multigpu") else 1
        item.add_marker(pytest.mark.gpu)
        if available < needed:
            reason = f"needs {needed} CUDA device(s), this machine has {available}"
            item.add_marker(pytest.mark.skip(reason=reason))
