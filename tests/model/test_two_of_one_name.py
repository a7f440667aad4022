"""Of two tensors of one name in a safetensors file, the library takes the last, and other readers the first."""

from __future__ import annotations

import json

import pytest
import torch

from ptst.audit.batches.files import read_batches
from ptst.errors import UserError
from ptst.evaluation.sentence_encoder import SentenceEncoder
from ptst.exporting.parcel import _Check
from ptst.hub.push import Upload
from ptst.model.read_in_place import TensorFile
from ptst.model.sharded_weights import read_parts
from ptst.model.weights import load_decoder, read_safetensors
from tests.tiny import write_encoder, write_tiny_model


def name_twice(path, first: str, other: str) -> None:
    """Describe a tensor twice; first with the place, type and shape of another one."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    described = json.loads(content[8 : 8 + length])
    text = json.dumps(described)
    header = f'{{"{first}": {json.dumps(described[other])}, {text[1:]}'.encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])


def test_weights(tmp_path):
    folder, name = write_tiny_model(tmp_path), "model.layers.0.mlp.up_proj.weight"
    path = folder / "model.safetensors"
    name_twice(path, name, name)  # one tensor, described twice
    load_decoder(folder)
    name_twice(path, name, "model.layers.1.mlp.up_proj.weight")
    upload = Upload(path.name, path)
    for read in (
        lambda: load_decoder(folder),
        lambda: [*read_safetensors(path, ["model.norm.weight"])],
        lambda: [*read_parts(path, {}, ["model.norm.weight"])],
        lambda: TensorFile(path),
        lambda: _Check([], [])(upload),
        lambda: [*read_batches(path)],
    ):
        with pytest.raises(UserError, match=r"model\.safetensors: two tensors of one name \('model\.layers\.0\.mlp"):
            read()


def test_the_sentence_encoder(tmp_path):
    torch.manual_seed(0)
    folder = write_encoder(tmp_path / "encoder")
    SentenceEncoder(folder)
    name_twice(folder / "model.safetensors", "embeddings.LayerNorm.bias", "embeddings.LayerNorm.weight")
    with pytest.raises(UserError, match="two tensors of one name"):
        SentenceEncoder(folder)
