"""Why a document's loss mask is not that of its row, where its tokens are."""

from collections.abc import Iterator
from dataclasses import replace

from ptst.audit.causes.compared import Cause, Compared
from ptst.audit.reference.formats import reference
from ptst.text.encode import first_difference
from ptst.text.segments import Conversation

# Where these are the cause, what follows the difference is as it must be, and its loss mask can be checked.
_LOCAL = {"system-prompt", "message-differs", "text-differs", "unnatural-ids", "prompt-differs"}


def why_masks_differ(c: Compared, why: Cause | None) -> Iterator[Cause]:
    """The causes of wrong flags among the tokens that are the reference's (`why`: the cause of other tokens): one for
    all flags where one explains them, else the first of each rule."""
    if why is None and c.loss_mask[1:] == c.reference.loss_mask[1 : len(c.ids)]:
        return
    expected = _aligned(c, why, c.reference.loss_mask)
    wrong_flags = [i for i, (a, b) in enumerate(zip(expected, c.loss_mask, strict=True)) if i and a not in (None, b)]
    if not wrong_flags or (any(expected) and not any(c.loss_mask)):
        return  # none, or check_shape reports it
    whole = _whole(c, why, wrong_flags[0])
    if whole is not None:
        yield whole
        return
    wrong: dict[str, list[int]] = {}
    for i in wrong_flags:
        rule = "prompt-trained" if c.loss_mask[i] else "answer-untrained"
        if rule == "answer-untrained" and c.control(c.ids, i) is not None:
            rule = "terminator-untrained"
        wrong.setdefault(rule, []).append(i)
    answers, ends = wrong.get("answer-untrained", []), wrong.get("terminator-untrained", [])
    if answers and ends and all(end - 1 in answers for end in ends):
        answers += wrong.pop("terminator-untrained")  # not trained to their ends
    for rule, places in wrong.items():
        yield _flags(c, rule, places)


def _flags(c: Compared, rule: str, places: list[int]) -> Cause:
    """Tokens with the wrong flag, in words."""
    first, number = places[0], len(places)
    whose = _owner(c, first)
    count = f"{number} tokens" if number > 1 else "1 token"
    shown = "all of the prompt is trained" if rule == "prompt-trained" and all(c.loss_mask[1:]) else ""
    words = shown or f"{count}, the first of {whose}: {c.show(c.ids, first)}"
    trained = ("not trained", "trained")
    return Cause(rule, first, words, trained[rule != "prompt-trained"], trained[rule == "prompt-trained"])


def _owner(c: Compared, token: int) -> str:
    """Whose text a token is."""
    if (name := c.control(c.ids, token)) is not None:
        return f"the control token {name}" if name != c.stop else "the terminator"
    for first, end, piece in c.layout.spans:
        if first <= token < end:
            if piece.message is None:
                return "the system prompt"
            return f"message {piece.message + 1} ({c.conversation.messages[piece.message].role})"
    return "the text of template and chat format"


def _aligned(c: Compared, why: Cause | None, mask: list[bool]) -> list[bool | None]:
    """A loss mask of the reference for the document's tokens; None where they are not the reference's."""
    size = len(c.ids)
    if why is None:
        return list(mask[:size])
    known: list[bool | None] = [*mask[: c.at], *[None] * (size - c.at)]
    if why.rule in _LOCAL:
        same = first_difference(c.ids[: c.at - 1 : -1], c.expected[: c.at - 1 : -1])
        if same:
            known[size - same :] = mask[len(c.expected) - same : len(c.expected)]
    return known


def _whole(c: Compared, why: Cause | None, first: int) -> Cause | None:
    """One cause for the whole loss mask. `first`: the first wrong flag."""

    def explains(mask: list[bool]) -> bool:
        pairs = zip(_aligned(c, why, mask)[1:], c.loss_mask[1:], strict=True)
        return all(a in (None, b) for a, b in pairs)

    ours, theirs = ("trained" if flag else "not trained" for flag in (not c.loss_mask[first], c.loss_mask[first]))
    for mask, words in _other_masks(c):
        if explains(mask):
            return Cause("train-on", first, words, ours, theirs)
    mask = c.reference.loss_mask
    for side, shifted in (("left", [*mask[1:], False]), ("right", [False, *mask[:-1]])):
        moved = {(a, b) for a, b in zip(mask[1:], c.loss_mask[1:], strict=False) if a != b}
        if why is None and len(moved) == 2 and explains(shifted):
            return Cause("mask-shifted", first, f"the loss mask is one token too far to the {side}", ours, theirs)
    return None


def _other_masks(c: Compared) -> Iterator[tuple[list[bool], str]]:
    """Loss masks under other settings, with what that means."""
    p, messages = c.setup.prompt_format, c.conversation.messages
    every = Conversation(tuple(replace(m, trained=True) for m in messages), c.conversation.source)
    turned = {"all": "last", "last": "all"}[c.setup.train_on]
    done = {"all": "all answers are trained, not the last alone", "last": "the last answer alone is trained, not all"}
    if sum(m.role == "assistant" for m in messages) > 1:
        yield reference(c.conversation, p, turned).loss_mask, done[turned]
    if every != c.conversation:
        for train_on in (c.setup.train_on, turned):
            words = "answers are trained that the data leave out of the loss"
            yield reference(every, p, train_on).loss_mask, words
