r"""ARC's choice out of an answer by two rules.

The paper takes the text after "The answer is:" up to the first character that is not a letter, digit, space or
underscore, and compares without case and punctuation (Lyu et al. 2024, appendix F). It can never accept "long-term" or
"1.5 m", so a second rule finds which of the choices the answer names, by its text or by its letter or number:

    The answer is: the Moon    The correct answer is B    Answer: (B)    \boxed{B}    B is correct    and in their place
    the Moon   B   (B)   [B]   B.   b)   Option B   answer2   2   B. the Moon   B) the Moon   the Moon (B)   **B**

A letter or number alone on an answer's first or last line names a choice, too; a choice's text needs the words before
it. Two letters, and a letter beside the text of another choice, name nothing; nor does the article in "a planet".
"""

import re
import unicodedata
from collections.abc import Callable, Sequence

_PRINTED = re.compile(r"The answer is: ?[^\w\s]?([a-zA-Z0-9_ ]*)[^\w\s]?")
_MARKS = re.compile(r"(?<![\w*`])[*_`]+|[*_`]++(?!\w)")  # not the ** of 2**3 and the _ of 1_000
_LATEX = re.compile(r"\\(?:boxed|fbox|text\w*|math\w*)\s*\{((?:[^{}]|\{,\})*)\}")

_ASKED = re.compile(r"the answer is[*_]*[ \t]*:[*_]*\s*", re.IGNORECASE)
_CLAIM = re.compile(
    r"""
    (?:\b(?:the|my)[ ]|^[ \t>#*_-]*) (?: (?:correct|right|best|final|proper|likely|most[ ]\w+) [ ] ){0,3}
    (?:answer|choice|option|response) (?:[ ](?:choice|option|letter|here))? (?:[ ]to[ ]th(?:e|is)[ ]question)?
    [ ] (?:is|would[ ]be|should[ ]be|must[ ]be) (?:[ ](?:(?:most[ ])?likely|probably|clearly|thus|therefore|indeed))?
    (?: [*_]*[ \t]*:[*_]*\s* | [*_]*\s+ )
  | ^[ \t>#*_-]* (?:(?:the|my)[ ])? (?:(?:correct|right|best|final)[ ])?
    (?:answer|choice|option) (?:[ ](?:choice|option))? [*_]*[ \t]*: [*_]*\s*
  | \\boxed\s*\{ (?P<boxed> (?:[^{}\n]|\{[^{}\n]*\}){1,300} ) \}
  | (?:^|(?<=[.!?:,]\s)) (?:(?:so|thus|hence|therefore),?[ ])? (?P<before> [^.,:;!?\n]{1,200}? ) [*_]*
    [ ]is[ ] (?: the[ ]answer | (?:the[ ])?(?:most[ ])?(?:correct|right|best)(?:[ ](?:answer|choice|option|response))? )
    (?= [*_]* (?: [.!] | [ \t]*[\r\n] | \s*\Z | ,?[ ](?:because|since)\b ) )
    """,
    re.VERBOSE | re.IGNORECASE | re.MULTILINE,
)
_DENIED = re.compile(r"(?:\b(?:not|never|if|whether|unless|doubt|why)\b|n['\u2019]t\b)[^.!?;,:\n]*$", re.IGNORECASE)

_LABEL = re.compile(
    r"(?P<word>(?i:(?:the\s+)?(?:option|choice|letter|answer)\s*))?(?P<open>[(\[{<\"'\u201c\u2018]*)\s*"
    r"(?P<label>[A-Za-z]|[1-9])\s*(?P<close>[)\]}>\"'\u201d\u2019.:,;!?\u2013\u2014-]*)(?=\W|$)(?P<rest>.*)",
    re.DOTALL,
)
_LABEL_BEHIND = re.compile(r"(?P<text>.*\S)\s*[(\[](?i:option |choice )?(?P<label>[A-Za-z]|[1-9])[)\]][.!]?")
_REASON = re.compile(r"\s*(?:because|since)\b")
_JOINED = re.compile(
    r"(?:\b(?:and|or|nor)\b|[,;/&+])\s*(?:option |choice )?[(\[]?(?:[A-Z]\b(?! [a-z])|[1-9]\b|[a-z]\))"
)
_ONE_LETTER = re.compile(r"\W*[A-Za-z]\W*")
_NUMBER_WORD = re.compile(r"\d|\b(?:zero|one|two|three|four|five|six|seven|eight|nine|ten)\b", re.IGNORECASE)


def printed_choice(text: str) -> str | None:
    """The answer by the paper's regular expression as printed, normalized; None where it does not match."""
    found = _PRINTED.search(text)
    return plain(found[1]) if found else None


def chosen_choice(text: str, choices: Sequence[str]) -> int | None:
    """Index of the choice that the answer names, or None.

    What follows the last "The answer is:", the form that is asked for, decides; without it the last other form that
    names a choice. A choice's text stands alone on its line or sentence. Case and punctuation are ignored unless
    choices differ in nothing else ("+2" and "-2").
    """
    reach = 200 + 2 * max(map(len, choices))  # no choice ends beyond: long lines take no time
    if asked := list(_ASKED.finditer(text)):
        return _named(text[asked[-1].end() :][:reach], choices)
    for claim in reversed(list(_CLAIM.finditer(text))):
        if _DENIED.search(text[max(0, claim.start() - 200) : claim.start()]):
            continue
        said = claim["boxed"] or claim["before"] or text[claim.end() :][:reach]
        if (named := _named(said, choices, alone=claim["before"] is not None)) is not None:
            return named
    each = [_by_place(_bare(line[:reach]), choices, alone=True) for line in text.splitlines() if line.strip()]
    ends = {named for named in (each[:1] + each[-1:]) if named is not None}
    return ends.pop() if len(ends) == 1 and len({named for named in each if named is not None}) == 1 else None


def plain(text: str) -> str:
    """Without case, punctuation and extra spaces."""
    kept = "".join(c for c in text.casefold() if unicodedata.category(c)[0] not in "PS")
    return " ".join(kept.split())


def unwrapped(text: str) -> str:
    r"""Without bold, code and LaTeX around what is written: `**B**`, `$\boxed{\text{B}}$`, `\(42\)`."""
    for _ in range(3):
        text = _LATEX.sub(r"\1", text)
    text = re.sub(r"\\[()\[\]]", "", text)
    return _MARKS.sub("", text).strip()


def _named(line: str, choices: Sequence[str], alone: bool = False) -> int | None:
    """The choice that the first line names at its beginning: with text behind it, unless it must stand `alone`."""
    line = re.split(r"[\r\n]", line.lstrip("\r\n"), maxsplit=1)[0].strip()
    for said in (line, _bare(line)):
        if (found := _by_text(said, choices, alone)) is not None:
            return found
    return _by_place(_bare(line), choices, alone)


def _bare(line: str) -> str:
    return unwrapped(line).strip(" $")


def _by_text(line: str, choices: Sequence[str], alone: bool) -> int | None:
    cuts = [] if alone else [m.start() for m in re.finditer(r"[.!?;](?=[\s\"'*)]|$)|[*][*]", line)]
    spellings: tuple[Callable[[str], str], ...] = (plain, _spelling)
    for end in [len(line), *reversed(cuts)]:  # the longest first: a choice may contain a full stop
        for spelled in spellings:
            said = spelled(line[:end])
            named = [i for i, choice in enumerate(choices) if spelled(choice) == said]
            if len(named) == 1:
                return named[0]
    return None


def _by_place(line: str, choices: Sequence[str], alone: bool) -> int | None:
    """The choice named by its letter or number, with or without its text."""
    if behind := _LABEL_BEHIND.fullmatch(line):
        index = _index(behind["label"])
        if _by_text(behind["text"], choices, alone=True) == index:
            return index
    found = _LABEL.fullmatch(line)
    if found is None or (index := _index(found["label"])) >= len(choices):
        return None
    label, rest = found["label"], found["rest"].strip()
    marked = bool(re.search(r"[)\]}>:.!\u2013\u2014-]", found["close"]))
    if label == "a" and not (marked or found["open"] or found["word"]):  # the article
        return None
    if rest and (named := _by_text(rest, choices, alone=False)) is not None:
        behind_it = [_by_place(part, choices, alone=True) for part in re.split(r"(?<=[.;])\s+", rest)[1:]]
        return index if {named, *behind_it} <= {index, None} else None
    if not found["word"]:  # else "Option 2" cannot be meant otherwise
        ambiguous = _NUMBER_WORD.search if label.isdigit() else _ONE_LETTER.fullmatch
        if any(ambiguous(choice) for choice in choices):
            return None
    if not rest or _REASON.match(rest):
        return index
    sentence = re.split(r"[.!?](?=\s|$)", rest, maxsplit=1)[0]
    words = f" {plain(sentence)} "
    own, *others = (f" {plain(choice)} " for choice in (choices[index], *choices[:index], *choices[index + 1 :]))
    after = words.removeprefix(own.rstrip()) if words.startswith(own) else ""  # "B. The Moon is nearer than Mars"
    if after and not after.startswith((" or ", " and ", " nor ", *others)):
        others = []
    return index if marked and not (alone or any(o in words for o in others) or _JOINED.search(sentence)) else None


def _index(label: str) -> int:
    return int(label) - 1 if label.isdigit() else ord(label.lower()) - ord("a")


def _spelling(text: str) -> str:
    """As written, without extra spaces and the punctuation around an answer."""
    return " ".join(text.split()).strip(" \"'*_`.!?")
