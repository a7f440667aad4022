"""Conversations as the folder's own chat template writes them, with their loss mask: a trainer that follows it is
right, too, where our format differs by a known difference (a default system prompt, dates, trimmed messages).

The template is rendered once for each kind of conversation, with marks in place of the messages. What lies between the
marks is the template's; texts of messages never become control tokens.
"""

import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ptst.errors import UserError
from ptst.text.chat_template import ChatTemplate, TemplateFailed
from ptst.text.prompt_format import PromptFormat
from ptst.text.tokenizer import Tokenizer

_MARK = re.compile("\ue0f0([SUA])(\\d+)\ue0f1")
_FRONT, _BEHIND = "\n\t", "\t\n"  # around a mark, to see what is trimmed: nothing, line breaks, all whitespace
Shape = tuple[bool, int]  # whether there is a system prompt, number of turns


@dataclass(frozen=True)
class Form:
    """A conversation as it may be written: ids, loss mask, the indices of terminators. `name`: whose form it is, ""
    for our own."""

    ids: list[int]
    loss_mask: list[bool]
    ends: frozenset[int]
    name: str = ""


@dataclass(frozen=True)
class Written:
    """A kind of conversation as the template writes it. `parts`: literal, mark, literal, ..., literal. `begins`: for
    each answer, how many characters of the literal before it belong to the prompt. `trims`: for each message, the
    whitespace that is cut in front and behind."""

    parts: tuple[str, ...]
    begins: tuple[int, ...]
    trims: Mapping[str, tuple[str, str]]

    def trimmed(self, name: str, text: str) -> str:
        """A message as the template writes it."""
        front, behind = self.trims.get(name, ("", ""))
        text = text.lstrip(front) if front else text
        return text.rstrip(behind) if behind else text


class OwnerForms:
    """The folder's chat template as a writer of conversations."""

    def __init__(self, template: ChatTemplate, prompt_format: PromptFormat):
        self.template, self.prompt_format = template, prompt_format
        tokenizer = prompt_format.tokenizer
        self.tokenizers: list[Tokenizer] = [tokenizer]
        if tokenizer.encode_markers("a") is None:  # sentencepiece: transformers puts its dummy space elsewhere
            self.tokenizers.append(tokenizer.like_transformers())
        names = sorted(map(re.escape, tokenizer.control_names.values()), key=len, reverse=True)
        self._names = re.compile(f"({'|'.join(names)})") if names else re.compile("(?!)")
        self._stops = {tokenizer.control_names[i] for i in prompt_format.stop_ids if i in tokenizer.control_names}
        self._shapes: dict[Shape, Written | None] = {}

    def prepare(self, shapes: set[Shape]) -> None:
        """Render all kinds of conversations that come, in one call."""
        new = sorted(shapes - self._shapes.keys())
        jobs: list[tuple[list[dict[str, str]], bool]] = []
        for shape in new:
            messages = _marks(shape)
            answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
            padded = [m | {"content": f"{_FRONT}{m['content']}{_BEHIND}"} for m in messages]
            jobs += [(messages, False), (padded, False), *((messages[:i], True) for i in answers)]
        if not jobs:
            return
        try:
            texts = self.template.render([job[0] for job in jobs], prompts=[job[1] for job in jobs])
        except UserError:
            texts = [TemplateFailed("") for _ in jobs]
        done = 0
        for shape in new:
            number = 2 + shape[1] // 2
            self._shapes[shape] = _read(shape, texts[done : done + number])
            done += number

    def forms(self, system: str | None, turns: Sequence[str], trained: Sequence[bool]) -> list[Form]:
        """A conversation in the template's forms: messages as they are, or trimmed. `trained`: of each answer."""
        shape = (system is not None, len(turns))
        self.prepare({shape})
        written = self._shapes[shape]
        if written is None:
            return []
        names = [*(["S1"] if system is not None else []), *(f"{'UA'[i % 2]}{i // 2 + 1}" for i in range(len(turns)))]
        raw = dict(zip(names, [*([system] if system is not None else []), *turns], strict=True))
        own = {name: written.trimmed(name, text) for name, text in raw.items()}
        out: list[Form] = []
        for name, texts in (("", own), (" (messages as they are)", raw)):
            for tokenizer in self.tokenizers:
                form = self._form(written, texts, trained, tokenizer, f"the folder's chat template{name}")
                if all(form.ids != other.ids for other in out):
                    out.append(form)
        return out

    def _form(
        self, written: Written, texts: dict[str, str], trained: Sequence[bool], tokenizer: Tokenizer, name: str
    ) -> Form:
        ids: list[int] = []
        mask: list[bool] = []
        ends: set[int] = set()
        after: str | None = None
        stretches = list(self._stretches(written, texts, trained))
        position = 0
        while position < len(stretches):
            text, control, sampled, own = stretches[position]
            if control:
                ids.append(tokenizer.control_id(text))
                mask.append(own)
                if sampled and text in self._stops:
                    ends.add(len(ids) - 1)
                after, position = text, position + 1
                continue
            stop = position
            while stop < len(stretches) and not stretches[stop][1]:
                stop += 1
            run = stretches[position:stop]
            before = "".join(part[0] for part in run if not part[2])
            said = "".join(part[0] for part in run if part[2])
            if after in tokenizer.rstrip:
                before = before.lstrip()
            if stop < len(stretches) and stretches[stop][0] in tokenizer.lstrip and not said:
                before = before.rstrip()
            prompt = tokenizer.encode(before, after=after)
            whole = tokenizer.encode(before + said, after=after) if said else prompt
            if whole[: len(prompt)] != prompt:
                whole = prompt + tokenizer.encode(said, continuation=True)
            ids += whole
            mask += [False] * len(prompt) + [any(part[3] for part in run)] * (len(whole) - len(prompt))
            position = stop
        return Form(ids, mask, frozenset(ends), name)

    def _stretches(
        self, written: Written, texts: dict[str, str], trained: Sequence[bool]
    ) -> Iterator[tuple[str, bool, bool, bool]]:
        """(text, control token, sampled by the model, trained) in order; behind an answer, all up to its terminator is
        sampled."""
        answer, own = 0, False
        saying = False
        for i, part in enumerate(written.parts):
            if i % 2:
                if part[0] == "A":
                    own = trained[answer]
                    yield texts[part], False, True, own
                    answer, saying = answer + 1, True
                else:
                    yield texts[part], False, False, False
                continue
            coming = i + 1 < len(written.parts) and written.parts[i + 1][0] == "A"
            begin = written.begins[answer] if coming else len(part)
            closes = saying and any(piece in self._stops for piece in self._names.split(part[:begin])[1::2])
            for number, piece in enumerate(self._names.split(part[:begin])):
                if piece:
                    yield piece, number % 2 == 1, closes, closes and own
                if closes and piece in self._stops:
                    closes = False
            saying = False
            for number, piece in enumerate(self._names.split(part[begin:])):
                if piece:
                    yield piece, number % 2 == 1, True, trained[answer]


def _marks(shape: Shape) -> list[dict[str, str]]:
    system = [{"role": "system", "content": "\ue0f0S1\ue0f1"}] if shape[0] else []
    roles = (("user", "U"), ("assistant", "A"))
    turns = ((*roles[i % 2], i // 2 + 1) for i in range(shape[1]))
    return [*system, *({"role": role, "content": f"\ue0f0{letter}{number}\ue0f1"} for role, letter, number in turns)]


def _read(shape: Shape, texts: Sequence[str | TemplateFailed]) -> Written | None:
    """The renderings of a kind of conversation; None where the template refuses it, or does not write every message
    once and in order."""
    if any(isinstance(text, TemplateFailed) for text in texts):
        return None
    whole, padded, *prompts = map(str, texts)
    expected = [m["content"][1:-1] for m in _marks(shape)]
    found = [f"{m[1]}{m[2]}" for m in _MARK.finditer(whole)]
    if found not in (expected, expected[shape[0] :]):  # some templates drop the system prompt of a conversation
        return None
    parts, around = (re.split("\ue0f0([SUA]\\d+)\ue0f1", text) for text in (whole, padded))
    begins = []
    for number, prompt in enumerate(prompts, 1):
        before = parts[parts.index(f"A{number}") - 1]
        opening = prompt.rpartition(f"\ue0f0U{number}\ue0f1")[2]
        begins.append(len(opening) if before.startswith(opening) else len(before))
    trims = {}
    if around[1::2] == parts[1::2]:
        for i in range(1, len(parts), 2):
            # With the template's own text there: it may end in a line break, too.
            before, front = parts[i - 1], around[i - 1].endswith
            after, behind = parts[i + 1], around[i + 1].startswith
            cut = [
                "" if kept else "\n" if half else string.whitespace
                for kept, half in (
                    (front(before + _FRONT), front(before + "\t")),
                    (behind(_BEHIND + after), behind("\t" + after)),
                )
            ]
            trims[parts[i]] = (cut[0], cut[1])
    return Written(tuple(parts), tuple(begins), trims)
