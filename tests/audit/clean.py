"""Clean data, and folders of every kind, for the audit to find nothing wrong in: eight corpora, and folders with the
tokenizers of real models and chat templates that have the same features as theirs, written here."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from ptst.audit.findings import Finding
from ptst.audit.report import References, audit
from ptst.audit.setup import Setup
from ptst.data import sources
from ptst.data.sources import Source
from ptst.errors import UserError
from ptst.text.prompt_format import PromptFormat
from ptst.text.segments import Conversation, Message
from tests.conftest import EMBEDDED, SHARED, mistral_tokenizer_file
from tests.text import folders, made, owners


class Missing(Exception):
    """Something that lies outside of the project is not there."""


def _rows(name: str, family: str, *turns: tuple[str | None, ...]) -> Source:
    """Each row: the system prompt or None, then user and assistant in turn."""
    made = []
    for number, (system, *texts) in enumerate(turns, 1):
        messages = [Message("system", system)] if system is not None else []
        messages += [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts) if text is not None]
        made.append(Conversation(tuple(messages), f"{name}.jsonl:{number}"))
    return Source(name, family, tuple(made))


_PYTHON = (
    "Sure:\n\n```python\ndef f(a: list[int]) -> dict[str, int]:\n"
    "    return {str(i): x << 2 for i, x in enumerate(a)}\n```"
)
_CODE = (
    (None, "Write <b>bold</b> HTML.", '<div class="a">x &lt; y</div>\n<p>a <s>b</s> c</p>\n<br/>'),
    (None, "Sum a list in Python, please.", _PYTHON),
    (None, "Compare a<b and c>d in C.", "#include <stdio.h>\nint main(void) { return a < b && c > d ? 1 : 0; }"),
    ("You write XML.", "One note.", '<?xml version="1.0"?>\n<note id="1"><to>you</to></note>\n<!-- end -->'),
    (None, "A generic in Java?", "List<Map<String, ? extends T>> x = new ArrayList<>();"),
    (None, "Elixir pipes?", "x |> f() |> g(); F# has <| and <<, Haskell <$> and <|>."),
    (None, "Jinja?", "{% for m in messages %}{{ m['content'] }}{% endfor %} %s %d {x} {{x}}"),
    (None, "Index a[0], then b[i][j].", "[x for x in y[::-1]]\n[1, [2, [3]]] and [link](https://example.org/?a=1&b=2)"),
    (None, "Redirect <in >out 2>&1", "cat <<EOF\n$HOME `x` \\n\nEOF"),
    (None, "Type of <T,>?", "<T,>(x: T): x is NonNullable<T> => x != null"),
    (None, "Strike a word.", "Use <s>this</s> or <del>this</del>; in BBCode [s]this[/s], [b]bold[/b]."),
    (None, "LaTeX?", "\\frac{a}{b} \\leq \\left[ x \\right], $5 and $$x^2$$"),
)
_CHINESE = "\u4f60\u597d\uff0c\u4eca\u5929\u662f2024\u5e747\u670826\u65e5\u5417\uff1f"
_JAPANESE = "\u65e5\u672c\u8a9e\u3082\u53ef\u80fd\u3067\u3059\u3002"
_URDU = "\u0622\u067e \u0645\u062f\u062f\u06af\u0627\u0631 \u06c1\u06cc\u06ba\u06d4"
_ARABIC = "\u0623\u0647\u0644\u0627\u064b \u0648\u0633\u0647\u0644\u0627\u064b"
_HINDI = "\u0928\u092e\u0938\u094d\u0924\u0947"
_THAI_HEBREW = "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \u05e9\u05dc\u05d5\u05dd"
_RUSSIAN = "\u0417\u0434\u0440\u0430\u0432\u0441\u0442\u0432\u0443\u0439\u0442\u0435"
_FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
_KOREAN = "\ub124, \uac00\ub2a5\ud574\uc694."
_LANGUAGES = (
    (None, "Wie hei\u00dft du?", "Ich hei\u00dfe M\u00fcller \u2013 \u201esch\u00f6n\u201c, na\u00efve \u00e9t\u00e9."),
    (None, _CHINESE, f"\u662f\u7684\u3002\n{_JAPANESE}"),
    (_URDU, "\u0645\u0631\u062d\u0628\u0627", _ARABIC),
    (None, _HINDI, f"{_THAI_HEBREW} {_RUSSIAN}"),
    (None, "\U0001f600\U0001f44d\U0001f3fd", f"{_FAMILY} \U0001f1e9\U0001f1ea \u2764\ufe0f"),
    (None, "e\u0301 a\u030a n\u0303", "\u1e69\u0323\u0307 \ufb01 \u2126 \u212b"),
    (None, "\U00020000\U0001d11e", "\u2211\u222b\u221a\u2260\u2264 \u03b1\u03b2\u03b3"),
    (None, "a\u00a0b\u2003c\u3000d", "\u201cquoted\u201d\u2026 \u00bd \u20ac5 \u2192 x"),
    (None, "\ud55c\uad6d\uc5b4", _KOREAN, "\u0433\u0434\u0435?", "\u0442\u0430\u043c"),
)
_WHITESPACE = (
    (None, " leading", "answer "),
    (None, "trailing \n", "\nanswer on a new line"),
    (None, "\n\ntwo before", "\n\n  indented\n    more\n"),
    (None, "tab\t", "\ta\tb\t"),
    (None, "a\r\nb\r\n", "c\r\n\r\nd"),
    ("  system  ", "q", "a"),
    ("system\n", "\nq\n", " a ", " b ", "\nc\n"),
    (None, "a\n\n\n\nb", "c\n \n\t\n  d"),
    (None, "two  spaces   three", "x    y     z"),
    (None, "q", "a\n"),
    ("s\n\ns", "q:\n", "- one\n- two\n\n\n"),
)
_SYSTEM = (
    ("You are an AI assistant. You will be given a task. You must generate a detailed and long answer.", "2+2?", "4."),
    ("You are an AI assistant that follows instruction extremely well. Help as much as you can.", "Say hi.", "Hi!"),
    ("Think step by step and justify your answer.", "Is 7 prime?", "Yes: no number from 2 to 6 divides it."),
    ("Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\nBe brief.", "Which day is it?", "26 Jul 2024"),
    ("Today's Date: May 1, 2025.\nYou are Bob.", "Who are you?", "Bob."),
    ("You are a helpful assistant.", "The date is 2024-07-26\nagain?", "2024-07-26"),
    ("A {x} and a {task} and {question}.", "Keep {x}.", "{x}"),
    ("You are a helpful AI assistant named SmolLM, trained by Hugging Face", "Who?", "SmolLM"),
)  # fmt: skip
_TURNS = (
    (None, "a?", "b", "c?", "d"),
    (None, "e?", "f"),
    (None, "g?", "h", "i?", "j", "k?", "l"),
    ("Be terse.", "1+1?", "2", "and one more?", "3", "and one less?", "2", "sure?", "Yes."),
    ("Answer in rhyme.", "Roses?", "Red and wide.", "Violets?", "By their side."),
    (None, *(f"turn {i}" for i in range(24))),
)


def corpora(rows: int) -> dict[str, Source]:
    """The eight corpora, those of files with so many rows. Without the folder of real data, the two of it are
    missing."""
    found = {
        "problems": sources.load(sources.DEFAULT, limit=rows),
        "system": _rows("system", "openorca", *_SYSTEM),
        "turns": _rows("turns", "plain", *_TURNS),
        "code": _rows("code", "plain", *_CODE),
        "languages": _rows("languages", "plain", *_LANGUAGES),
        "whitespace": _rows("whitespace", "plain", *_WHITESPACE),
    }
    if SHARED.is_dir():
        found["gsm8k"] = sources.load(str(SHARED / "data/gsm8k/train.jsonl"), limit=rows)
        source = sources.load(str(SHARED / "data/chatdoctor/train.jsonl"), limit=rows)
        found["chatdoctor"] = replace(source, family="chatdoctor")
    return found


S = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
L3 = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
QWEN = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
QWEN_NAMES = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|box_start|>", "<|vision_start|>")
QWEN_ADDED = (("<tool_call>", False), ("</tool_call>", False), ("<think>", False), ("</think>", False))
QWEN_SPLIT = made.LLAMA3.replace("{1,3}", "")


def _sentencepiece(file: Callable[[], Path]) -> Callable[[Path], dict]:
    def write(folder: Path) -> dict:
        try:
            shutil.copy(file(), folder / "tokenizer.model")
        except (FileNotFoundError, BaseException) as error:  # pytest's skip is none of Exception
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            raise Missing(str(error)) from None
        return S

    return write


def _llama3(folder: Path) -> dict:
    try:
        owners.llama3_tokenizer(folder)
    except BaseException as error:
        raise Missing(str(error)) from None
    return L3


def _small_llama3(folder: Path) -> dict:
    names = [f"<|{name}|>" for name in owners.LLAMA3_SPECIALS]
    made.write(folder, rules=made.byte_level(specials=tuple(names)))
    return L3


def _small_gemma(folder: Path) -> dict:
    names = ("<s>", "</s>", *folders.CONTROL["gemma"])
    made.write(folder, rules=made.byte_level(specials=names))
    return S


def _qwen(folder: Path) -> dict:
    made.write(folder, rules=made.byte_level(QWEN_SPLIT, False, QWEN_NAMES, QWEN_ADDED))
    return QWEN


def _smollm2(folder: Path) -> dict:
    if not (EMBEDDED / "tokenizer.json").exists():
        raise Missing("needs the default model (python -m ptst.train makes it)")
    shutil.copy(EMBEDDED / "tokenizer.json", folder)
    config = json.loads((EMBEDDED / "tokenizer_config.json").read_text())
    return {key: value for key, value in config.items() if key != "chat_template"}


TOKENIZERS: dict[str, Callable[[Path], dict]] = {
    "llama2": _sentencepiece(lambda: SHARED / "tokenizers/llama2.tokenizer.model"),
    "mistral-v1": _sentencepiece(lambda: mistral_tokenizer_file("v1")),
    "mistral-v2": _sentencepiece(lambda: mistral_tokenizer_file("v2")),
    "mistral-v3": _sentencepiece(lambda: mistral_tokenizer_file("v3")),
    "llama3": _llama3,
    "small-llama3": _small_llama3,
    "small-gemma": _small_gemma,
    "qwen": _qwen,
    "smollm2": _smollm2,
}


_MARKER = re.compile(
    r"<\|[^<>|\s]+\|>|<\uff5c[^<>\uff5c]+\uff5c>|</?s>|<(?:start|end)_(?:of_turn|message)>|\[/?[A-Z_]{4,}\]"
)


def _marked(folder: Path, template: str, config: dict) -> dict:
    """A byte-level tokenizer with the control tokens that a chat template names."""
    markers = [name for name in _MARKER.findall(template) if " [/INST]" not in template or "INST" not in name]
    named = [name for key, name in config.items() if key.endswith("_token") and isinstance(name, str)]
    made.write(folder, rules=made.byte_level(specials=tuple(dict.fromkeys((*named, *markers)))))
    return {}


def write_folder(folder: Path, tokenizer: str | None, template: str, **config: object) -> Path:
    """A folder with a chat template and the tokenizer of that name (None: a small one that has its markers). Raises
    Missing."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = _marked(folder, template, config) if tokenizer is None else TOKENIZERS[tokenizer](folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **config, "chat_template": template}))
    return folder


def accepted(source: Source, prompt_format: PromptFormat) -> Iterator[tuple[str, Source]]:
    """The rows that training accepts, by which answers it trains on: those that it refuses under `all` and not under
    `last` by themselves."""
    rows: dict[str, list[Conversation]] = {}
    for conversation in source.conversations:
        for train_on in ("all", "last"):
            try:
                prompt_format.encode(conversation, train_on)
            except UserError:
                continue
            rows.setdefault(train_on, []).append(conversation)
            break
    for train_on, kept in rows.items():
        yield train_on, replace(source, conversations=tuple(kept))


def alarms(folder: Path, prompt_format: PromptFormat, source: Source) -> tuple[list[str], list[Finding]]:
    """The rows that training accepts, and every finding of their audit that is no note."""
    rows, found = list[str](), list[Finding]()
    for train_on, kept in accepted(source, prompt_format):
        report = audit(kept, Setup(prompt_format, train_on), References(folder), show=0)
        rows += [c.source for c in kept.conversations]
        found += [f for f in report.findings if f.level != "info"]
    return rows, found
