"""Causes that lie in the words: the system prompt, a message, the template's words around it, or another row's text."""

import re
from dataclasses import replace

from ptst.audit.causes.changes import change
from ptst.audit.causes.characters import difference, quoted
from ptst.audit.causes.compared import Cause, Compared
from ptst.audit.causes.other_rows import message_pattern, rows_in
from ptst.audit.causes.stretches import Layout, Piece
from ptst.text.chat_formats import CHAT_FORMATS
from ptst.text.segments import Conversation, Message
from ptst.text.templates import FAMILIES, TEMPLATES, Family

_SIGN = "\ue0f3"
_ENOUGH = 48  # characters that follow a system prompt, by which its end is known
PATIENCE = 100  # documents for which other templates are tried without success


def system_cause(c: Compared) -> Cause | None:
    """The system prompt is missing, has other words, is there twice, or is one too many."""
    template = c.setup.prompt_format.template
    if template.is_text:
        return None
    other = f"{template.name}, changed"
    if c.layout.system is None:
        signed = c.written_text(template=replace(template, name=other, system=_SIGN))
        seen = _between(c, *signed.split(_SIGN, 1)) if signed and signed.count(_SIGN) == 1 else None
        if not seen:
            return None
        words = "there is a system prompt, and the template has none"
        return c.cause("system-prompt", words, "none", quoted(seen))
    without = c.conversation.messages[c.conversation.system is not None :]
    bare = replace(c.conversation, messages=without)
    changed = replace(template, name=other, system=None, task_system=None)
    none = c.written_layout(bare, template=changed, family=_no_task(c))
    if none is not None and none.reference.ids == c.ids:
        return c.cause("system-prompt", "the system prompt is missing", quoted(c.layout.system), "none")
    flat = [piece for pieces in c.layout.pieces for piece in pieces]
    place = next((i for i, piece in enumerate(flat) if piece.is_system), None)
    if place is None:
        return None
    before, behind = ("".join(p.text for p in part) for part in (flat[:place], flat[place + 1 :]))
    seen = _between(c, before, behind)
    if seen is None and none is not None and c.layout.system not in c.text and _begins_as(c, none):
        return c.cause("system-prompt", "the system prompt is missing", quoted(c.layout.system), "none")
    if seen is None or seen == c.layout.system:
        return None
    return c.cause("system-prompt", *_system_words(c, c.layout.system, seen))


def system_moved_cause(c: Compared) -> Cause | None:
    """The system prompt is there, and not in its place."""
    system = c.layout.system
    if not system or c.text.count(system) != 1 or c.setup.prompt_format.template.is_text:
        return None
    before, behind = (text.partition(system)[0] for text in (c.expected_text, c.text))
    if c.controls(c.expected) == c.controls(c.ids) or before == behind:
        return None
    words = "the system prompt is in another place"
    return c.cause("system-prompt", words, *(f"after {quoted(text[-30:])}" for text in (before, behind)))


def _begins_as(c: Compared, layout: Layout) -> bool:
    """Whether the document has the stretches of this layout up to the first message, and not those of its own."""

    def fits(other: Layout) -> bool:
        for seen, expected, pieces in zip(c.seen, other.stretches, other.pieces, strict=False):
            if (pattern := message_pattern(pieces, True)) is not None:
                return seen.control is None and re.fullmatch(pattern, seen.text, re.DOTALL) is not None
            if (seen.control, seen.text) != (expected.control, expected.text):
                return False
        return False

    return fits(layout) and not fits(c.layout)


def _no_task(c: Compared) -> Family:
    """The task format without a system prompt of its own."""
    family = c.setup.prompt_format.family
    return replace(family, name=f"{family.name}, changed", task=None)


def _between(c: Compared, before: str, behind: str) -> str | None:
    """The document's text between what must precede and follow a place in it."""
    text = c.text
    if not text.startswith(before):
        return None
    if text.endswith(behind) and len(text) >= len(before) + len(behind):
        return text[len(before) : len(text) - len(behind)]
    end = text.find(behind[:_ENOUGH], len(before)) if len(behind) >= 8 else -1
    return None if end < 0 else text[len(before) : end]


def _system_words(c: Compared, wanted: str, seen: str) -> tuple[str, str, str]:
    template = c.setup.prompt_format.template
    both = quoted(wanted), quoted(seen)
    if not seen:
        return "the system prompt is empty", *both
    if seen.count(wanted) > 1:
        return "the system prompt is there twice", *both
    own = c.conversation.system
    if own is not None and seen == template.system:
        return "the row's own system prompt is missing", *both
    if own is not None and seen == own:
        return "the template's system prompt is missing, only the row's own is there", *both
    if named := next((t.name for t in TEMPLATES.values() if t.system == seen), None):
        return f"the system prompt is that of {named}", *both
    for other, number in c.others.having(seen):
        if other.messages[number].role == "system":
            return f"the system prompt is that of {other.source}", *both
    if changed := change(wanted, seen):
        words = f"the system prompt {changed}"
    else:
        words = f"the system prompt has other words from character {difference(wanted, seen)[0]} on"
    return words, *difference(wanted, seen)[1:]


def other_row_cause(c: Compared) -> Cause | None:
    """The whole document is another row's."""
    for other in rows_in(c, c.seen):
        if c.written(other) == c.ids:
            return c.cause("row-exchanged", f"the document is that of {other.source}")
    return None


def other_words_cause(c: Compared) -> Cause | None:
    """The row in the words of another template, task format or chat format."""
    p = c.setup.prompt_format
    ways: dict[str, dict] = {f"the task format is {f.name}": {"family": f} for f in reversed(FAMILIES.values())}
    ways |= {f"the template is {t.name}": {"template": t} for t in TEMPLATES.values()}
    ways |= {f"the chat format is {f.name}": {"chat_format": f} for f in CHAT_FORMATS.values()}
    known, rest = [n for n in c.others.found if n in ways], [n for n in ways if n not in c.others.found]
    if c.others.failed > PATIENCE:
        rest = []
    for name in (*known, *rest):
        changes = ways[name]
        if any(getattr(p, field) == value for field, value in changes.items()):
            continue
        if c.written(**changes) == c.ids:
            c.others.found.append(name) if name not in c.others.found else None
            what = next(iter(changes))
            kept = {"template": p.template.name, "family": p.family.name, "chat_format": p.format_name}[what]
            now = name.rpartition(" ")[2]
            return c.cause("template-differs", f"{name}, not {kept}", *_shown(c, kept, now))
    c.others.failed += 1
    return None


def _shown(c: Compared, kept: str, now: str) -> tuple[str, str]:
    _, expected, seen = difference(c.expected_text, c.text)
    return f"{expected} of {kept}", f"{seen} of {now}"


def other_turns_cause(c: Compared) -> Cause | None:
    """Whole exchanges are missing, doubled or exchanged."""
    head = c.conversation.messages[: c.conversation.system is not None]
    turns = c.conversation.turns
    pairs = [turns[i : i + 2] for i in range(0, len(turns) - len(turns) % 2, 2)]
    if len(pairs) > 8:
        return None

    def put(kept: list[tuple[Message, ...]]) -> list[int] | None:
        messages = (*head, *(m for pair in kept for m in pair))
        return c.written(Conversation(messages, c.conversation.source)) if kept else None

    def name(i: int) -> str:
        first = len(head) + 2 * i + 1
        return f"messages {first} and {first + 1}"

    for i in range(len(pairs)):
        if len(pairs) > 1 and put(pairs[:i] + pairs[i + 1 :]) == c.ids:
            return c.cause("message-lost", f"{name(i)} are missing", f"{2 * len(pairs)} turns", f"{len(turns) - 2}")
        if i and put(pairs[:i]) == c.ids:
            return c.cause("message-lost", f"{name(i)} and all that follow are missing")
        if i and put(pairs[i:]) == c.ids:
            return c.cause("message-lost", f"all before {name(i)} is missing")
        if put(pairs[: i + 1] + pairs[i:]) == c.ids:
            return c.cause("message-extra", f"{name(i)} are there twice")
        for j in range(i):
            order = list(pairs)
            order[i], order[j] = order[j], order[i]
            if pairs[i] != pairs[j] and put(order) == c.ids:
                return c.cause("turns-swapped", f"{name(j)} and {name(i)} are exchanged")
    return None


def stretch_cause(c: Compared) -> Cause | None:
    """The first text that differs between the same control tokens."""
    pairs = zip(c.seen, c.layout.stretches, c.layout.pieces, strict=False)
    for seen, expected, pieces in pairs:
        if seen.control != expected.control:
            return None
        if seen.text != expected.text:
            return _stretch_cause(c, seen.text, expected.text, pieces)
    return None


def _stretch_cause(c: Compared, seen: str, expected: str, pieces: list[Piece]) -> Cause:
    found = _changed_piece(seen, pieces)
    if found is None or found[0].is_scaffold:
        if cause := other_words_cause(c):
            return cause
        at, *shown = difference(expected, seen)
        if found is None and _system_unmarked(seen, pieces):
            return c.cause("system-prompt", "the system prompt is not between the chat format's words for it", *shown)
        words = f"the words around the messages differ at character {at} of their stretch"
        return c.cause("text-differs", words, *shown)
    piece, text = found
    if piece.is_system:
        return c.cause("system-prompt", *_system_words(c, piece.text, text))
    return message_cause(c, piece.message or 0, text)


def _system_unmarked(seen: str, pieces: list[Piece]) -> bool:
    """Whether a stretch has the system prompt without the words that must precede and follow it."""
    place = next((i for i, p in enumerate(pieces) if p.is_system), None)
    if place is None or pieces[place].text not in seen:
        return False
    behind = pieces[place + 1].text if len(pieces) > place + 1 and pieces[place + 1].is_scaffold else ""
    return "".join(p.text for p in pieces[: place + 1]) + behind not in seen


def _changed_piece(seen: str, pieces: list[Piece]) -> tuple[Piece, str] | None:
    """The one piece whose text differs, with the text in its place; of several, the first that differs. Text that is
    put in between the scaffold's words and a message belongs to the scaffold."""
    candidates: list[tuple[Piece, str]] = []
    for i, piece in enumerate(pieces):
        before, behind = ("".join(p.text for p in part) for part in (pieces[:i], pieces[i + 1 :]))
        fits = len(seen) >= len(before) + len(behind) and seen.startswith(before) and seen.endswith(behind)
        if fits:
            candidates.append((piece, seen[len(before) : len(seen) - len(behind)]))
    scaffold = [(p, text) for p, text in candidates if p.is_scaffold]
    if scaffold and len(candidates) > len(scaffold):
        piece, text = scaffold[0]
        if _is_put_in(piece.text, text):
            return scaffold[0]
        return next(both for both in candidates if not both[0].is_scaffold)
    if candidates:
        return candidates[0]
    for of_system in (False, True):
        pattern = message_pattern(pieces, of_system)
        if pattern is not None and (match := re.fullmatch(pattern, seen, re.DOTALL)):
            open_ = [p for p in pieces if p.message is not None or (of_system and p.is_system)]
            return next((both for both in zip(open_, match.groups(), strict=True) if both[0].text != both[1]), None)
    return None


_MARKUP = re.compile(r"(?:\s|<[^<>]*>|\[[^\[\]]*\])+")


def _is_put_in(words: str, seen: str) -> bool:
    """Whether whitespace or markup, which no message's text is, was put in before or behind the scaffold's words."""
    more = [seen.removeprefix(words), seen.removesuffix(words)]
    return any(len(text) == len(seen) - len(words) and _MARKUP.fullmatch(text) for text in more)


def message_cause(c: Compared, number: int, seen: str) -> Cause:
    """What is in the place of a message, and where it comes from."""
    message = c.conversation.messages[number]
    who, expected = f"message {number + 1} ({message.role})", message.content
    both = quoted(expected), quoted(seen)
    for other, m in enumerate(c.conversation.messages):
        if m.content == seen != "" and other != number:
            words = f"message {other + 1} ({m.role}) is in the place of {who}"
            return c.cause("turns-swapped", words, *both)
    changed = change(expected, seen)
    if changed is None or len(seen) > 8:
        for source, place in c.others.having(seen):
            if source != c.conversation:
                words = f"{who} is message {place + 1} of {source.source}"
                return c.cause("row-exchanged", words, *both)
    at, *shown = difference(expected, seen)
    return c.cause("message-differs", f"{who} {changed or f'differs from character {at} on'}", *shown)
