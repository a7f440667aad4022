"""Chat: what is sent is what evaluation sends, turns go on from each other, and a line that is wrong costs nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from threading import Thread

import pytest
import torch

from ptst.chat import messages, obey, reply
from ptst.chat_session import Chat
from ptst.data import sources
from ptst.errors import UserError
from ptst.generation.engine import generate
from ptst.generation.request import Sampling
from ptst.open import open_model
from ptst.progress import printable
from ptst.text.segments import Conversation, Message
from tests.conftest import ROOT
from tests.cpu_time import cpu_seconds
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
        wanted = generate(decoder, [prompt], model.prompt_format.stop_ids, GREEDY)[0].token_ids
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
    schedule, real = chat.engine._scheduler, chat.engine._scheduler.admit

    def interrupted(*_args, **_more):
        raise KeyboardInterrupt

    def admit():
        real()  # the only slot is taken, and nobody will ever give it back
        raise KeyboardInterrupt

    if where == "admission":
        schedule.admit = admit
        reply(chat, "hello")
    elif where == "forward pass":
        chat.engine._runner._compute = interrupted
        reply(chat, "hello")
    else:
        monkeypatch.setattr("builtins.print", interrupted)
        monkeypatch.setattr(chat.engine, "cancel", interrupted)
        reply(chat, "hello")
        monkeypatch.undo()
    assert len(chat.turns) == (2 if where == "after Ctrl-C" else 0)  # without a word of the answer, no turn
    chat.reset()
    again = "".join(chat.answer("hello"))
    assert again == "".join(Chat(model, decoder, GREEDY).answer("hello"))


def test_commands(model, decoder, capsys):
    chat = Chat(model, decoder, GREEDY)
    obey(chat, "/system speak of trees")
    reply(chat, "hello")
    assert capsys.readouterr().out.strip() == printable(chat.turns[1].content).strip()
    assert chat.sent[1].system == "speak of trees"
    with pytest.raises(UserError, match="did you mean chat:vanilla"):
        obey(chat, "/template chat:vanila")
    with pytest.raises(UserError, match="did you mean /reset"):
        obey(chat, "/rest")
    assert len(chat.turns) == 2
    obey(chat, "/reset")
    obey(chat, "/system")
    assert (chat.turns, chat.system) == ([], None)
    assert obey(chat, "/help")
    assert not obey(chat, "/quit")


def test_an_answer_does_not_command_the_terminal(model, decoder, capsys, monkeypatch):
    chat = Chat(model, decoder, GREEDY)
    monkeypatch.setattr(chat, "answer", lambda _text: (piece for piece in ("a\n\x1b]0;title\x07", "\x9b2J b")))
    reply(chat, "hello")
    assert capsys.readouterr().out == "a\nU+001B]0;titleU+0007U+009B2J b\n"


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


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_in_the_middle_keeps_what_was_answered(model, decoder, monkeypatch, presses):
    chat = Chat(model, decoder, Sampling(40))
    whole = "".join(chat.answer("hello"))
    chat.reset()
    printed = []

    def interrupted(piece="", **_more):
        printed.append(piece)
        if len("".join(printed)) > 3 and "\n" not in piece:
            for _ in range(presses):
                signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr("builtins.print", interrupted)
        reply(chat, "hello")
    assert chat.turns[-1].content == "".join(printed) != whole
    assert whole.startswith(chat.turns[-1].content)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert "".join(chat.answer("again"))


def test_save_appends_a_row_that_serves_as_data(model, decoder, tmp_path):
    chat, file = Chat(model, decoder, GREEDY), tmp_path / "chat.jsonl"
    with pytest.raises(UserError, match="no answer yet"):
        obey(chat, f"/save {file}")
    obey(chat, "/system speak of trees")
    list(chat.answer("hello"))
    obey(chat, f"/save {file}")
    obey(chat, "/reset")
    list(chat.answer("again"))
    obey(chat, "/template chat:vanilla")  # comes after the answer
    obey(chat, f"/save {file}")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [m["content"] for m in rows[0]["messages"]][:2] == ["speak of trees", "hello"]
    assert rows[1]["settings"]["template"] == "chat:llama"
    assert (rows[1]["settings"]["model"], rows[1]["settings"]["max_new_tokens"]) == (model.name, 12)
    conversations = sources.load(str(file), "train").conversations
    assert [c.messages for c in conversations][1] == tuple(chat.conversation("x").messages[:-1])
    with pytest.raises(UserError, match="cannot be written"):
        obey(chat, "/save /no/such/folder/chat.jsonl")
    with pytest.raises(UserError, match=r"/save FILE"):
        obey(chat, "/save")


def typed(*keys: str) -> list[str]:
    """The messages that a terminal gives after these keys."""
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()) as session:

        def press() -> None:
            for key in keys:  # one after the other: history is there a moment after the prompt is
                while not (session.app and session.app.is_running and not session.app.is_done):
                    time.sleep(0.01)
                time.sleep(0.3)
                pipe.send_text(key)

        Thread(target=press, daemon=True).start()
        return list(messages(terminal=True))


CTRL_C, CTRL_D, UP, LEFT = "\x03", "\x04", "\x1b[A", "\x1b[D"


def test_pasted_lines_are_one_message():
    assert typed("\x1b[200~first\r\nsecond\nthird\x1b[201~", "\r", CTRL_D) == ["first\nsecond\nthird"]


def test_a_line_can_be_edited_and_recalled():
    assert typed("helo", LEFT, "l", "\r", UP, "\r", CTRL_D) == ["hello", "hello"]


def test_ctrl_c_drops_the_line_and_not_the_chat(capsys):
    assert typed("wrong", CTRL_C, "right\r", CTRL_D) == ["right"]
    assert "Ctrl-D ends the chat" in capsys.readouterr().err


COMMAND = [sys.executable, "-m", "ptst.chat", "--model", "model"]
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "COLUMNS": "200", "OMP_NUM_THREADS": "1"}


def test_the_command(tmp_path):
    (tmp_path / "model").mkdir()
    write_tiny_model(tmp_path / "model")
    line = [*COMMAND, "--max-new-tokens", "5"]
    run = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 120, "env": ENVIRONMENT}
    lines = "hello\n/wrong\n/show\nagain\n/save chat.jsonl\n/quit\nnever\n"
    done = subprocess.run(line, input=lines, **run)
    assert done.returncode == 0, done.stderr
    assert "chat format chatml, family plain" in done.stderr
    assert "unknown command '/wrong'" in done.stderr
    assert "<|im_start|>" in done.stderr
    assert "Traceback" not in done.stderr
    saved = json.loads((tmp_path / "chat.jsonl").read_text())["messages"]
    assert [m["content"] for m in saved[::2]] == ["hello", "again"]
    assert done.stdout.strip() == "\n".join(m["content"] for m in saved[1::2]).strip()
    done = subprocess.run([*line, "--top-p", "0"], input="", **run)
    assert done.returncode == 2
    assert "--top-p is 0" in done.stderr


def test_ctrl_c_stops_the_answer_of_the_command(tmp_path):
    """A real signal while a long prompt is being read; the next line is answered."""
    (tmp_path / "model").mkdir()
    write_tiny_model(tmp_path / "model", max_position_embeddings=200_000)
    line = [*COMMAND, "--max-new-tokens", "5"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(line, cwd=tmp_path, env=ENVIRONMENT, **pipes) as chat:
        assert "loading" in chat.stderr.readline()
        assert "/help lists" in chat.stderr.readline()
        before = cpu_seconds(chat.pid)
        chat.stdin.write("x" * 100_000 + "\n")
        chat.stdin.flush()
        while cpu_seconds(chat.pid) < before + 1:  # the prompt is being read
            time.sleep(0.05)
        chat.send_signal(signal.SIGINT)
        out, told = chat.communicate("hello\n", timeout=120)
    assert chat.returncode == 0, told
    assert "stopping ..." in told
    assert "Traceback" not in told
    assert out.strip()
