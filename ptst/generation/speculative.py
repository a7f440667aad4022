"""Speculative decoding with prompt lookup, for a sequence that decodes alone.

Decoding one sequence reads all weights for every token, and a few more tokens cost little more. The draft tokens are
those that followed the sequence's last tokens at an earlier place, in the sequence itself or in one that was answered
just before (Saxena 2023, "Prompt Lookup Decoding"). They are computed along with the newest token and kept as far as
they are what the model itself samples (the principle: Leviathan et al. 2023, arXiv 2211.17192). The answer does not
change: each token is sampled with its own random number, drafted or not.
"""

from collections.abc import Iterable

MAX_DRAFT_TOKENS = 3
MAX_NGRAM = 3  # last tokens to look up; fewer if these do not occur elsewhere
NUM_EARLIER = 8  # finished sequences (prompt and answer) that are searched as well


def draft_tokens(token_ids: list[int], max_tokens: int, earlier: Iterable[list[int]] = ()) -> list[int]:
    """Up to `max_tokens` tokens that followed the latest earlier occurrence of the last tokens; [] if there is none.
    Searches `token_ids` first, then the `earlier` sequences in their order."""
    for n in range(min(MAX_NGRAM, len(token_ids) - 1), 0, -1):
        ngram = token_ids[-n:]
        for sequence in (token_ids, *earlier):
            for i in range(len(sequence) - n - 1, -1, -1):
                if sequence[i] == ngram[0] and sequence[i : i + n] == ngram:
                    return sequence[i + n : i + n + max_tokens]
    return []
