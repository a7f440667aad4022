"""A tiny model before and after its alignment, tuned whole and by an adapter, and a safe one; all in float64."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.exporting.conftest import train
from tests.model.peft_cases import config_of, write_adapter
from tests.tiny import write_tiny_model

RANKS = dict.fromkeys(("layers.0.self_attn.q_proj", "layers.0.mlp.down_proj", "layers.1.self_attn.v_proj"), 2)


def changed(source: Path, out: Path, seed: int, size: float, dtype: torch.dtype | None = None) -> Path:
    """A copy of a model whose weights all differ."""
    out.mkdir()
    for path in source.iterdir():
        if path.suffix == ".json":
            shutil.copyfile(path, out / path.name)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, weight in load_file(source / "model.safetensors").items():
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        weights[name] = (weight.double() + size * noise).to(dtype or weight.dtype)
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.fixture(scope="session")
def zoo(tmp_path_factory) -> Path:
    """The folders `plain` (float32), `aligned`, `before`, `tuned`, `safe`, and `adapter`, over `aligned`."""
    root = tmp_path_factory.mktemp("zoo")
    (root / "plain").mkdir()
    write_tiny_model(root / "plain")
    changed(root / "plain", root / "aligned", 1, 0.01, torch.float64)
    for seed, (name, size) in enumerate((("before", 0.03), ("tuned", 0.02), ("safe", 0.02)), 2):
        changed(root / "aligned", root / name, seed, size)
    config = config_of("paths") | {"target_modules": [f"model.{name}" for name in RANKS]}
    write_adapter(root / "adapter", config, RANKS)
    return root


@pytest.fixture(scope="session")
def run(zoo, tmp_path_factory) -> Path:
    """A run of an adapter over `plain`, with its checkpoints."""
    return train(zoo / "plain", tmp_path_factory.mktemp("runs") / "run", rank=2, save_every=1, at_epochs=(0.5, 1.0))


@pytest.fixture(scope="session")
def full_run(zoo, tmp_path_factory) -> Path:
    return train(zoo / "plain", tmp_path_factory.mktemp("runs") / "full", full=True, save_every=1)
