"""Likelihood of given answers, with the prompts' shared prefix computed once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ptst.errors import UserError
from ptst.generation.adapters import Adapter
from ptst.generation.attend import StepAttention
from ptst.generation.cache import BlockList, Cache, blocks_for, common
from ptst.generation.forward import Forward
from ptst.generation.request import outside
from ptst.generation.sampling import log_probabilities
from ptst.model.decoder import Decoder
from ptst.text.encode import Example

TOKENS = 1024  # computed at once, at most (one longer example may exceed it)
HEAD_ROWS = 128  # whose logits are in memory at once


def score(decoder: Decoder, examples: Sequence[Example], adapter: Adapter | None = None) -> list[tuple[float, int]]:
    """(summed negative log-likelihood in nats, number of tokens) of each example's trained tokens.

    Every example must begin with at least one token that is not trained.
    """
    rows = token_log_probabilities(decoder, [(e.ids, e.loss_mask) for e in examples], adapter)
    return [(-sum(row), len(row)) for row in rows]


def score_answers(
    decoder: Decoder, pairs: Sequence[tuple[list[int], list[int]]], adapter: Adapter | None = None
) -> list[list[float]]:
    """Logarithm of the probability of each token of the answer, for (prompt ids, answer ids).

    Raises UserError for a pair whose prompt or answer is empty, that is longer than the model's context, or with a
    token that the model does not have.
    """
    for i, (prompt, answer) in enumerate(pairs):
        if not prompt or not answer:
            raise UserError(f"pair {i}: the {'answer' if prompt else 'prompt'} has no tokens")
        if len(prompt) + len(answer) > decoder.config.max_positions:
            raise UserError(
                f"pair {i}: {len(prompt) + len(answer)} tokens exceed the model's {decoder.config.max_positions} "
                "positions; leave it out"
            )
        if wrong := outside([*prompt, *answer], decoder.config.vocab_size):
            raise UserError(f"pair {i}: token {wrong[0]} is outside 0..{decoder.config.vocab_size - 1}")
    rows = [([*p, *a], [False] * len(p) + [True] * len(a)) for p, a in pairs]
    return token_log_probabilities(decoder, rows, adapter)


@torch.inference_mode()
def token_log_probabilities(
    decoder: Decoder, rows: Sequence[tuple[list[int], list[bool]]], adapter: Adapter | None = None
) -> list[list[float]]:
    """Logarithm of the probability of every flagged token, for rows of (ids, flags); the first flag must be false."""
    if not rows:
        return []
    forward = Forward(decoder, {"": adapter} if adapter else None)
    adapters = [("" if adapter else None, None)]
    ids = [r[0] for r in rows]
    low, high = min(ids), max(ids)  # in lexical order all others lie between
    # The hidden state that predicts the first flagged token must be computed for every row itself.
    first = min(flags.index(True) for _, flags in rows)
    shared = min(common(low, high), first - 1)
    batches: list[list[int]] = [[]]
    for i, row in enumerate(ids):
        if batches[-1] and sum(len(ids[j]) - shared for j in batches[-1]) + len(row) - shared > TOKENS:
            batches.append([])
        batches[-1].append(i)
    largest = max(sum(blocks_for(len(ids[i])) for i in batch) for batch in batches)
    cache = Cache(decoder.config, blocks_for(shared) + largest, forward.dtype, forward.device)

    def compute(sequences: list[BlockList], start: int, parts: list[list[int]]) -> torch.Tensor:
        for s, part in zip(sequences, parts, strict=True):
            cache.grow(s, start + len(part))
        tokens_T = torch.tensor([t for part in parts for t in part], device=forward.device)
        positions_T = torch.cat([torch.arange(start, start + len(part)) for part in parts]).to(forward.device)
        reading = [(s, start, len(part)) for s, part in zip(sequences, parts, strict=True)]
        return forward(tokens_T, positions_T, StepAttention(cache, [], reading, decoder.config), adapters)

    beginning = None
    if shared:
        sequence = cache.admit(shared)
        compute([sequence], 0, [low[:shared]])
        beginning = cache.keep(sequence, low[:shared], None)
        cache.release(sequence)
    out: list[list[float]] = []
    for batch in batches:
        sequences = [cache.admit(len(ids[i]), beginning, shared) for i in batch]
        hidden_TE = compute(sequences, shared, [ids[i][shared:] for i in batch])
        places, targets, at = [], [], 0
        for i in batch:
            flagged = [j for j, flag in enumerate(rows[i][1]) if flag]
            # Row j - 1 of an example predicts its token j.
            places += [at + j - 1 - shared for j in flagged]
            targets += [ids[i][j] for j in flagged]
            at += len(ids[i]) - shared
        hidden_NE = hidden_TE[torch.tensor(places, device=forward.device)]
        targets_N = torch.tensor(targets, device=forward.device)
        parts = zip(hidden_NE.split(HEAD_ROWS), targets_N.split(HEAD_ROWS), strict=True)
        logprobs_N = torch.cat([log_probabilities(forward.logits(h_nE), t_n) for h_nE, t_n in parts])
        counts = [sum(rows[i][1]) for i in batch]
        out += [part.tolist() for part in logprobs_N.double().split(counts)]
        for s in sequences:
            cache.release(s)
    return out
