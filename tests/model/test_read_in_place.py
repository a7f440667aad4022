"""Values read straight into tensors: the same as the library reads, in pieces of any size, or a sentence."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from ptst.errors import UserError
from ptst.model import read_in_place
from ptst.model.decoder import Decoder
from ptst.model.read_in_place import Reader, StoredTensor
from ptst.model.weights import load_decoder
from tests.tiny import write_tiny_model

TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def few_bytes(monkeypatch):
    """Pieces of 40 bytes, of which the system reads 7 at a time."""
    whole = os.preadv
    monkeypatch.setattr(read_in_place, "PIECE", 40)
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: whole(fd, [buffers[0][:7]], offset))


@pytest.mark.parametrize("stored", TYPES)
def test_values_are_the_librarys(tmp_path, few_bytes, stored):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.randn(9, 7).to(stored), "b": torch.randn(3).to(stored), "none": torch.zeros(0, 3)}, path)
    described = {name: StoredTensor(name, path, t.shape, t.dtype) for name, t in load_file(path).items()}
    with Reader() as reader:
        assert reader.in_file_order({name: described[name] for name in "ba"}) == ["a", "b"]
        found = {}
        for dtype in TYPES:
            for name, each in described.items():
                found[name, dtype] = torch.full(each.shape, torch.nan, dtype=dtype)
                reader.read(each, found[name, dtype])
        rows = torch.full((4, 7), torch.nan, dtype=torch.float64)
        reader.read(described["a"], rows, row=3, via=torch.bfloat16)
    for (name, dtype), tensor in found.items():
        assert torch.equal(tensor, load_file(path)[name].to(dtype)), (name, dtype)
    assert torch.equal(rows, load_file(path)["a"][3:7].bfloat16().double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_that_changes_while_it_is_read(tmp_path, monkeypatch, dtype):
    """It was whole when it was checked."""
    folder, order = write_tiny_model(tmp_path), Reader.in_file_order
    path = folder / "model.safetensors"
    content = path.read_bytes()

    def load(change) -> Decoder:
        def changed(self, stored):
            change()
            return order(self, stored)

        monkeypatch.setattr(Reader, "in_file_order", changed)
        return load_decoder(folder, dtype)

    with pytest.raises(UserError, match=r"model\.safetensors: truncated or damaged; fetch the file again"):
        load(lambda: os.truncate(path, len(content) - 1))
    path.write_bytes(content)
    for damaged in (b"", content[:5], content[:20], b"\xff" * 8 + content[8:], content[:8] + b"[]" + content[10:]):
        with pytest.raises(UserError, match="truncated or damaged"):
            load(lambda damaged=damaged: path.write_bytes(damaged))
        path.write_bytes(content)
    with pytest.raises(UserError, match="truncated or damaged"):
        load(lambda: save_file({"other": torch.zeros(1)}, path))
    path.write_bytes(content)
    with pytest.raises(UserError, match="does not exist"):
        load(path.unlink)
