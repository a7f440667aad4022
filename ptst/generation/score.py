"""Log-likelihoods of given answers; the prefix that all prompts share is computed once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ptst.errors import UserError
from ptst.generation.forward import Forward
from ptst.generation.kv_cache import BlockTable, CachedPrefix, KVCache, blocks_for, common_prefix_length
from ptst.generation.multi_lora import Adapter
from ptst.generation.paged_attention import StepAttention
from ptst.generation.request import invalid_tokens
from ptst.generation.sampling import log_probabilities
from ptst.model.decoder import Decoder
from ptst.text.encode import Example

MAX_BATCH_TOKENS = 1024  # per forward pass (one longer example may exceed it)
MAX_LOGITS_ROWS = 128  # in memory at once


def score(decoder: Decoder, examples: Sequence[Example], adapter: Adapter | None = None) -> list[tuple[float, int]]:
    """(summed negative log-likelihood in nats, number of tokens) of each example's trained tokens.

    Every example must begin with at least one token that is not trained.
    """
    rows = token_log_probabilities(decoder, [(e.ids, e.loss_mask) for e in examples], adapter)
    return [(-sum(row), len(row)) for row in rows]


def score_answers(
    decoder: Decoder, pairs: Sequence[tuple[list[int], list[int]]], adapter: Adapter | None = None
) -> list[list[float]]:
    """The log probability of each token of the answer, for pairs of (prompt ids, answer ids).

    Raises UserError for an empty prompt or answer, a pair longer than the model's context, an unknown token.
    """
    c = decoder.config
    for i, (prompt, answer) in enumerate(pairs):
        length = len(prompt) + len(answer)
        if not prompt or not answer:
            raise UserError(f"the {'answer' if prompt else 'prompt'} has no tokens", where=f"pair {i}")
        if length > c.max_positions:
            cause = f"{length} tokens exceed the model's {c.max_positions} positions"
            raise UserError(cause, "leave the pair out", f"pair {i}")
        if invalid := invalid_tokens([*prompt, *answer], c.vocab_size):
            raise UserError(f"token {invalid[0]} is outside 0..{c.vocab_size - 1}", where=f"pair {i}")
    rows = [([*p, *a], [False] * len(p) + [True] * len(a)) for p, a in pairs]
    return token_log_probabilities(decoder, rows, adapter)


@torch.inference_mode()
def token_log_probabilities(
    decoder: Decoder, rows: Sequence[tuple[list[int], list[bool]]], adapter: Adapter | None = None
) -> list[list[float]]:
    """The log probability of every token whose mask is true, for rows of (ids, mask); the first mask must be false."""
    if not rows:
        return []
    forward = Forward(decoder, {"": adapter} if adapter else None)
    ids = [row[0] for row in rows]
    first, last = min(ids), max(ids)  # all others are between them in lexical order and share their common prefix
    # Each row computes the hidden state that predicts its first scored token itself.
    shared = min(common_prefix_length(first, last), min(mask.index(True) for _, mask in rows) - 1)
    batches = _batches([len(row) - shared for row in ids])
    num_blocks = max(sum(blocks_for(len(ids[i])) for i in batch) for batch in batches)
    cache = KVCache(decoder.config, blocks_for(shared) + num_blocks, forward.dtype, forward.device)

    prefix: CachedPrefix | None = None

    def allocate(num_tokens: int) -> BlockTable:
        table = cache.allocate(num_tokens, prefix, shared if prefix else 0)
        assert table is not None, "the cache has space for a whole batch"
        return table

    def compute(tables: list[BlockTable], start: int, parts: list[list[int]]) -> torch.Tensor:
        for table, part in zip(tables, parts, strict=True):
            cache.extend(table, start + len(part))
        tokens_T = torch.tensor([t for part in parts for t in part], device=forward.device)
        positions_T = torch.cat([torch.arange(start, start + len(part)) for part in parts]).to(forward.device)
        prefill = [(table, start, len(part)) for table, part in zip(tables, parts, strict=True)]
        attend = StepAttention(cache, [], prefill, decoder.config)
        return forward(tokens_T, positions_T, attend, [("" if adapter else None, None)])

    if shared:
        table = allocate(shared)
        compute([table], 0, [first[:shared]])
        prefix = cache.cache_prefix(table, first[:shared], None)
        cache.free(table)
    out: list[list[float]] = []
    for batch in batches:
        tables = [allocate(len(ids[i])) for i in batch]
        hidden_TE = compute(tables, shared, [ids[i][shared:] for i in batch])
        places, targets, counts, start = [], [], [], 0
        for i in batch:
            scored = [j for j, flag in enumerate(rows[i][1]) if flag]
            places += [start + j - 1 - shared for j in scored]  # the row of token j - 1 predicts token j
            targets += [ids[i][j] for j in scored]
            counts.append(len(scored))
            start += len(ids[i]) - shared
        hidden_NE = hidden_TE[torch.tensor(places, device=forward.device)]
        targets_N = torch.tensor(targets, device=forward.device)
        chunks = zip(hidden_NE.split(MAX_LOGITS_ROWS), targets_N.split(MAX_LOGITS_ROWS), strict=True)
        logprobs_N = torch.cat([log_probabilities(forward.logits(h_nE), t_n) for h_nE, t_n in chunks])
        out += [part.tolist() for part in logprobs_N.double().split(counts)]
        for table in tables:
            cache.free(table)
    return out


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Indices in order, in batches of at most MAX_BATCH_TOKENS."""
    batches: list[list[int]] = [[]]
    for i, length in enumerate(lengths):
        if batches[-1] and sum(lengths[j] for j in batches[-1]) + length > MAX_BATCH_TOKENS:
            batches.append([])
        batches[-1].append(i)
    return batches
