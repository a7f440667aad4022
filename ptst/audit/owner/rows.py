"""Which rows are compared with the folder's chat template, and the conversations that the template gets."""

from bisect import insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from ptst.audit.setup import Setup
from ptst.text.segments import Conversation, Message

FIRST = 20  # rows from the beginning of the data
UNUSUAL = 4  # rows of each unusual kind


def sample(conversations: Iterable[Conversation]) -> list[Conversation]:
    """The first rows, some of each kind that chat templates may treat otherwise, and the longest."""
    chosen: dict[int, Conversation] = {}
    longest: list[tuple[int, int, Conversation]] = []  # the first of those of the same length
    found = [0] * len(_KINDS)
    for number, conversation in enumerate(conversations):
        if number < FIRST:
            chosen[number] = conversation
        for at, kind in enumerate(_KINDS):
            if found[at] < UNUSUAL and kind(conversation):
                found[at] += 1
                chosen[number] = conversation
        length = sum(len(m.content) for m in conversation.messages)
        if len(longest) < UNUSUAL or length > -longest[-1][0]:
            insort(longest, (-length, number, conversation))
            del longest[UNUSUAL:]
    chosen |= {number: conversation for _, number, conversation in longest}
    return [chosen[number] for number in sorted(chosen)]


def _any(test: Callable[[str], bool]) -> Callable[[Conversation], bool]:
    return lambda c: any(test(m.content) for m in c.messages)


_KINDS: tuple[Callable[[Conversation], bool], ...] = (
    lambda c: c.system is not None,
    lambda c: c.system is None,
    lambda c: len(c.turns) > 2,
    lambda c: len(c.turns) > 4,
    lambda c: not all(m.trained for m in c.messages),
    _any(lambda text: text != text.strip()),
    _any(lambda text: not text.strip()),
    _any(lambda text: not text.isascii()),
    _any(lambda text: any(sign in text for sign in ("<|", "</", "[/", "[I", "<<"))),
    _any(lambda text: "\r" in text or "\t" in text or "\n\n" in text),
    lambda c: c.messages[-1].content[:1].isspace(),
)


@dataclass(frozen=True)
class Asked:
    """A conversation in the template's words: its row, our ids of it, the texts of its messages. `shown`: number of
    turns of a demonstration, which come first."""

    row: str
    ids: list[int]
    system: str | None
    texts: tuple[str, ...]
    shown: int

    @property
    def messages(self) -> list[str]:
        """The texts in order, with the system prompt."""
        return [*([] if self.system is None else [self.system]), *self.texts]


def asked(conversation: Conversation, setup: Setup) -> Iterator[Asked]:
    """A row's generation prompt and its training form, in the words that the oracle knows. Raises UserError for what
    our format cannot write."""
    script = setup.oracle.script
    shown = script.wording.demonstration or ()
    for form in dict.fromkeys((conversation.prompt(), conversation)):
        system, turns = script.say(form)
        ids = setup.prompt_format.encode(form, setup.train_on).ids
        texts = ("".join(part for _, part in turn) for turn in turns)
        said = None if system is None else "".join(part for _, part in system)
        yield Asked(conversation.source, ids, said, (*shown, *texts), len(shown))


def written(messages: Sequence[str], with_system: bool, merged: int | None = None) -> list[Message]:
    """Messages with their roles. `merged`: the user's turn whose text gets the system prompt, before a blank line."""
    system, turns = (messages[0], [*messages[1:]]) if with_system else (None, [*messages])
    if merged is not None and system is not None:
        turns[merged] = f"{system}\n\n{turns[merged]}"
        system = None
    made = [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(turns)]
    return made if system is None else [Message("system", system), *made]
