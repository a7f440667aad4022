"""The laws of the text layer (docs/chat-formats.md), in a short form that a derived chat format is put to when a folder
is opened: on the folder's own tokenizer, with messages that mean no good. What breaks one is refused.

tests/text/test_laws.py has the laws in full, as properties.
"""

from collections.abc import Sequence
from itertools import groupby, pairwise

from ptst.errors import Setting, UserError
from ptst.text.chat_formats import ChatFormat
from ptst.text.encode import encode, first_difference, without_swallowed
from ptst.text.known_differences import DUMMY_SPACE
from ptst.text.segments import Message, Segment, plain_turns
from ptst.text.tokenizer import Tokenizer

_PLAIN = ("Be brief.", "What is 2 + 2?", "It is 4.", "Are you sure?", "Yes.", "Why?", "By adding.")
_ODD = ("", " a ", "\n\nb\n", "\u00e9\u65e5\U0001f600", "3.14", "{x} %s", "\t", "\r\n")


class LawBroken(UserError):
    """A chat format that breaks a law on this tokenizer."""


def check_laws(chat_format: ChatFormat, tokenizer: Tokenizer, folder: object = "") -> tuple[str, ...]:
    """Names of the known differences in ids. Raises LawBroken for a law that the format breaks on this tokenizer, with
    the first character at which it shows."""
    spaced = _owner_ids(chat_format, tokenizer, folder)
    names = tuple(dict.fromkeys(s.text for s in _segments(chat_format, tokenizer, None, _PLAIN[1:3]) if s.control))
    odd = (*_ODD, *names, *chat_format.role_markers)
    for number in range(len(odd)):
        texts = [odd[(number + 3 * i) % len(odd)] for i in range(7)]
        for system in (None, texts[6]):
            if system is not None or chat_format.start is not None:
                _check(chat_format, tokenizer, system, texts[: 2 + 2 * (number % 3)], folder)
    return (DUMMY_SPACE.name,) if spaced else ()


def _segments(
    chat_format: ChatFormat, tokenizer: Tokenizer, system: str | None, texts: Sequence[str], train_on: str = "last"
) -> list[Segment]:
    if system is None and chat_format.start is None:
        system = _PLAIN[0]
    block = None if system is None else [Segment(system, "system")]
    turns = plain_turns([Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)])
    return without_swallowed(chat_format.render(block, turns, tokenizer, train_on), tokenizer)


def _check(
    chat_format: ChatFormat, tokenizer: Tokenizer, system: str | None, texts: Sequence[str], folder: object
) -> None:
    every = chat_format.history is None and not (chat_format.system_last and system is not None)
    segments = _segments(chat_format, tokenizer, system, texts, "all" if every else "last")
    whole, whole_text = encode(segments, tokenizer), "".join(s.text for s in segments)
    stop = tokenizer.control_id(chat_format.terminator or tokenizer.eos or "")
    wanted = [False] * len(whole.ids)

    def broken(law: int, what: str, token: int) -> LawBroken:
        return _broken(law, what, whole_text, len(tokenizer.decode(whole.ids[:token])), folder)

    for end in [i for i in range(1, len(texts), 2) if every or i == len(texts) - 1]:
        prompt = encode(_segments(chat_format, tokenizer, system, texts[:end]), tokenizer).ids
        if whole.ids[: len(prompt)] != prompt:
            raise broken(2, "does not begin with its generation prompt", first_difference(prompt, whole.ids))
        if stop not in whole.ids[len(prompt) :]:
            raise broken(5, "has an answer without terminator", len(prompt))
        until = whole.ids.index(stop, len(prompt)) + 1
        wanted[len(prompt) : until] = [True] * (until - len(prompt))
        said = tokenizer.decode_answer(prompt, whole.ids[len(prompt) : until])
        if not (texts[end] in said or whole.lossy):
            raise broken(3, f"trains {said!r} for an answer", len(prompt))
    if whole.loss_mask != wanted:
        raise broken(1, "does not train what is sampled", first_difference(wanted, whole.loss_mask))
    controls = [tokenizer.control_id(s.text) for s in segments if s.control]
    if [i for i in whole.ids if i in tokenizer.control_names] != controls:
        raise broken(4, "makes a control token of a message's text", 0)
    bos = tokenizer.control_id(tokenizer.bos) if tokenizer.bos and tokenizer.has_control(tokenizer.bos) else None
    twice = next((i for i, pair in enumerate(pairwise(whole.ids)) if pair == (bos, bos)), None)
    if twice is not None and bos != stop:
        raise broken(5, "has BOS twice in a row", twice)
    theirs = [s.text for s in segments if s.author in ("user", "assistant")]
    if theirs != list(texts):
        raise broken(10, "changes a message", 0)


def _owner_ids(chat_format: ChatFormat, tokenizer: Tokenizer, folder: object) -> bool:
    """Laws 8 and 9 on plain words: the ids are those of the whole text, read at once by the folder's tokenizer.json,
    and decode to the text. Returns whether they differ in sentencepiece's dummy spaces alone."""
    spaced = False
    for texts in (_PLAIN[1:2], _PLAIN[1:3], _PLAIN[1:]):
        segments = _segments(chat_format, tokenizer, _PLAIN[0], texts)
        words, ours = "".join(s.text for s in segments), encode(segments, tokenizer)
        theirs = tokenizer.encode_markers(words) or ours.ids
        # Where an answer is encoded as a continuation of its prompt, the owner's ids may join both.
        if ours.lossy or (ours.ids != theirs and not ours.token_boundaries):
            with_spaces, without = (_runs_alone(segments, tokenizer, joined) for joined in (False, True))
            if not ours.lossy and theirs in (with_spaces, without):
                spaced |= ours.ids == with_spaces
                continue
            law, what = (9, "does not give back its text") if ours.lossy else (8, "has other ids than its text")
            at = len(tokenizer.decode(ours.ids[: first_difference(ours.ids, theirs)]))
            raise _broken(law, what, words, at, folder)
    return spaced


def _runs_alone(segments: Sequence[Segment], tokenizer: Tokenizer, joined: bool) -> list[int]:
    """Ids with sentencepiece's dummy space before every run of text, or, `joined`, before the first one only."""
    ids: list[int] = []
    for is_control, run in groupby(segments, key=lambda s: s.control):
        if is_control:
            ids += [tokenizer.control_id(s.text) for s in run]
        else:
            ids += tokenizer.encode("".join(s.text for s in run), continuation=joined and bool(ids))
    return ids


def _broken(law: int, what: str, words: str, at: int, folder: object) -> LawBroken:
    near = f"at character {at} ({words[max(0, at - 8) : at + 16]!r})"
    cause = f"the chat format derived from the chat template breaks law {law}: it {what}, {near}"
    return LawBroken(cause, ("choose a ", Setting("chat_format"), ", or use a text: template"), folder)
