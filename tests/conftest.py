"""Shared fixtures: where optional assets lie, and small tokenizers and models made on the spot."""

from __future__ import annotations

import gc
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# One thread for each test and what it starts, and no measuring of how many are fastest.
os.environ["OMP_NUM_THREADS"] = "1"
# Without a GPU, Triton's kernels run in its interpreter; that is decided when Triton is first imported, as ptst does.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from ptst.evaluation.sentence_encoder import ENCODER_NAME
from ptst.hub.wheel import model_folder
from ptst.progress import ProgressLine
from ptst.settings import EMBEDDED_MODEL

# The same cases in every run, so that a failure is due to the change at hand; with PTST_FUZZ_EXAMPLES, new ones.
settings.register_profile("same cases", derandomize=not os.environ.get("PTST_FUZZ_EXAMPLES"), database=None)
settings.load_profile("same cases")

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
EMBEDDED = model_folder(EMBEDDED_MODEL, ROOT / "checkpoints")
REAL_ENCODER = model_folder(ENCODER_NAME, ROOT / "checkpoints")


def pytest_collection_finish():
    """What is imported by now stays. Frozen, it is not looked through in every full collection: those that a grid asks
    for between two models took a third of the time of its tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors: a second thread only adds noise and time."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_outer_progress(monkeypatch):
    """A progress line that an earlier test left open, as a command that is broken off does, is around none of these."""
    monkeypatch.setattr(ProgressLine, "_outer", None)


@pytest.fixture(autouse=True)
def _signal_handlers():
    """A command that runs in the tests' process leaves its handler of Ctrl-C, which later tests must not meet."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    if threading.current_thread() is threading.main_thread():
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def _home(tmp_path_factory):
    """Tests, and the commands that they start, judge with a small random encoder: no download, no user's cache."""
    from tests.tiny import write_home

    model = EMBEDDED if (EMBEDDED / "model.safetensors").exists() else None
    os.environ["PTST_HOME"] = str(write_home(tmp_path_factory.mktemp("home"), model))


@pytest.fixture(scope="session")
def real_encoder() -> Path:
    if not (REAL_ENCODER / "model.safetensors").exists():
        pytest.skip("needs the sentence encoder (python -m ptst.eval fetches it)")
    return REAL_ENCODER


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("needs the folder ../shared with real data and recorded figures")
    return SHARED


@pytest.fixture(scope="session")
def embedded() -> Path:
    if not (EMBEDDED / "model.safetensors").exists():
        pytest.skip("needs the default model (python -m ptst.train makes it)")
    return EMBEDDED


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A random two-layer chat model with a byte-level ChatML tokenizer: a whole Hugging Face folder."""
    from tests.tiny import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


def mistral_tokenizer_file(version: str) -> Path:
    """Mistral's tokenizer.model of a version (v1, v2, v3) in the package mistral-common, which is not imported."""
    from importlib.util import find_spec

    spec = find_spec("mistral_common")
    if spec is None:
        pytest.skip("needs the package mistral-common (pip install mistral-common)")
    folder = Path(spec.submodule_search_locations[0]) / "data"
    return next(p for p in folder.glob(f"*.model.{version}"))


def mistral_tokenizer(version: str):
    """Mistral's tokenizer of a version, read."""
    from ptst.text.tokenizer import SentencePieceTokenizer

    return SentencePieceTokenizer(mistral_tokenizer_file(version))
