"""Damaged and hostile files: every reader gives a value or a UserError or OSError, never another exception or a hang.

A file that the reader accepts is changed: bytes of it, or a value in its JSON.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ptst.config_file import read_config
from ptst.data.arc import load_arc
from ptst.data.columns import ColumnRules
from ptst.data.prompt_files import read_prompts
from ptst.data.sources import load
from ptst.errors import UserError
from ptst.evaluation.answers import AnswerFile, Asked
from ptst.generation.request import Answer, Sampling
from ptst.model.config import DecoderConfig
from ptst.model.decoder import Decoder
from ptst.model.lora import add_lora, load_adapter, read_lora_config, save_adapter
from ptst.model.weights import load_decoder
from ptst.records import TrainRecord, plain, read_record
from ptst.text.chat_template import read_chat_template
from ptst.text.prompt_format import open_prompt_format
from ptst.text.templates import find_template, load_template
from ptst.text.tokenizer import SentencePieceTokenizer
from ptst.training.config import TrainConfig
from tests.test_runs import a_record
from tests.text.made import MARKERS, sentencepiece_model
from tests.tiny import CONFIG, write_tiny_model

SECONDS = 60
# Changes of a file that is read fast: ten CPU minutes in all.
EXAMPLES = int(os.environ.get("PTST_FUZZ_EXAMPLES", "8100"))
TEXTS = ("Hello  world\n\n", "\u00e9\U0001f600<|im_end|>", "a" * 200)
BYTES = (
    *(b"NaN", b"-1", b"0", b"1e999", b"null", b"true", b"[]", b"{}", b'""', b"\xff", b"\x00", b'"', b"\n", b"\r", b","),
    *(b"9" * 5000, b"[" * 5000, b'{"a":' * 5000, b"\\ud800", b"\xef\xbb\xbf", b"=", b"'", b"PK\x03\x04", b"\x1f\x8b"),
)
NESTED: Any = []
for _ in range(300):
    NESTED = [NESTED]
VALUES = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        1.5,
        -0.0,
        10**12,
        10**400,
        float("nan"),
        float("inf"),
        "",
        "x",
        "\ud800",
        "\x1b[",
    ),
    *([], [0], ["x"], [[]], {}, {"x": 1}, {"content": None}, NESTED, "../x", "\0", "a" * 300),
)


class Hang(BaseException):
    """A reader that did not end."""


@contextmanager
def limited() -> Iterator[None]:
    def stop(_number: int, _frame: object) -> None:
        raise Hang(f"no answer within {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """Some bytes changed, removed, repeated or put in between."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 20)))
        new = draw(st.one_of(st.sampled_from(BYTES), st.binary(max_size=4), st.just(bytes(data[start:end]) * 2)))
        data[start:end] = new
    return bytes(data)


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


@st.composite
def other_values(draw: st.DrawFn, whole: bytes) -> bytes:
    """A value or two of a JSON file replaced, or a key removed."""
    value = json.loads(whole)
    for _ in range(draw(st.integers(1, 2))):
        *path, last = draw(st.sampled_from(list(places(value))[1:] or [("x",)]))  # ("x",): all keys are gone
        owner = value
        for key in path:
            owner = owner[key]
        if isinstance(owner, dict) and draw(st.booleans()) and draw(st.booleans()):
            owner.pop(last, None)
        elif isinstance(owner, (dict, list)):
            owner[last] = deepcopy(draw(st.sampled_from(VALUES)))
    return json.dumps(value).encode()


@st.composite
def other_headers(draw: st.DrawFn, whole: bytes) -> bytes:
    """As `other_values`, for the JSON at the beginning of a safetensors file."""
    size = 8 + int.from_bytes(whole[:8], "little")
    head = draw(other_values(whole[8:size]))
    return len(head).to_bytes(8, "little") + head + whole[size:]


@st.composite
def damaged_headers(draw: st.DrawFn, whole: bytes) -> bytes:
    size = 8 + int.from_bytes(whole[:8], "little")
    return draw(damaged(whole[:size])) + whole[size:]


@dataclass(frozen=True)
class Reader:
    """`file`: the one that is changed, `whole` what it holds before. `share`: of the examples; slow readers get few."""

    file: str
    whole: bytes
    read: Callable[[Path], Any]
    is_json: bool = False
    share: float = 1.0


def use_format(folder: Path) -> None:
    found = open_prompt_format(folder, find_template("chat:vanilla"), "plain", None, vocab_size=300)
    for text in TEXTS:
        found.tokenizer.decode(found.tokenizer.encode(text))
    read_chat_template(folder)


def use_adapter(folder: Path) -> None:
    load_adapter(Decoder(DecoderConfig.from_dict(CONFIG)), folder)


def use_pieces(path: Path) -> None:
    tokenizer = SentencePieceTokenizer(path)
    for text in TEXTS:
        tokenizer.decode(tokenizer.encode(text))


ROLES = b'{"pad_token": {"content": "<a>"}, "additional_special_tokens": ["<b>"]}'
ROWS = [{"question": "q", "answer": "a"}, {"messages": [{"role": "user", "content": "u"}], "system": "s"}]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
PROMPTS = [{"id": 1, "prompt": "How?", "goal": "g", "category": "c"}, {"prompt": "Why?", "family": "f"}]
FLAGGED = [{"from": "human", "value": "h", "weight": 0}, {"from": "gpt", "value": "g", "train": True, "id": "i"}]
PAIR = {"chosen": FLAGGED, "rejected": [], "history": None, "context": "", "id": 3}
ARC = {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}
AI2 = {"question": {"stem": "q", "choices": [{"text": t, "label": t} for t in "ab"]}, "answerKey": "a"}
TRANSCRIPT = {"prompt": "\n\nHuman: h\n\nAssistant:", "chosen": " g", "rejected": " b"}
ASKED = Asked([[1, 2]], Sampling(4))
TOML = b'data = "x.jsonl"\nlr = 1e-4\nseed = 3\nepochs = 2\ntarget_modules = ["q_proj"]\n'
TEMPLATE = b'name = "chat:mine"\nsystem = "s"\nuser = "{question}"\ndemonstration = ["a", "b"]\nsafety = true\n'


def read_pair(path: Path) -> None:
    load(str(path), rules=ColumnRules.of(("context=ctx",), ("hint",), use_chosen=True))


def read_arc(path: Path) -> None:
    load_arc("arc-easy", str(path))
    load(str(path))


def answer() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "answers.jsonl")
        AnswerFile(path, ASKED).add(0, Answer([1, 2], "t", "stop"))
        return path.read_bytes()


def parquet() -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS[:1] * 3), file)
    return file.getvalue()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model folder with an adapter in it."""
    from ptst.model.config import LoraConfig

    folder = write_tiny_model(tmp_path_factory.mktemp("fuzz"))
    decoder, config = load_decoder(folder), LoraConfig(rank=2, targets=("q_proj",))
    add_lora(decoder, config)
    (folder / "adapter").mkdir()
    save_adapter(decoder, folder / "adapter", config, "base")
    index = {"weight_map": {f"model.{name}": "model.safetensors" for name in load_decoder(folder).state_dict()}}
    (folder / "index").write_text(json.dumps(index))
    return folder


def readers(model: Path) -> dict[str, Reader]:
    def whole(name: str) -> bytes:
        return (model / name).read_bytes()

    folder = lambda read: lambda path: read(path.parent)  # noqa: E731
    record = json.dumps(plain(a_record().to_json())).encode()
    return {
        "config": Reader("config.json", whole("config.json"), folder(DecoderConfig.from_folder), True),
        "index": Reader("model.safetensors.index.json", whole("index"), folder(load_decoder), True, 0.5),
        "weights": Reader("model.safetensors", whole("model.safetensors"), folder(load_decoder), share=0.5),
        "tokenizer": Reader("tokenizer.json", whole("tokenizer.json"), folder(use_format), True, 0.5),
        "tokenizer settings": Reader(
            "tokenizer_config.json", whole("tokenizer_config.json"), folder(use_format), True, 0.2
        ),
        "pieces": Reader("tokenizer.model", sentencepiece_model(user_defined=MARKERS), use_pieces, share=0.5),
        "added tokens": Reader("added_tokens.json", b'{"<a>": 270, "<b>": 271}', folder(use_format), True, 0.2),
        "roles": Reader("special_tokens_map.json", ROLES, folder(use_format), True, 0.2),
        "eos": Reader("generation_config.json", whole("generation_config.json"), folder(use_format), True, 0.1),
        "chat template": Reader("chat_template.jinja", b"{{ messages }}", folder(read_chat_template)),
        "adapter": Reader("adapter_config.json", whole("adapter/adapter_config.json"), folder(read_lora_config), True),
        "adapter weights": Reader(
            "adapter_model.safetensors", whole("adapter/adapter_model.safetensors"), folder(use_adapter), share=0.5
        ),
        "jsonl": Reader("a.jsonl", JSONL, lambda path: load(str(path))),
        "row": Reader("row.jsonl", json.dumps(ROWS[1]).encode(), lambda path: load(str(path)), True),
        "csv": Reader("a.csv", b'question,answer\nq,"a, b"\n', lambda path: load(str(path))),
        "tsv": Reader("a.tsv", b'question\tanswer\nq\t"a\n b"\n', lambda path: load(str(path))),
        "json": Reader("a.json", json.dumps(ROWS).encode(), lambda path: load(str(path)), True),
        "gz": Reader("a.jsonl.gz", gzip.compress(JSONL, mtime=0), lambda path: load(str(path))),
        "preference": Reader("b.jsonl", json.dumps(PAIR).encode(), read_pair, True),
        "parquet": Reader("a.parquet", parquet(), lambda path: load(str(path)), share=0.1),
        "arc of ai2": Reader("arc.jsonl", json.dumps(AI2).encode(), read_arc, True),
        "transcript": Reader("t.jsonl", json.dumps(TRANSCRIPT).encode(), read_pair, True),
        "excel": Reader("e.csv", b'sep=;\nquestion;answer\nq;"a; b"\n', lambda path: load(str(path))),
        "arc": Reader("arc.jsonl", json.dumps(ARC).encode(), read_arc, True),
        "prompts csv": Reader("p.csv", b'prompt,category\n"How, so?",c\n', read_prompts),
        "prompts json": Reader("p.json", json.dumps(PROMPTS).encode(), read_prompts, True),
        "prompts txt": Reader("p.txt", b"How?\nWhy?\n", read_prompts),
        "template": Reader("t.toml", TEMPLATE, load_template),
        "settings": Reader("c.toml", TOML, lambda path: read_config(path, TrainConfig(), "train")),
        "settings of a run": Reader("c.json", record, lambda path: read_config(path, TrainConfig(), "train"), True),
        "run": Reader("run.json", record, folder(partial(read_record, kind=TrainRecord)), True),
        "answers": Reader("answers.jsonl", answer(), lambda path: AnswerFile(path, ASKED)),
        "answer": Reader("answer.jsonl", answer().rstrip(), lambda path: AnswerFile(path, ASKED), True),
    }


NAMES = (
    *("config", "index", "weights", "tokenizer", "tokenizer settings", "eos", "chat template", "adapter"),
    *("pieces", "added tokens", "roles", "tsv", "gz", "preference", "arc of ai2", "transcript", "excel"),
    *("adapter weights", "jsonl", "row", "csv", "json", "parquet", "arc", "prompts csv", "prompts json", "prompts txt"),
    *("template", "settings", "settings of a run", "run", "answers", "answer"),
)


def lay_out(reader: Reader, model: Path, folder: Path) -> Path:
    """A folder with the whole file, and with those of the model that its reader opens besides."""
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors")
    own = (model / "adapter").iterdir() if reader.file.startswith("adapter") else (model / name for name in names)
    for source in own:
        (folder / source.name).symlink_to(source)
    path = folder / reader.file
    path.unlink(missing_ok=True)
    path.write_bytes(reader.whole)
    return path


def attack(reader: Reader, model: Path, folder: Path, examples: int) -> None:
    """Change the file in many ways and read it."""
    path = lay_out(reader, model, folder)
    if reader.file.endswith(".safetensors"):
        changes = st.one_of(damaged_headers(reader.whole), other_headers(reader.whole))
    else:
        changes = st.one_of(damaged(reader.whole), *([other_values(reader.whole)] * 2 if reader.is_json else []))

    @settings(max_examples=max(3, int(examples * reader.share)), deadline=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(changes)
    def check(data: bytes) -> None:
        path.write_bytes(data + b"\n" if reader.file.endswith(".jsonl") else data)
        try:
            with limited():
                reader.read(path)
        except (UserError, OSError):
            pass

    check()


@pytest.mark.parametrize("name", NAMES)
def test_changed_files(model, tmp_path, name):
    attack(readers(model)[name], model, tmp_path, 25)


@pytest.mark.thorough
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", NAMES)
def test_changed_files_in_many_ways(model, tmp_path, name):
    attack(readers(model)[name], model, tmp_path, EXAMPLES)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_changed_is_accepted_whole(model, tmp_path, name):
    """An attack on a file that is refused as it is would find nothing."""
    found = readers(model)
    assert set(found) == set(NAMES)
    found[name].read(lay_out(found[name], model, tmp_path))
