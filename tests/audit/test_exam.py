"""The exam: 34 known masking and template bugs of the field. Each is found, or another test shows it cannot be."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file

from ptst.audit.documents import check_documents
from ptst.data.packing import to_batch
from ptst.model.config import LoraConfig
from ptst.model.lora import add_lora
from ptst.model.weights import hf_name, load_decoder
from ptst.text.chat_formats import CHAT_FORMATS
from ptst.text.prompt_format import PromptFormat
from ptst.text.segments import Conversation, Message
from ptst.text.templates import find_family, find_template
from ptst.text.tokenizer import load_tokenizer
from ptst.training.trainer import Trainer, TrainerConfig
from tests.audit import faults
from tests.conftest import ROOT

# What no batch can show, and the test that keeps it right.
ELSEWHERE = {
    27: ("tests/training/test_exactness.py", "test_any_split_gives_the_same_gradient"),
    28: ("tests/training/test_exactness.py", "test_the_divisor_is_the_steps_own"),
    29: ("tests/training/test_parallel.py", "test_any_number_of_ranks_gives_the_same_gradient"),
    30: ("tests/kernels/test_reference.py", "test_linear_cross_entropy"),
    31: ("tests/audit/test_drift.py", "test_a_run_that_would_be_encoded_otherwise"),
    34: ("tests/audit/test_exam.py", "test_training_never_touches_the_base_or_its_size"),
}


@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda f: f"{f.number}-{f.name}")
def test_found(tokenizers, fault):
    bench = faults.bench(*tokenizers, fault.chat_format, fault.template, **fault.asked)
    batch, row, token = fault.plant(bench)
    found = [f for f in check_documents(batch, bench.rows, bench.setup) if f.level == "error"]
    places = {(f.rule, f.row, f.token) for f in found}
    assert (fault.rule, bench.rows[row].source, token) in places, found


@pytest.mark.parametrize("chat_format", ["chatml", "llama2", "mistral-v1"])
def test_no_error_without_a_fault(tokenizers, chat_format):
    bench = faults.bench(*tokenizers, chat_format)
    batch = to_batch([bench.good(row) for row in range(len(bench.rows))])
    assert [f.rule for f in check_documents(batch, bench.rows, bench.setup) if f.level != "info"] == []


def test_all_34_are_accounted_for():
    variants = {n: sum(f.number == n for f in faults.FAULTS) for n in range(1, 35)}
    for number, count in variants.items():
        assert count >= 2 or number in ELSEWHERE, number
    text = (ROOT / "docs" / "audit.md").read_text()
    for number, (path, name) in ELSEWHERE.items():
        assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.MULTILINE), (path, name)
        assert path in re.search(rf"^\| {number} \|.*$", text, re.MULTILINE).group(), number
    listed = [int(n) for n in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)]
    assert listed == list(range(1, 35))
    for f in faults.FAULTS:
        line = re.search(rf"^\| {f.number} \|.*$", text, re.MULTILINE).group()
        assert f"`{f.rule}`" in line, (f.number, f.rule)


def test_training_never_touches_the_base_or_its_size(tiny_folder):
    """No token is added and no table resized: what is not an adapter stays bit for bit what the file holds."""
    files = load_file(tiny_folder / "model.safetensors")
    decoder = load_decoder(tiny_folder, torch.float32)
    parameters = add_lora(decoder, LoraConfig(2, 4.0, ("q_proj",)), 0)
    tokenizer = load_tokenizer(tiny_folder)
    prompt_format = PromptFormat(find_template("vanilla"), find_family("plain"), CHAT_FORMATS["chatml"], tokenizer)
    row = prompt_format.encode(Conversation((Message("user", "one"), Message("assistant", "two"))))
    list(Trainer(decoder, parameters, [row] * 4, TrainerConfig(epochs=2, lr=1e-2, examples_per_step=2)))
    after = {hf_name(k): v for k, v in decoder.state_dict().items()}
    for name, value in files.items():
        assert torch.equal(after[name], value), name
    with pytest.raises(ValueError, match=r"only \d+ embedding rows"):
        load_tokenizer(tiny_folder, embedding_rows=tokenizer.vocab_size - 1)
