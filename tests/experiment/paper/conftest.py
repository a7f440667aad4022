"""Nothing of the machine's caches and keys; and the small random model of the grid's tests."""

import pytest

from tests.experiment.conftest import grid, here

__all__ = ["grid", "here"]


@pytest.fixture(autouse=True)
def nothing_here(tmp_path, monkeypatch):
    """No caches of the hub, no keys, an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    for name in ("OPENAI_API_KEY", "PTST_MODEL_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
