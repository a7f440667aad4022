"""Exported folders in transformers and peft: the same logits, ids and answers as here."""

from __future__ import annotations

import json
from dataclasses import replace

import gguf
import pytest
import torch
from jinja2 import TemplateError

import ptst
from ptst.errors import UserError
from ptst.exporting.config import ExportConfig
from ptst.exporting.export import export_model
from ptst.open import open_model
from ptst.text.bake import bake_chat_template
from ptst.text.chat_template import read_chat_template
from ptst.text.prompt_format import open_prompt_format
from ptst.text.segments import Conversation, Message
from ptst.text.templates import TEMPLATES, find_template
from ptst.training.config import TrainConfig
from ptst.training.fine_tune import fine_tune
from tests.interop.peers import LIMIT, distance, open_peer, our_logits, peer_logits
from tests.text import folders
from tests.tiny import CHAT_TEMPLATE, FAMILIES, write_tiny_model

transformers = pytest.importorskip("transformers", reason="needs the package transformers ('ptst-lab[interop]')")

MODELS: dict[str, dict] = {
    "llama": {"model_type": "llama"},
    "llama-untied": {"model_type": "llama", "tie_word_embeddings": False},
    "qwen2": {"model_type": "qwen2", **FAMILIES["qwen2"]},
}
QUESTIONS = ["hello", "What is 2 + 2?", "the the the", "several\nlines of it", "a longer question, with several words"]
NEW, CLOSE = 24, 1e-3


@pytest.fixture(scope="module", params=MODELS)
def here(request, tmp_path_factory):
    """A model, a run of it, and exports of the run under a template."""
    here = tmp_path_factory.mktemp(request.param)
    (here / "model").mkdir()
    model = write_tiny_model(here / "model", pad_token_id=0, bos_token_id=1, eos_token_id=2, **MODELS[request.param])
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "PreTrainedTokenizerFast"}))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))  # and not <|im_end|>
    config = TrainConfig(model=str(model), data="word-problems:6", examples_per_step=6, max_steps=4, epochs=4.0)
    fine_tune(replace(config, rank=4, lr=1e-2, warmup=0, dtype="float32", out=here / "run"))
    given = {"checkpoint": here / "run", "base_name": "org/base@v2"}
    export_model(ExportConfig(**given, dtype="float32", template="chat:llama", out=here / "float32"))
    export_model(ExportConfig(**given, dtype="bfloat16", out=here / "bfloat16"))
    export_model(ExportConfig(**given, dtype="float32", max_shard_size="20KB", out=here / "sharded"))
    export_model(ExportConfig(**given, adapter_only=True, out=here / "adapter"))
    return here


def test_logits(here):
    """In float32 those of the run; in bfloat16 those of the rounded weights, which are near them."""
    wanted = our_logits(here / "model", here / "run")
    assert distance(our_logits(here / "model"), wanted) > 1e-2
    for name in ("float32", "sharded"):
        assert distance(peer_logits(open_peer(here / name)), wanted) <= LIMIT
    assert len(list((here / "sharded").glob("model-*.safetensors"))) > 2
    half = transformers.AutoModelForCausalLM.from_pretrained(here / "bfloat16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}  # nobody has to say so
    rounded = peer_logits(open_peer(here / "bfloat16"))
    assert distance(rounded, our_logits(here / "bfloat16")) <= LIMIT
    assert 1e-6 < distance(rounded, wanted) < 2**-6
    assert distance(peer_logits(half.eval()), wanted) < 2**-5


def test_an_exported_adapter(here):
    from peft import PeftConfig

    named = PeftConfig.from_pretrained(here / "adapter")
    assert (named.base_model_name_or_path, named.revision) == ("org/base", "v2")
    wanted = our_logits(here / "model", here / "run")
    assert distance(peer_logits(open_peer(here / "model", here / "adapter")), wanted) <= LIMIT
    assert distance(our_logits(here / "model", here / "adapter"), wanted) <= LIMIT
    assert read_chat_template(here / "adapter") == read_chat_template(here / "model")


def test_one_chat_template_for_all_who_look(here):
    """llama.cpp's converter looks into tokenizer_config.json first, transformers into chat_template.jinja."""
    baked = (here / "float32/chat_template.jinja").read_text()
    assert baked != CHAT_TEMPLATE == read_chat_template(here / "model")
    assert gguf.SpecialVocab(here / "float32").chat_template == baked
    assert transformers.AutoTokenizer.from_pretrained(here / "float32").chat_template == baked
    assert gguf.SpecialVocab(here / "bfloat16").chat_template == CHAT_TEMPLATE  # exported without a template


def test_ids_and_answers(here):
    """apply_chat_template gives our ids, and generate, with nothing said about when to stop, our answers."""
    run = open_model(checkpoint=here / "run", template="chat:llama")
    answers = ptst.generate(run, QUESTIONS, ptst.Sampling(NEW))
    tokenizer = transformers.AutoTokenizer.from_pretrained(here / "float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(here / "float32")
    assert {*model.generation_config.eos_token_id} == run.prompt_format.stop_ids
    for question, answer in zip(QUESTIONS, answers, strict=True):
        asked = Conversation((Message("user", question),), "a test")
        options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}], **options)
        ids = run.prompt_format.encode(asked).ids
        assert prompt["input_ids"][0].tolist() == ids
        options = {"do_sample": False, "max_new_tokens": NEW, "output_logits": True, "return_dict_in_generate": True}
        with torch.no_grad():
            done = model.generate(**prompt, **options)
        theirs = done.sequences[0, len(ids) :].tolist()
        ours = answer.token_ids + theirs[-1:] * (answer.finish_reason == "stop")  # which has no stop token
        gaps = [float(step[0].topk(2).values.diff().abs()) for step in done.logits]
        differs = [i for i in range(max(len(ours), len(theirs))) if ours[i : i + 1] != theirs[i : i + 1]]
        assert not differs or gaps[differs[0]] < CLOSE, (question, differs)
        if not differs:
            assert tokenizer.decode(theirs, skip_special_tokens=True) == answer.text


TURNS = [
    [("user", "What is 2 + 2?")],
    [("user", "the\n\nthe: a"), ("assistant", "yes: 4"), ("user", "And 3 + 3?")],
    [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four"), ("user", "Say {x} and {{ y }}.")],
]
SYSTEMS = [[("system", "Be kind.")], []]


@pytest.mark.parametrize("name", folders.SPELLED)
def test_baked_templates_of_every_format(tmp_path, name):
    """Every template in every chat format that is written by hand: the ids of apply_chat_template are ours."""
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    folder = folders.write_folder(tmp_path, folders.SPELLED[name], folders.CONTROL.get(name, ()), **settings)
    own = open_prompt_format(folder, find_template("chat:plain"), "gsm8k")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    compared = 0
    for template in TEMPLATES.values():
        p = replace(own, template=template)
        tokenizer.chat_template = bake_chat_template(p)
        for turns in (system + turns for turns in TURNS for system in SYSTEMS):
            conversation = Conversation(tuple(Message(*turn) for turn in turns), "a test")
            try:
                ours = p.encode(conversation).ids
            except UserError:  # a template that takes no system prompt, or no second turn
                with pytest.raises(TemplateError):
                    render(tokenizer, turns)
                continue
            assert render(tokenizer, turns) == ours, (template.name, turns)
            compared += 1
    assert compared > len(TEMPLATES)


def render(tokenizer, turns: list[tuple[str, str]]) -> list[int]:
    messages = [{"role": role, "content": content} for role, content in turns]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize("name", folders.SPELLED)
def test_trained_tokens_of_a_baked_template(tmp_path, name):
    """With marks around what is trained, which transformers and TRL read: the tokens in their loss are in ours."""
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    folder = folders.write_folder(tmp_path, folders.SPELLED[name], folders.CONTROL.get(name, ()), **settings)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    train_on = "last" if name == "mistral-v3" else "all"  # where the system prompt moves with the last question
    for template in ("chat:vanilla", "chat:llama"):
        p = open_prompt_format(folder, find_template(template), "gsm8k")
        tokenizer.chat_template = bake_chat_template(p, generation=True)
        for turns in ([*turns, ("assistant", "It is 4.")] for turns in TURNS):
            example = p.encode(Conversation(tuple(Message(*turn) for turn in turns), "a test"), train_on)
            messages = [{"role": role, "content": content} for role, content in turns]
            theirs = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
            assert theirs["input_ids"] == example.ids
            assert theirs["assistant_masks"] == [int(trained) for trained in example.loss_mask], (template, turns)
            assert 0 < sum(example.loss_mask) < len(example.ids)
