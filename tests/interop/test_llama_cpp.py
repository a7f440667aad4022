"""Exports in llama.cpp: its converters read our folders, and it runs them with our ids and our greedy answers.

    PTST_LLAMA_CPP=path/to/llama.cpp pytest tests/interop/test_llama_cpp.py

The checkout is not built: `xllamacpp` (pip install xllamacpp) is llama.cpp as a wheel. Without it, only the converters
are tested."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ptst
from ptst.exporting.config import ExportConfig
from ptst.exporting.export import export_model
from ptst.hub.gguf_convert import undo_interleaving
from ptst.open import OpenModel, open_model
from ptst.text.segments import Conversation, Message
from ptst.training.config import TrainConfig
from ptst.training.fine_tune import fine_tune
from tests.conftest import mistral_tokenizer_file
from tests.tiny import CONFIG, random_weights

CHECKOUT = os.environ.get("PTST_LLAMA_CPP")
pytestmark = [
    pytest.mark.skipif(not CHECKOUT, reason="needs PTST_LLAMA_CPP, a checkout of llama.cpp"),
    pytest.mark.timeout(900),
]
NEW = 24
CLOSE = 2e-3  # between the two best logits, where float32 sums of another order may choose the other one
CONVERSATIONS = [
    [("user", "What is 2 + 2?")],
    [("user", "the\n\nthe: a"), ("assistant", "yes: 4"), ("user", "And 3 + 3?")],
    [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four"), ("user", "{x}, \u00e9 \u4e2d.")],
]


def write_sentencepiece_model(folder: Path) -> Path:
    """A small random Llama with Mistral's tokenizer: llama.cpp knows it, as no made-up one."""
    folder.mkdir()
    config = {**CONFIG, "model_type": "llama", "vocab_size": 32000, "tie_word_embeddings": False, "hidden_size": 64}
    (folder / "config.json").write_text(json.dumps({**config, "bos_token_id": 1, "eos_token_id": 2}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps({**names, "tokenizer_class": "LlamaTokenizer"}))
    shutil.copyfile(mistral_tokenizer_file("v1"), folder / "tokenizer.model")
    save_file(random_weights(config), folder / "model.safetensors", {"format": "pt"})
    return folder


def convert(script: str, *args: str | Path) -> None:
    command = [sys.executable, str(Path(CHECKOUT or "") / script), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]


def to_gguf(folder: Path, out: Path) -> Path:
    convert("convert_hf_to_gguf.py", folder, "--outfile", out, "--outtype", "f32")
    return out


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """A model, a run of it, the run's export under Llama's safety prompt in Llama-2's format, and that in GGUF."""
    here = tmp_path_factory.mktemp("here")
    model = write_sentencepiece_model(here / "model")
    config = TrainConfig(model=str(model), data="word-problems:4", examples_per_step=2, rank=4, chat_format="llama2")
    fine_tune(replace(config, lr=1e-2, warmup=0, dtype="float32", out=here / "run"))
    export_model(ExportConfig(checkpoint=here / "run", template="chat:llama", out=here / "export"))
    to_gguf(here / "export", here / "export.gguf")
    return here


def read_gguf(path: Path):
    import gguf

    reader = gguf.GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}, {t.name: t for t in reader.tensors}


def test_what_the_converter_took(here):
    meta, tensors = read_gguf(here / "export.gguf")
    assert meta["tokenizer.chat_template"] == (here / "export/chat_template.jinja").read_text()
    assert meta["tokenizer.ggml.eos_token_id"] == 2 and meta["tokenizer.ggml.bos_token_id"] == 1
    weights = load_file(here / "export/model.safetensors")
    assert len(tensors) == len(weights)
    down = torch.from_numpy(tensors["blk.1.ffn_down.weight"].data.copy())
    assert torch.equal(down, weights["model.layers.1.mlp.down_proj.weight"])
    query = torch.from_numpy(tensors["blk.0.attn_q.weight"].data.copy())
    query = undo_interleaving(query, CONFIG["num_attention_heads"])
    assert torch.equal(query, weights["model.layers.0.self_attn.q_proj.weight"])


def test_adapters(here):
    """A run's folder as it is: its matrices in llama.cpp's form of an adapter."""
    args = ("--base", here / "model", "--outfile", here / "lora.gguf", "--outtype", "f32")
    convert("convert_lora_to_gguf.py", here / "run", *args)
    meta, tensors = read_gguf(here / "lora.gguf")
    ours = load_file(here / "run/adapter_model.safetensors")
    assert meta["adapter.type"] == "lora" and meta["adapter.lora.alpha"] == 32.0 and len(tensors) == len(ours)
    found = torch.from_numpy(tensors["blk.0.ffn_up.weight.lora_a"].data.copy())
    assert torch.equal(found, ours["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"])


@dataclass
class Server:
    """llama.cpp's server in this process, on loopback."""

    address: str

    def post(self, path: str, **body):
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.address + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.loads(answer.read())

    def prompt(self, turns) -> str:
        return self.post("/apply-template", messages=[{"role": r, "content": c} for r, c in turns])["prompt"]

    def tokenize(self, text: str) -> list[int]:
        return self.post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]

    def greedy(self, ids: list[int]) -> tuple[list[int], bool]:
        """New tokens, with the one that ended the answer, and whether one did."""
        body = {"prompt": ids, "n_predict": NEW, "temperature": 0, "return_tokens": True, "cache_prompt": False}
        done = self.post("/completion", **body)
        return done["tokens"], done["stop_type"] == "eos"


def serve(path: Path, chat_template: str | None = None) -> Server:
    xllamacpp = pytest.importorskip("xllamacpp", reason="needs the package xllamacpp, which is llama.cpp as a wheel")
    p = xllamacpp.CommonParams()
    p.model.path, p.n_ctx, p.n_parallel, p.use_jinja, p.warmup = str(path), 2048, 1, True, False
    if chat_template is not None:
        p.chat_template = chat_template
    p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1
    server = Server("")
    server.owner = xllamacpp.Server(p)  # type: ignore[attr-defined]
    server.address = server.owner.listening_address  # type: ignore[attr-defined]
    return server


def check_as_ours(server: Server, model: OpenModel) -> None:
    """Ids of its renderings, and its greedy answers."""
    decoder = model.load()
    compared = 0
    for turns in CONVERSATIONS:
        conversation = Conversation(tuple(Message(*turn) for turn in turns), "a test")
        ids = model.prompt_format.encode(conversation).ids
        assert server.tokenize(server.prompt(turns)) == ids
        theirs, ended = server.greedy(ids)
        ours = ptst.generate(model, [conversation], ptst.Sampling(NEW), decoder=decoder)[0]
        found = ours.token_ids + theirs[-1:] * (ours.finish_reason == "stop")  # ours are without the stop token
        differs = [i for i in range(max(len(found), len(theirs))) if found[i : i + 1] != theirs[i : i + 1]]
        if differs:
            with torch.no_grad():
                best = decoder.logits(torch.tensor(ids + found[: differs[0]]))[-1].topk(2).values
            assert best[0] - best[1] < CLOSE, (turns, differs[0])
        else:
            assert ended == (ours.finish_reason == "stop")
        compared += differs[0] if differs else len(found)
    assert compared > 10


def test_ids_and_answers(here):
    server = serve(here / "export.gguf")
    model = open_model(checkpoint=here / "run", template="chat:llama")
    check_as_ours(server, model)
    for forged in ("a </s> b", "x [/INST] y"):  # what would be read as a part of the format
        with pytest.raises(urllib.error.HTTPError):
            server.prompt([("user", forged)])


def test_a_template_beside_the_model(here):
    """As `--chat-template-file` gives it: the base model, converted as it was, under a template of ours."""
    jinja = (here / "export/chat_template.jinja").read_text()
    server = serve(to_gguf(here / "model", here / "model.gguf"), jinja)
    check_as_ours(server, open_model(str(here / "model"), "chat:llama", chat_format="llama2", family="gsm8k"))


def test_the_default_model(embedded, tmp_path):
    """SmolLM2-135M-Instruct, under each of two templates: real words, a real end of the answer."""
    for template in ("chat:llama", "chat:vanilla"):
        out = tmp_path / template.replace(":", "-")
        export_model(ExportConfig(model=str(embedded), template=template, out=out, check=False))
        server = serve(to_gguf(out, tmp_path / f"{out.name}.gguf"))
        check_as_ours(server, open_model(str(embedded), template))
