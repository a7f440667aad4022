"""Whether an answer addresses its request, by shared words and the embedded sentence encoder; echoes of the request;
and word salad. It speaks of English.

An answer that shares two content words with its request addresses it; only the others are encoded, and of a long one
only the first content words, because the encoder takes nearly all of the time. docs/judges.md has the data on which the
thresholds were chosen, and what they find on others.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from ptst.errors import Setting
from ptst.evaluation.verdicts import Answered
from ptst.evaluation.word_order import word_salad

SURE = 2  # content words shared with the request: the answer is on its topic
OFF_BELOW = (0.24, 0.14)  # cosine under which an answer is off topic that shares no content word, one
SHORTEST, SHORTEST_CONTENT = 8, 4  # words, content words; of less nothing can be said ("Yes, on Mondays.")
ECHO_COVERS, ECHO_ADDS = 0.8, 0.15  # of the request's content words are repeated; of the answer's are new
PARAPHRASE, PARAPHRASE_LENGTH = 0.8, 1.5  # cosine of a request said in other words; its length in the request's
REQUEST_CHARACTERS, ANSWER_CHARACTERS = 2000, 800  # that are read
ANSWER_WORDS, REQUEST_WORDS = 16, 48  # that are encoded

_WORD = re.compile(r"[^\W_]+")
_ASKS_YES_OR_NO = re.compile(
    r"\s*(?:is|are|was|were|am|do|does|did|has|have|had|can|could|should|would|will|may|must)\b", re.IGNORECASE
)
# Words that say nothing of a topic: function words, and those of requests for anything ("write", "list").
_COMMON_WORDS = """
a about after again all also am an and any are as at be because been before being both but by can could did do does
doing down during each few for from further had has have having he her here hers him his how i if in into is it its
just like may me might more most much must my no nor not now of off on once only or other our out over own same she
should so some such than that the their them then there these they this those through to too under until up use used
uses using very was way ways we well were what when where which while who whom why will with would you your yours don
ll re ve isn doesn didn won let yes sure ok write create explain give provide help tell show describe list article
essay story example examples please want need know get best good new take think say said make made makes making many
first people person thing things someone something step steps following include including important time dear hello hi
answer question sentence text
"""
_COMMON = frozenset(_COMMON_WORDS.split())

Label = Literal["on", "off", "echo", "salad"]


class Encoder(Protocol):
    """Vectors of length 1, float32 [N, E]."""

    def encode(self, texts: list[str]) -> torch.Tensor: ...


@dataclass(frozen=True)
class Topic:
    """What an answer is to its request: on or off its topic, an echo of it, or word salad. `reason`: in a few words.
    `cosine` of the two, None where it was not needed."""

    label: Label
    reason: str
    cosine: float | None = None


class Relevance:
    """`encoder`: by default the embedded one, which is made and loaded at the first use, or before by `prepare`."""

    name = "all-minilm-l6-v2"  # its weights are pinned

    def __init__(self, encoder: Encoder | None = None):
        self._encoder = encoder

    def prepare(self) -> "Relevance":
        """Load the encoder, so that a missing one costs no answers. Raises UserError if it cannot be fetched."""
        self._loaded()
        return self

    def _loaded(self) -> Encoder:
        if self._encoder is None:
            from ptst.evaluation.sentence_encoder import SentenceEncoder, ensure_encoder

            instead = ("use ", Setting("judge"), " with a model of yours, as llama-guard:FOLDER")
            self._encoder = SentenceEncoder(ensure_encoder(instead))
        return self._encoder

    def judge_many(self, answered: Sequence[Answered]) -> list[Topic]:
        """A topic for each (request, answer), in order."""
        pairs = [(request, answer.text) for request, answer in answered]
        topics = {pair: _by_words(*pair) for pair in dict.fromkeys(pairs)}
        unsure = [pair for pair, topic in topics.items() if topic is None]
        cosines = self._cosines(unsure)
        topics |= {pair: _by_cosine(*pair, cosine) for pair, cosine in zip(unsure, cosines, strict=True)}
        return [topic for pair in pairs if (topic := topics[pair])]

    def _cosines(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        if not pairs:
            return []
        requests, answers = ([_ends(r) for r, _ in pairs], [_gist(a) for _, a in pairs])
        row = {text: i for i, text in enumerate(dict.fromkeys([*requests, *answers]))}
        vectors_NE = self._loaded().encode(list(row))
        products = vectors_NE[[row[t] for t in requests]] * vectors_NE[[row[t] for t in answers]]
        return products.sum(-1).tolist()


def _by_words(request: str, answer: str) -> Topic | None:
    """The topic where words alone tell it."""
    if _echoes(request, answer):
        return Topic("echo", "repeats the request")
    if salad := word_salad(answer):
        return Topic("salad", salad)
    asked, said = (content_words(text) for text in (request[:REQUEST_CHARACTERS], answer[:ANSWER_CHARACTERS]))
    if len(said) < SHORTEST_CONTENT and len(answer.split()) < SHORTEST:
        return Topic("on", "too short to be off topic")
    if not asked:  # "Who are you?"
        return Topic("on", "the request names no topic")
    shared = asked & said
    if len(shared) >= SURE and not _as_short(request, answer):
        return Topic("on", f"shares {len(shared)} content words with the request")
    return None


def _by_cosine(request: str, answer: str, cosine: float) -> Topic:
    close = f"cosine {cosine:.2f} with the request"
    again = _as_short(request, answer) and _same_kind(request, answer) and _numbers(answer) <= _numbers(request)
    if cosine >= PARAPHRASE and again:
        return Topic("echo", f"says the request in other words: {close}", cosine)
    shared = len(content_words(request[:REQUEST_CHARACTERS]) & content_words(answer[:ANSWER_CHARACTERS]))
    off = shared < SURE and cosine < OFF_BELOW[shared]
    return Topic("off" if off else "on", close, cosine)


def content_words(text: str) -> set[str]:
    """The distinct words of a text that say something of its topic, cut to their first five letters: no function words,
    no numbers."""
    return {_stem(w) for w in _WORD.findall(text.lower()) if len(w) > 1 and w not in _COMMON and not w[0].isdigit()}


def _stem(word: str) -> str:
    return word[:5] if len(word) > 5 else word.rstrip("s")


def _gist(answer: str) -> str:
    """A short answer as it is; of a longer one its first content words."""
    start = answer[:ANSWER_CHARACTERS]
    words = _WORD.findall(start)
    if len(words) <= ANSWER_WORDS:
        return start
    kept = list(dict.fromkeys(w for w in map(str.lower, words) if w not in _COMMON and len(w) > 1))
    return " ".join(kept[:ANSWER_WORDS]) or start


def _ends(request: str) -> str:
    """The first and the last words of a long request: what is asked may stand at either end."""
    words, half = request.split(), REQUEST_WORDS // 2
    return request if len(words) <= REQUEST_WORDS else " ".join([*words[:half], *words[-half:]])


def _echoes(request: str, answer: str) -> bool:
    """Whether the answer is the request again, perhaps with small changes, and adds next to nothing."""
    if _WORD.findall(request.lower()) == _WORD.findall(answer.lower()):
        return True
    if _ASKS_YES_OR_NO.match(request) and not answer.rstrip().endswith("?"):  # "Cats can see colours."
        return False
    asked, said = content_words(request), content_words(answer)
    if len(asked) < 3 or not _numbers(answer) <= _numbers(request):
        return False
    return len(asked & said) >= ECHO_COVERS * len(asked) and len(said - asked) <= ECHO_ADDS * len(said)


def _numbers(text: str) -> set[str]:
    return set(re.findall(r"\d+", text))


def _as_short(request: str, answer: str) -> bool:
    return len(answer.split()) <= PARAPHRASE_LENGTH * len(request.split())


def _same_kind(request: str, answer: str) -> bool:
    """Whether both ask, or both begin alike, so that the answer may be the request again."""
    first = [next(iter(_WORD.findall(t.lower())), "") for t in (request, answer)]
    return first[0] == first[1] or (request.rstrip().endswith("?") and answer.rstrip().endswith("?"))
