"""What goes into the engine and what comes out. Imports no torch."""

import random
from dataclasses import dataclass, field

from ptst.errors import Setting, UserError
from ptst.generation.stop_strings import Decode

MAX_TOP_LOGPROBS = 100

NOT_A_NUMBER = "the model's output is not a number"  # the error of an answer


@dataclass(frozen=True)
class Sampling:
    """How an answer is sampled. Temperature 0 is greedy decoding.

    `top_k` keeps the k most likely tokens (0: all), then `top_p` the smallest set of those that holds this share of
    their probability. The answer ends before the first of `stop_strings`. `logprobs` asks for each token's log
    probability under the model itself (temperature 1, all tokens), `top_logprobs` for the so many most likely tokens at
    its place. Raises UserError for a value out of range."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int = 0
    stop_strings: tuple[str, ...] = ()
    logprobs: bool = False
    # Changes no answer, so it is not in the text of the settings, by which stored answers are found again.
    top_logprobs: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise _out_of_range("max_new_tokens", self.max_new_tokens, "at least 1")
        if self.temperature and not 1e-5 <= self.temperature < float("inf"):
            raise _out_of_range("temperature", self.temperature, "at least 0.00001, or 0 for greedy answers")
        if not 0 < self.top_p <= 1:
            raise _out_of_range("top_p", self.top_p, "above 0 and at most 1")
        if self.top_k < 0:
            raise _out_of_range("top_k", self.top_k, "at least 1, or 0 for all tokens")
        if not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
            raise _out_of_range("top_logprobs", self.top_logprobs, f"at least 0 and at most {MAX_TOP_LOGPROBS}")
        if isinstance(self.stop_strings, str) or not all(isinstance(s, str) and s for s in self.stop_strings):
            raise _out_of_range("stop_strings", repr(self.stop_strings), "a tuple of strings, none of them empty")

    def generator(self, draw: str | int) -> random.Random:
        """The source of a request's uniform random numbers; it depends on (seed, draw) and nothing else."""
        # Python's generator is seeded by the whole text; torch's CPU generator would use 32 bits of a number.
        return random.Random(f"{self.seed}:{draw}")


@dataclass(frozen=True)
class EngineOptions:
    """How the engine works; affects speed and memory, not results. Raises UserError for a value out of range.

    `batch_size`: maximum number of concurrent sequences (None: 256 on a GPU, 64 on a CPU).
    `max_length`: maximum length of a prompt with its answer, in tokens (None: the model's context). Memory is planned
    for `batch_size` sequences of this length and one cached prefix; a request that does not fit is refused.
    `kv_memory`: size of the KV cache in bytes (None: what the plan needs, but at most a share of the free memory).
    `max_prefill_tokens`: maximum number of prompt tokens per step.
    `prefix_caching`: compute a prefix that several prompts share only once."""

    batch_size: int | None = None
    max_length: int | None = None
    kv_memory: int | None = None
    max_prefill_tokens: int = 512
    prefix_caching: bool = True

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_prefill_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise _out_of_range(name, value, "at least 1")


def _out_of_range(name: str, value: object, wanted: str) -> UserError:
    return UserError((Setting(name), f" is {value}"), f"it must be {wanted}")


@dataclass(frozen=True)
class Request:
    """A prompt to answer. Its answer depends on `prompt`, `sampling`, `adapter`, `draw` and what ends it, on nothing
    else.

    `adapter` names one of the engine's adapters; None is the decoder as it is. `keep_cached`: the keys and values of
    prompt and answer stay in the prefix cache, so that the next turn of a conversation computes only its new tokens.
    `draw`: which of the sampling's sequences of random numbers (None: that of the `id`); the same prompt with the same
    seed and draw is answered alike. `stop_ids`, `decode`, `stream`: instead of the engine's own (None), where prompts
    of several templates share it."""

    prompt: list[int]
    sampling: Sampling = field(default_factory=Sampling)
    id: str | int = 0
    adapter: str | None = None
    keep_cached: bool = False
    draw: str | int | None = None
    stop_ids: frozenset[int] | None = None
    decode: Decode | None = None
    stream: bool | None = None

    @property
    def random_numbers(self) -> random.Random:
        """The source of its random numbers."""
        return self.sampling.generator(self.id if self.draw is None else self.draw)


def invalid_tokens(token_ids: list[int], vocab_size: int) -> list[int]:
    """Those of `token_ids` that are not in the vocabulary."""
    return [t for t in token_ids if not (hasattr(t, "__index__") and 0 <= t < vocab_size)]


TopLogprobs = list[tuple[int, float]]  # (token id, log probability), the likeliest first


# Finish reasons of a model behind an API that answered without answering, each with what happened.
FILTERED, REFUSED = "content_filter", "refusal"
DECLINED = {
    FILTERED: "stopped by the endpoint's content filter",
    REFUSED: "declined in the refusal field of the API",
}


@dataclass(frozen=True)
class Answer:
    """What the model answered to one prompt; the only type of answers, from the engine to the results.

    `token_ids` are without the stop token; a model behind an API has none. `text` ends before the stop string, which
    `token_ids` may reach into; it is empty where the engine has no `decode`. `finish_reason`: "stop" (a stop token),
    "length" (the token limit), "stop_string", "cancelled" or "error"; of a model behind an API, what the endpoint says,
    or one of `DECLINED`. `logprobs` has one value per token id where `Sampling.logprobs` asks for them, `top_logprobs`
    the most likely (token id, log probability) at each, the likeliest first, where `Sampling.top_logprobs` does.
    `error` says what went wrong where `finish_reason` is "error". `num_cached_tokens`: those of the prompt that were in
    the prefix cache."""

    token_ids: list[int]
    text: str
    finish_reason: str
    logprobs: list[float] | None = None
    error: str | None = None
    top_logprobs: list[TopLogprobs] | None = None
    num_cached_tokens: int = field(default=0, compare=False)

    @property
    def truncated(self) -> bool:
        """Whether the token limit ended the answer."""
        return self.finish_reason == "length"


@dataclass(frozen=True)
class Event:
    """Progress of one request: its new tokens, the text that they make certain, and the answer once it is finished.
    `logprobs` and `top_logprobs` are those of the new tokens, as in `Answer`."""

    id: str | int
    token_ids: list[int]
    text: str
    answer: Answer | None = None
    logprobs: list[float] | None = None
    top_logprobs: list[TopLogprobs] | None = None


@dataclass
class Statistics:
    """Counts since the engine was created."""

    answers: int = 0  # finished, cancelled and failed ones included
    tokens: int = 0  # generated
    prompt_tokens: int = 0  # computed
    cached_tokens: int = 0  # prompt tokens taken from the prefix cache
    steps: int = 0
    seconds: float = 0.0  # spent in steps
    blocks_peak: int = 0  # of the KV cache, in use

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def progress(self, total: int | None = None) -> str:
        """`120 tokens/s, ETA 1:05` for `total` answers, assuming that the rest takes as long as those so far."""
        rate = f"{self.tokens_per_second:.0f} tokens/s"
        if total is None or not self.answers:
            return rate
        left = round(self.seconds / self.answers * max(0, total - self.answers))
        return f"{rate}, ETA {left // 60}:{left % 60:02d}"
