"""Causes that lie in the control tokens, in how text was encoded, and in where a document begins and ends."""

from ptst.audit.causes.characters import quoted
from ptst.audit.causes.compared import Cause, Compared
from ptst.audit.causes.other_rows import rows_in
from ptst.audit.causes.stretches import Piece, stretches, token_texts
from ptst.text.encode import first_difference

_SHOWN = 4  # tokens of a tokenization


def same_text_cause(c: Compared) -> Cause | None:
    """The document says the same, in other tokens; or its first stretch of other tokens does."""
    pairs = zip(c.seen, c.layout.stretches, strict=False)
    stretch = next(((a, b) for a, b in pairs if c.ids[a.start : a.end] != c.expected[b.start : b.end]), None)
    if stretch is not None and stretch[0].text == stretch[1].text and stretch[0].control == stretch[1].control:
        return _other_tokens(c)
    if c.text != c.expected_text:
        return None
    seen, expected = c.controls(c.ids), c.controls(c.expected)
    wrong = first_difference(seen, expected)
    if len(seen) > len(expected):
        name = seen[wrong]
        if any(name in m.content for m in c.conversation.messages):
            return c.cause("forged-control", f"the text {name} of a message became the control token")
        return c.cause("control-tokens", f"the text {name} became a control token")
    name = expected[min(wrong, len(expected) - 1)]
    return c.cause("control-spelled", f"the control token {name} was encoded as text", name)


def _other_tokens(c: Compared) -> Cause:
    """Other tokens of the same text: of a token across the end of the prompt, or of text in pieces."""
    start, run = max(((i, run) for i, run in c.reference.runs if i <= c.at), key=lambda found: found[0])
    end = next((s.end for s in c.seen if s.start <= c.at < s.end), c.at + 1)
    after = c.control(c.ids, start - 1)
    seen = token_texts(c.ids[start:end], c.tokenizer, after)
    expected = token_texts(c.expected[start:], c.tokenizer, after)
    skip = c.at - start
    shown = [" ".join(quoted(t, 20) for t in texts[skip : skip + _SHOWN]) for texts in (expected, seen)]
    first = len("".join(seen[:skip]))
    if run.answer and first < len(run.prompt) < first + len(seen[skip]):
        words = "one token spans the end of the prompt and the beginning of the answer"
        return c.cause("prompt-differs", words, *shown)
    pieces = "the same text in other tokens than the tokenizer gives for it in one call"
    return c.cause("unnatural-ids", pieces, *shown)


def cut_cause(c: Compared) -> Cause | None:
    """The document is the beginning of what it must be."""
    ids, expected = c.ids, c.expected
    if c.at == len(ids):
        token = max(0, len(ids) - 1)
        lost = sorted({p.message for first, _, p in c.layout.spans if p.message is not None and first >= len(ids)})
        both = f"{len(expected)} tokens", f"{len(ids)} tokens"
        ends = [end for _, end, p in c.layout.spans if p.message is not None and end < len(ids)]
        closed = bool(ends) and c.stop in c.controls(ids[max(ends) :])
        if lost and closed and c.conversation.messages[lost[0]].role == "user":
            names = ", ".join(f"{m + 1} ({c.conversation.messages[m].role})" for m in lost)
            return Cause("message-lost", token, f"the document ends before message {names}", *both)
        return Cause("cut-short", token, f"the document ends after {len(ids)} of {len(expected)} tokens", *both)
    return None


def cut_left_cause(c: Compared) -> Cause | None:
    """The document is the end of what it must be."""
    less = len(c.expected) - len(c.ids)
    if less > 0 and c.expected[less:] == c.ids:
        return c.cause("cut-short", f"the first {less} tokens are missing")
    return None


def double_bos_cause(c: Compared) -> Cause | None:
    """BOS twice in a row."""
    bos = c.tokenizer.bos
    twice = c.control(c.ids, c.at) == c.control(c.ids, c.at - 1) == bos
    if bos is None or not twice or c.control(c.expected, c.at) == bos:
        return None
    return c.cause("double-bos", f"{bos} {bos}")


def forged_cause(c: Compared) -> Cause | None:
    """A message's text became a control token."""
    name = c.control(c.ids, c.at)
    if name is None or not any(name in m.content for m in c.conversation.messages):
        return None
    if c.ids.count(c.ids[c.at]) <= c.expected.count(c.ids[c.at]):
        return None
    return c.cause("forged-control", f"the text {name} of a message became the control token")


def end_of_cut_cause(c: Compared) -> Cause | None:
    """A terminator where a row was cut."""
    if c.is_cut and c.control(c.ids, c.at) == c.stop and c.at == len(c.ids) - 1:
        return c.cause("terminator-extra", f"{c.stop} after the answer was cut at token {c.at}")
    return None


def inserted_cause(c: Compared) -> Cause | None:
    """Something was put in, and the rest is as it must be."""
    more = len(c.ids) - len(c.expected)
    if more <= 0 or c.ids[c.at + more :] != c.expected[c.at :]:
        return None
    chunk = c.ids[c.at : c.at + more]
    controls = c.controls(chunk)
    if not controls:
        return None  # text: text_causes knows whose
    times = f"{more} times" if more > 1 else "once"
    none = ("none", " ".join(controls[:_SHOWN]) + " ..." * (more > _SHOWN))
    if len(controls) == more and len(set(controls)) == 1:
        name = controls[0]
        if name == c.stop:
            return c.cause("terminator-extra", f"{name} is put in {times}", *none)
        if name == c.bos:
            return c.cause("extra-bos", f"{name} is put in {times}", *none)
        words = f"{name}, which the row does not have here, is put in {times}"
        return c.cause("control-tokens", words + (", as padding is" if more > 1 else ""), *none)
    return _inserted_turn(c, more)


def _inserted_turn(c: Compared, more: int) -> Cause | None:
    """Control tokens with text between them."""
    text = c.tokenizer.decode(c.ids[c.at : c.at + more])
    shown = ("nothing", quoted(text))
    if c.at == len(c.expected):
        return _appended(c, shown)
    if c.layout.system and c.layout.system in text:
        return c.cause("system-prompt", "the system prompt is there twice", *shown)
    for number, message in enumerate(c.conversation.messages, 1):
        if len(message.content) > 1 and message.content in text:
            return c.cause("message-extra", f"message {number} ({message.role}) is there twice", *shown)
    return c.cause("control-tokens", "control tokens and text are put in", *shown)


def _appended(c: Compared, shown: tuple[str, str]) -> Cause:
    """What follows a whole document."""
    rest = c.ids[c.at :]
    if rest[: len(c.expected)] == c.expected:
        words = "the row follows once more in the same document: it is there twice, without a boundary"
        return c.cause("boundaries", words, "the end of the document", shown[1])
    for other in rows_in(c, stretches(rest, c.tokenizer)):
        ids = c.written(other)
        if ids is not None and ids[: len(rest)] == rest[: len(ids)]:
            words = f"{other.source} follows in the same document: a boundary is missing"
            return c.cause("boundaries", words, "the end of the document", shown[1])
    return c.cause("control-tokens", "the document goes on after its end", *shown)


def removed_cause(c: Compared) -> Cause | None:
    """Something was left out, and the rest is as it must be."""
    less = len(c.expected) - len(c.ids)
    if less <= 0 or c.expected[c.at + less :] != c.ids[c.at :]:
        return None
    controls = c.controls(c.expected[c.at : c.at + less])
    if not controls:
        return None
    if len(controls) == less:
        return _removed_control(c, controls)
    shown = c.setup.prompt_format.template.demonstration
    if shown and all(text in c.tokenizer.decode(c.expected[c.at : c.at + less]) for text in shown):
        return c.cause("template-differs", "the template's demonstration is missing")
    slide = 0  # the same ids are left where the gap begins earlier
    while slide < c.at and c.expected[c.at - slide - 1] == c.expected[c.at + less - slide - 1]:
        slide += 1
    for first in range(c.at - slide, c.at + 1):
        gone = [p for a, b, p in c.layout.spans if first <= a and b <= first + less]
        touched = [p for a, b, p in c.layout.spans if a < first + less and b > first]
        if gone and gone == touched:
            return _removed_pieces(c, gone)
    return None


def _removed_pieces(c: Compared, gone: list[Piece]) -> Cause:
    system = next((p for p in gone if p.is_system), None)
    messages = [p.message for p in gone if p.message is not None]
    if system is not None and not messages:
        return c.cause("system-prompt", "the system prompt is missing", quoted(system.text), "none")
    names = ", ".join(f"{m + 1} ({c.conversation.messages[m].role})" for m in messages)
    return c.cause("message-lost", f"message {names} is missing", quoted(gone[0].text), "nothing")


def _removed_control(c: Compared, controls: list[str]) -> Cause:
    name = controls[0]
    if name == c.stop:
        return c.cause("terminator-missing", f"{name} is missing")
    if name == c.bos:
        return c.cause("missing-bos", f"{name} is missing")
    return c.cause("control-tokens", f"{name} is missing")


def control_cause(c: Compared) -> Cause | None:
    """The first difference is at a control token."""
    got, wanted = c.control(c.ids, c.at), c.control(c.expected, c.at)
    if wanted is not None and wanted == c.bos:
        return c.cause("missing-bos", f"{wanted} is missing")
    if got == c.stop:
        return c.cause("terminator-extra", f"{got} where the format has none")
    if wanted == c.stop:
        words = f"{got} is in place of the terminator {wanted}" if got else f"{wanted} is missing"
        return c.cause("terminator-missing", words)
    if got is not None and got == c.bos:
        return c.cause("extra-bos", f"{got} where the format has none")
    if c.controls(c.ids) == c.controls(c.expected):
        return None
    words = f"{got or 'text'} is in place of {wanted}" if wanted else f"{got} is in place of text"
    return c.cause("control-tokens", words if got or wanted else "control tokens follow other text than the row's")
