"""How many tokens a row has for the endpoint: counted with OpenAI's own tokenizer, or an upper bound that says so.

The package tiktoken fetches a model's vocabulary once, from the net. Without it, without that, or for a model that it
does not know, a text has at most as many tokens as UTF-8 bytes: each token of a byte-level vocabulary is at least one.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

# Of the chat format, as OpenAI's cookbook counts them.
PER_MESSAGE = 3
PER_ROW = 3
PATIENCE = 20.0  # seconds for the vocabulary to arrive
_BOUND = "an upper bound, one token a byte"


@dataclass(frozen=True)
class TokenCounter:
    """`name`: how it counts, in words. `exact`: not only an upper bound. `texts`: the tokens of each text."""

    name: str
    exact: bool
    texts: Callable[[Sequence[str]], list[int]]

    def rows(self, rows: Sequence[Sequence[dict[str, Any]]]) -> list[int]:
        """The tokens of each row's messages, with what the chat format adds."""
        counts = iter(self.texts([m[key] for messages in rows for m in messages for key in ("role", "content")]))
        return [PER_ROW + sum(PER_MESSAGE + next(counts) + next(counts) for _ in messages) for messages in rows]


def find_counter(model: str) -> TokenCounter:
    """The best counter that there is for a model."""
    if find_spec("tiktoken") is None:
        return _bound("the package tiktoken is not installed")
    import tiktoken

    try:
        name = tiktoken.encoding_name_for_model(model)
    except KeyError:
        return _bound(f"tiktoken does not know {model}")
    encoding = load_encoding(name)
    if encoding is None:
        return _bound(f"tiktoken could not load {name}")
    return TokenCounter(f"tiktoken {name}", True, lambda texts: list(map(len, encoding.encode_ordinary_batch(texts))))


def load_encoding(name: str) -> Any:
    """An encoding of tiktoken; None where its vocabulary cannot be had. It is fetched without a limit of time, so that
    it gets one here."""
    import tiktoken

    found: list[Any] = []

    def load() -> None:
        try:
            found.append(tiktoken.get_encoding(name))
        except Exception:  # of the network, of a proxy, of a damaged cache: there is no vocabulary
            found.append(None)

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return found[0] if found else None


def _bound(why: str) -> TokenCounter:
    return TokenCounter(f"{_BOUND}, since {why}", False, lambda texts: [len(text.encode()) for text in texts])
