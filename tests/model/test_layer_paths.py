"""A layer's mathematics is written down in several places (ptst/model/decoder.py lists them): the same weights through
each of them, by name and with every family's switches, against the definition in float64."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from ptst.generation.forward import Forward
from ptst.generation.kv_cache import KVCache, blocks_for
from ptst.generation.paged_attention import StepAttention
from ptst.kernels.cpu import use_numba
from ptst.model import decoder as decoder_file
from ptst.model.decoder import Decoder
from tests.conftest import ROOT
from tests.model.test_fused import BOUNDS, SWITCHES, TOKENS, definition, model

# (path, where its mathematics is) as the docstring lists them.
LISTED = dict(re.findall(r"^- `([\w.]+)` (.*?):", decoder_file.__doc__ or "", re.M | re.S))


def plain(decoder: Decoder) -> torch.Tensor:
    with torch.no_grad():
        return decoder.documents(TOKENS, BOUNDS)


def training(decoder: Decoder) -> torch.Tensor:
    return decoder.documents(TOKENS, BOUNDS).detach()


def sampling(decoder: Decoder) -> torch.Tensor:
    """Every document as a request: all its tokens but the last as a prompt, the last in a step of decoding."""
    config, outs = decoder.config, []
    forward = Forward(decoder)
    for a, b in pairwise(BOUNDS):
        cache = KVCache(config, blocks_for(b - a), forward.dtype, forward.device)
        table = cache.allocate(b - a)
        assert table is not None
        cache.extend(table, b - a)
        last = b - a - 1
        steps = [((), [(table, 0, last)], range(last))] if last else []
        for decode, prefill, positions in (*steps, ([(table, b - a)], (), range(last, b - a))):
            attend = StepAttention(cache, decode, prefill, config)
            with torch.inference_mode():
                position_ids = torch.tensor(list(positions))
                outs.append(forward(TOKENS[a + position_ids], position_ids, attend))
    return torch.cat(outs)


def on_a_cpu(decoder: Decoder) -> torch.Tensor:
    return sampling(decoder.float())


# By the names of the docstring: how to take the path, and the error that its dtype allows.
PATHS: dict[str, tuple[Callable[[Decoder], torch.Tensor], float]] = {
    "Layer.forward": (plain, 1e-12),
    "Layer._lora_forward": (training, 1e-12),
    "Forward": (sampling, 1e-12),
    "Forward._with_numba": (on_a_cpu, 1e-5),
}


def test_the_list_is_complete_and_names_what_exists():
    assert set(LISTED) == set(PATHS)
    for name, where in LISTED.items():
        files = re.findall(r"[\w/]+\.py", where)
        assert files and all((ROOT / f).exists() for f in files), (name, files)


@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize("name", PATHS)
def test_each_path_computes_the_layer(name, switches, monkeypatch):
    if name == "Forward._with_numba" and not use_numba(torch.empty(0)):
        pytest.skip("Numba is not installed")
    function, tolerance = PATHS[name]
    owner_name, _, method = name.partition(".")
    owner = getattr(
        decoder_file if owner_name == "Layer" else importlib.import_module("ptst.generation.forward"), owner_name
    )
    method = method or "__call__"
    calls, original = [], getattr(owner, method)
    monkeypatch.setattr(owner, method, lambda *given, **named: calls.append(name) or original(*given, **named))
    others = [] if name != "Layer.forward" else ["_lora_forward"]
    for other in others:  # the plain path must not be the one of training
        monkeypatch.setattr(owner, other, None)
    decoder, _ = model(switches=switches)
    with torch.no_grad():
        wanted = definition(decoder)
    ours = function(decoder)
    assert calls, f"{name} was not taken"
    assert (ours - wanted).norm() <= tolerance * wanted.norm()
