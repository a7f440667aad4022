"""Guesses at what comes next, for a request that is answered alone.

Decoding one answer costs the reading of all weights for every token, and several tokens cost little more. What followed
the last tokens where they stood before, in this prompt and answer or in the ones just before it, is therefore computed
along with the newest token, and kept as far as it is what the model says itself (Saxena 2023, "Prompt Lookup Decoding";
Leviathan et al. 2023, arXiv 2211.17192, for the principle). The answer is the one that it would have been: each token
is drawn with its own random number, guessed or not.
"""

from __future__ import annotations

from collections.abc import Iterable

DRAFT = 3  # tokens guessed at most
LONGEST = 3  # tokens of the end that are looked up, fewer if they stand nowhere else
EARLIER = 8  # prompts with their answers that are looked through besides


def draft(ids: list[int], most: int, earlier: Iterable[list[int]] = ()) -> list[int]:
    """What followed the last place at which the end of `ids` stood before, `most` tokens of it; [] if nowhere. The
    `earlier` texts are looked through in their order, after `ids`."""
    for n in range(min(LONGEST, len(ids) - 1), 0, -1):
        end = ids[-n:]
        for text in (ids, *earlier):
            for i in range(len(text) - n - 1, -1, -1):
                if text[i] == end[0] and text[i : i + n] == end:
                    return text[i + n : i + n + most]
    return []
