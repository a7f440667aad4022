"""Word salad in English: words that are not in an order, or that no grammar holds together.

Two signs, both of function words ("the", "of", "is"), which are 30 to 60 % of English prose:
- pairs that grammar forbids ("the of", "to is"): shuffled words have many, prose, lists and poems next to none;
- long runs of words with neither a function word nor a mark between them: text drawn at a high temperature.
docs/judges.md has what they find and their false alarms.
"""

import re
from collections.abc import Iterator

MAX_CHARACTERS = 1200  # of an answer that are read
FORBIDDEN_SHARE, FORBIDDEN_LEAST = 0.025, 2  # of the pairs of adjacent words, and their number
RUN, RUN_SHARE, RUN_LEAST = 8, 0.4, 20  # words of a run; share of all words that are in such runs; words there must be
DISTINCT_SHARE = 0.9  # of the words, where runs count: every language repeats its function words, random words do not

_BETWEEN = re.compile(r"[^\w\s'\u2019]+|_+|\n+")  # marks that end a phrase
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")

_DETERMINERS = "the a an my your its our their every"
_PREPOSITIONS = "of to in on at by for with from into about"
_CONJUNCTIONS = "and or but"
_BE = "is are was were be"
_MODALS = "would could should"  # the others are nouns and months, too
_SUBJECTS = "i he she they we"
_VERBS = "is are was were am do does did has have had would could should"
FORBIDDEN = frozenset(
    (first, second)
    for firsts, seconds in (
        (_DETERMINERS, f"{_DETERMINERS} {_PREPOSITIONS} and or but if because {_BE} {_VERBS} than then his her"),
        (_DETERMINERS, "he she they we i him them me which that this these those when where while as so not there it"),
        ("of", f"of to on at by for from with and or but {_BE} {_VERBS} will can may i he she they we if"),
        ("to", f"of to at by for from with or but is are was were has had will can may {_SUBJECTS} am did does"),
        ("in on at by for with from into about", f"of but {_BE} {_VERBS} can she they we"),
        (_CONJUNCTIONS, "and or but"),
        (_BE, f"is are was were has have had do does did {_MODALS} will can or but"),
        (_MODALS, f"{_MODALS} is are was were am has had does did of a an our their his to with for from will can may"),
        (_SUBJECTS, "of the a an i he she they we my our"),
    )
    for first in firsts.split()
    for second in seconds.split()
) - {("a", "while"), ("the", "while"), ("the", "then"), ("or", "or"), ("to", "or"), ("i", "i")}
# Capitals of these open a sentence, so they do not follow a small word within a phrase.
_OPENING_WORDS = "the a an in on at by for with from and but if it he she they we this that these to you your is"
_OPENS = frozenset(_OPENING_WORDS.split())
_OTHERS = """
this that these those his her as if because when while where which who what how than then there been being not no it
you him them us me some any all each other such up out over under through between after before more most so just also
only very might must will can may i'm i've i'll it's don't doesn't can't isn't you're we're they're that's let's
"""
_FUNCTION = frozenset(
    f"{_DETERMINERS} {_PREPOSITIONS} {_CONJUNCTIONS} {_BE} {_MODALS} {_SUBJECTS} {_VERBS} {_OTHERS}".split()
)


def word_salad(text: str) -> str | None:
    """Why a text is word salad, or None. Reads its first 1200 characters. It speaks of English."""
    phrases = list(_phrases(text[:MAX_CHARACTERS]))
    words = [word.lower() for phrase in phrases for word in phrase]
    pairs = sum(len(phrase) - 1 for phrase in phrases)
    forbidden = sum(
        _forbidden(*three) for phrase in phrases for three in zip(phrase, phrase[1:], [*phrase[2:], ""], strict=False)
    )
    if forbidden >= FORBIDDEN_LEAST and forbidden >= FORBIDDEN_SHARE * pairs:
        return f"words in no order: {forbidden} of {pairs} pairs are not English"
    in_runs = sum(run for phrase in phrases for run in _runs(phrase) if run >= RUN)
    grammarless = in_runs >= RUN_SHARE * len(words) and len(set(words)) >= DISTINCT_SHARE * len(words)
    if len(words) >= RUN_LEAST and grammarless:
        return f"words without grammar: {in_runs} of {len(words)} in runs without a function word"
    return None


def _phrases(text: str) -> Iterator[list[str]]:
    """The words between two marks or line ends."""
    for phrase in _BETWEEN.split(text.replace("\u2019", "'")):
        if words := _WORD.findall(phrase):
            yield words


def _forbidden(first: str, second: str, third: str) -> bool:
    """Whether `second` cannot follow `first`. Before a third word in capitals it may begin a title ("like The Office"),
    and a capital A may be a name ("packet A is")."""
    if (first.lower(), second.lower()) in FORBIDDEN:
        return first != "A"
    return first.islower() and second.istitle() and second.lower() in _OPENS and third.islower()


def _runs(words: list[str]) -> Iterator[int]:
    """Lengths of runs without a function word."""
    run = 0
    for word in words:
        if word.lower() in _FUNCTION:
            yield run
            run = 0
        else:
            run += 1
    yield run
