"""Chat: what is sent is what evaluation sends, turns go on from each other, and a line that is wrong costs nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from ptst.chat import Chat, obey, reply
from ptst.generation.request import Sampling
from ptst.generation.sampler import generate
from ptst.open import open_model
from ptst.text.segments import Conversation, Message
from tests.conftest import ROOT
from tests.tiny import write_tiny_model

GREEDY = Sampling(12)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_tiny_model(tmp_path_factory.mktemp("model"))
    return open_model(str(folder), "chat:llama", family="plain")


@pytest.fixture
def decoder(model):
    return model.load_base(torch.float32, "cpu")


def test_every_turn_is_answered_as_the_sampler_answers_it(model, decoder):
    chat = Chat(model, decoder, GREEDY)
    first = "".join(chat.answer("hello"))
    second = "".join(chat.answer("and then?"))
    asked = [Message("user", "hello")], [
        Message("user", "hello"), Message("assistant", first), Message("user", "and then?")
    ]  # fmt: skip
    for turns, said in zip(asked, (first, second), strict=True):
        prompt = model.prompt_format.encode(Conversation(tuple(turns))).ids
        wanted = generate(decoder, [prompt], model.stop_ids, GREEDY)[0].token_ids
        assert said == model.prompt_format.tokenizer.decode_answer(prompt, wanted)
    assert chat.turns == [*asked[1], Message("assistant", second)]


def test_show_lists_the_tokens_that_were_sent(model, decoder):
    chat = Chat(model, decoder, GREEDY)
    list(chat.answer("hello"))
    obey(chat, "/template chat:vanilla")  # comes too late for what was sent
    sent = model.prompt_format.encode(Conversation((Message("user", "hello"),))).ids
    table = chat.tokens()
    assert [int(cell) for cell in table.columns[1].cells] == sent
    assert {"system", "user", "control", "scaffold"} == set(table.columns[3].cells)
    assert "chat:llama" in table.title


def test_another_template_brings_its_own_stops(model, decoder, monkeypatch):
    chat = Chat(model, decoder, GREEDY)
    stops = property(lambda self: frozenset({5 if self.template.is_text else 6}))
    monkeypatch.setattr("ptst.text.prompt_format.PromptFormat.stop_ids", stops)
    obey(chat, "/template text:vanilla")
    assert chat.engine.stop_ids == {5}
    obey(chat, "/template chat:llama")
    assert chat.engine.stop_ids == {6}


@pytest.mark.parametrize("where", ["admission", "forward pass", "after Ctrl-C"])
def test_an_interrupt_anywhere_leaves_a_chat_that_answers(model, decoder, monkeypatch, where):
    chat = Chat(model, decoder, GREEDY)
    schedule, real = chat.engine._schedule, chat.engine._schedule.admit

    def interrupted(*_args, **_more):
        raise KeyboardInterrupt

    def admit():
        real()  # the only slot is taken, and nobody will ever give it back
        raise KeyboardInterrupt

    if where == "admission":
        schedule.admit = admit
        reply(chat, "hello")
    elif where == "forward pass":
        chat.engine._eager_step = interrupted
        reply(chat, "hello")
    else:
        monkeypatch.setattr("builtins.print", interrupted)
        monkeypatch.setattr(chat.engine, "cancel", interrupted)
        with pytest.raises(KeyboardInterrupt):  # of the last print
            reply(chat, "hello")
        monkeypatch.undo()
    assert [m.role for m in chat.turns] == ["user", "assistant"]
    chat.reset()
    again = "".join(chat.answer("hello"))
    assert again == "".join(Chat(model, decoder, GREEDY).answer("hello"))


def test_commands(model, decoder, capsys):
    chat = Chat(model, decoder, GREEDY)
    obey(chat, "/system speak of trees")
    reply(chat, "hello")
    assert capsys.readouterr().out.strip() == chat.turns[1].content.strip()
    assert chat.sent[1].system == "speak of trees"
    with pytest.raises(ValueError, match="did you mean chat:vanilla"):
        obey(chat, "/template chat:vanila")
    with pytest.raises(ValueError, match="did you mean /reset"):
        obey(chat, "/rest")
    assert len(chat.turns) == 2
    obey(chat, "/reset")
    obey(chat, "/system")
    assert (chat.turns, chat.system) == ([], None)
    assert obey(chat, "/help")
    assert not obey(chat, "/quit")


def test_what_cannot_be_said_leaves_the_conversation_as_it_was(model, decoder):
    chat = Chat(model, decoder, GREEDY)
    obey(chat, "/template text:vanilla")
    list(chat.answer("hello"))
    before = list(chat.turns)
    with pytest.raises(ValueError, match="several turns"):
        list(chat.answer("and then?"))
    with pytest.raises(ValueError, match="/reset"):
        obey(chat, "/template chat:vanilla")
        list(chat.answer("x" * 3000))
    assert chat.turns == before


def test_a_stopped_answer_keeps_its_beginning_and_frees_the_engine(model, decoder):
    chat = Chat(model, decoder, Sampling(40))
    whole = "".join(chat.answer("hello"))
    chat.reset()
    pieces, said = chat.answer("hello"), ""
    while len(said) < 3:
        said += next(pieces)
    pieces.close()
    assert chat.turns[-1].content == said != whole
    assert whole.startswith(said)
    assert not chat.engine.busy
    assert "".join(chat.answer("again"))


def test_the_command(tmp_path):
    (tmp_path / "model").mkdir()
    write_tiny_model(tmp_path / "model")
    line = [sys.executable, "-m", "ptst.chat", "--model", "model", "--max-new-tokens", "5"]
    run = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 120}
    run["env"] = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "COLUMNS": "200"}
    done = subprocess.run(line, input="hello\n/wrong\n/show\nagain\n/quit\nnever\n", **run)
    assert done.returncode == 0, done.stderr
    assert "chat format chatml, family plain" in done.stderr
    assert "there is no /wrong" in done.stderr
    assert "<|im_start|>" in done.stderr
    assert "Traceback" not in done.stderr
    done = subprocess.run([*line, "--top-p", "0"], input="", **run)
    assert done.returncode == 2
    assert "--top-p is 0" in done.stderr
