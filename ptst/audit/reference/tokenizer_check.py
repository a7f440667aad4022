"""The tokenizer and the prompt format themselves against the oracle: control tokens, vocabulary, stop ids, decoding.

A mistake in these may not show in a training row (an id that ends answers too early, an answer that is read back
otherwise), so they are compared apart from the rows.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from ptst.audit.causes.characters import difference
from ptst.audit.findings import Finding
from ptst.audit.reference.formats import Oracle, Reference
from ptst.audit.setup import Setup
from ptst.text.prompt_format import PromptFormat
from ptst.text.segments import Conversation

SAMPLE = 32  # rows that are decoded
_TEXTS = ("The answer is 12.", " a\n\n  b\t", "na\u00efve \u65e5\u672c \U0001f600", "<s></s> [INST] <|im_end|> <0x0A>")


def check_tokenizer(setup: Setup, conversations: Iterable[Conversation]) -> Iterator[Finding]:
    """What the tokenizer and its stop ids say otherwise than the files. Decoding is compared on the first rows."""
    p, oracle = setup.prompt_format, setup.oracle
    own = oracle.tokenizer
    ends = (own.id_of(oracle.terminator), p.terminator_id)
    # A format that was put together by hand says nothing of the folder's own ends.
    stops = oracle.stop_ids if p.folder is not None or p.eos_ids else frozenset({ends[0]})
    for expected, seen in (({ends[0]}, {ends[1]}), (stops, p.stop_ids)):
        if expected != seen:
            shown = (_listed(ids, own.names) for ids in (expected, seen))
            yield Finding("stop-ids", "", "an answer ends at other tokens than it should", None, False, *shown)
            break
    wrong = [*_names_differ(p, oracle)]
    yield from wrong or islice(_decoding_differs(p, oracle, setup.train_on, [*islice(conversations, SAMPLE)]), 1)


def _listed(ids: frozenset[int] | set[int], names: dict[int, str]) -> str:
    return ", ".join(f"{i} {names.get(i, '')}".strip() for i in sorted(ids))


def _names_differ(p: PromptFormat, oracle: Oracle) -> Iterator[Finding]:
    ours, own = p.tokenizer, oracle.tokenizer
    control = {name: ours.control_id(name) for name in ours.control_names.values()}
    for what, expected, seen in (
        ("control tokens", own.control, control),
        ("tokens", own.vocabulary, {name: i for name, i in ours.tokens.items() if own.rows is None or i < own.rows}),
    ):
        if expected != seen:
            name = min(n for n in expected.keys() | seen if expected.get(n) != seen.get(n))
            shown = (f"{name!r} is {found.get(name, 'none')}" for found in (expected, seen))
            yield Finding("tokenizer", "", f"its {what} are not those of its files", None, False, *shown)
            return
    for what, is_, should in (
        ("BOS and EOS", (ours.bos, ours.eos), (own.bos, own.eos)),
        ("tokens before a text", ours.opening, own.file.opening),
        ("tokens that swallow whitespace", (ours.lstrip, ours.rstrip), (own.lstrip, own.rstrip)),
    ):
        if is_ != should:
            cause = f"its {what} are not those of its files"
            yield Finding("tokenizer", "", cause, expected=str(should), seen=str(is_))


def _decoding_differs(
    p: PromptFormat, oracle: Oracle, train_on: str, rows: Sequence[Conversation]
) -> Iterator[Finding]:
    """Ids that are decoded to another text: of texts, of whole rows, of answers after their prompts."""
    ours, own = p.tokenizer, oracle.tokenizer
    for (text, _), ids in own.encode(
        (text, bare) for text in _TEXTS for bare in (False, own.is_bare(None, True))
    ).items():
        if isinstance(ids, list) and (seen := ours.decode(ids)) != (expected := own.decode(ids)):
            cause = f"it decodes the ids of {text!r} to another text"
            yield Finding("tokenizer", "", cause, expected=repr(expected), seen=repr(seen))
    for row, reference in zip(rows, oracle.references(rows, train_on), strict=True):
        if not isinstance(reference, Reference):
            continue
        ids, at = reference.ids, reference.prompt_length
        whole, prompt = own.decode(ids), own.decode(ids[:at])
        for what, expected, seen in (
            ("ids", whole, ours.decode(ids)),
            ("answer", whole[len(prompt) :], ours.decode_answer(ids[:at], ids[at:])),
        ):
            if expected != seen:
                shown = difference(expected, seen)[1:]
                yield Finding(
                    "tokenizer", row.source, f"it decodes the row's {what} to another text", at, False, *shown
                )
