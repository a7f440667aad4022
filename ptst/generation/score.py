"""Log-likelihoods of given answers; the prefix that all rows share is computed once."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from ptst.errors import UserError
from ptst.generation.forward import Forward
from ptst.generation.kv_cache import BlockTable, CachedPrefix, KVCache, blocks_for, common_prefix_length
from ptst.generation.multi_lora import Adapter
from ptst.generation.paged_attention import StepAttention
from ptst.generation.request import TopLogprobs, invalid_tokens
from ptst.generation.sampling import log_probabilities, top_log_probabilities
from ptst.kernels.transfer import to_device
from ptst.model.config import DecoderConfig
from ptst.model.decoder import Decoder

MAX_BATCH_TOKENS = 1024  # per forward pass (one longer example may exceed it)
MAX_LOGITS_ROWS = 128  # in memory at once
Watch = Callable[[int], AbstractContextManager[None]]


def _unwatched(_tokens: int) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True)
class Scored:
    """Of a row's scored tokens, in order: the log probability (nats) of each, and the likeliest tokens at its place."""

    logprobs: list[float]
    top_logprobs: list[TopLogprobs] = field(default_factory=list)


def token_log_probabilities(
    decoder: Decoder,
    rows: Sequence[tuple[list[int], list[bool]]],
    adapter: Adapter | None = None,
    watch: Watch = _unwatched,
) -> list[list[float]]:
    """The log probability (nats) of every token whose mask is true, for rows of (ids, mask). Raises as `score`."""
    return [scored.logprobs for scored in score(decoder, rows, adapter, watch)]


def score(
    decoder: Decoder,
    rows: Sequence[tuple[list[int], list[bool]]],
    adapter: Adapter | None = None,
    watch: Watch = _unwatched,
    top_logprobs: int = 0,
) -> list[Scored]:
    """What the model makes of every token whose mask is true, for rows of (ids, mask), with the `top_logprobs` most
    likely tokens at its place. `watch` is entered for every batch, with its number of tokens. Raises UserError for a
    row that does not begin with a masked-out token or has nothing to score, that is longer than the model's context, or
    with a token outside the vocabulary."""
    check_rows(decoder.config, rows)
    if not rows:
        return []
    forward = Forward(decoder, {"": adapter} if adapter else None)
    batches = score_batches(forward, rows, "" if adapter else None, watch, top_logprobs)
    return [scored for batch in batches for scored in batch]


@torch.inference_mode()
def score_batches(
    forward: Forward,
    rows: Sequence[tuple[list[int], list[bool]]],
    adapter: str | None = None,
    watch: Watch = _unwatched,
    top_logprobs: int = 0,
) -> Iterator[list[Scored]]:
    """The same of rows that `check_rows` has passed, in order, one forward pass after the other, so that other work can
    be done in between. `adapter`: one of the forward's."""
    ids = [row[0] for row in rows]
    # Each row computes the hidden state that predicts its first scored token itself.
    shared = min(shared_prefix(ids), min(mask.index(True) for _, mask in rows) - 1)
    for batch, hidden_TE in hidden_states(forward, ids, shared, adapter, watch):
        if not batch:
            continue  # the prefix, of which nothing is scored
        places, targets, counts = _scored([rows[i] for i in batch], shared)
        hidden_NE = hidden_TE[to_device(places, forward.device)]
        targets_N = to_device(targets, forward.device)
        logprobs, top = _logprobs(forward, hidden_NE, targets_N, top_logprobs)
        ends = list(accumulate(counts))
        spans = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
        yield [Scored(logprobs[span], top[span]) for span in spans]


def shared_prefix(ids: Sequence[list[int]]) -> int:
    """Tokens that all rows begin with."""
    return common_prefix_length(min(ids), max(ids))  # all others are between them in lexical order and share theirs


@torch.inference_mode()
def hidden_states(
    forward: Forward, ids: Sequence[list[int]], shared: int, adapter: str | None = None, watch: Watch = _unwatched
) -> Iterator[tuple[list[int], Tensor]]:
    """Hidden states after the final norm, batch by batch: indices of rows, in order, and the states (T, E) of what
    follows their `shared` first tokens, one row after the other. These `shared` tokens are computed once; where there
    are any, theirs come first, with no indices."""
    batches = _batches([len(row) - shared for row in ids])
    num_blocks = max(sum(blocks_for(len(ids[i])) for i in batch) for batch in batches)
    cache = KVCache(forward.config, blocks_for(shared) + num_blocks, forward.dtype, forward.device)

    prefix: CachedPrefix | None = None

    def allocate(num_tokens: int) -> BlockTable:
        table = cache.allocate(num_tokens, prefix, shared if prefix else 0)
        assert table is not None, "the cache has space for a whole batch"
        return table

    def compute(tables: list[BlockTable], start: int, parts: list[list[int]]) -> torch.Tensor:
        for table, part in zip(tables, parts, strict=True):
            cache.extend(table, start + len(part))
        tokens_T = to_device([t for part in parts for t in part], forward.device)
        positions_T = to_device([p for part in parts for p in range(start, start + len(part))], forward.device)
        prefill = [(table, start, len(part)) for table, part in zip(tables, parts, strict=True)]
        attend = StepAttention(cache, [], prefill, forward.config, forward.head_norms)
        return forward(tokens_T, positions_T, attend, [(adapter, None)])

    if shared:
        first = ids[0][:shared]
        table = allocate(shared)
        hidden_SE = compute([table], 0, [first])
        prefix = cache.cache_prefix(table, first, None)
        cache.free(table)
        yield [], hidden_SE
    for batch in batches:
        tables = [allocate(len(ids[i])) for i in batch]
        parts = [ids[i][shared:] for i in batch]
        with watch(sum(map(len, parts))):
            hidden_TE = compute(tables, shared, parts)
        yield batch, hidden_TE
        for table in tables:
            cache.free(table)


def _logprobs(forward: Forward, hidden_NE: Tensor, targets_N: Tensor, k: int) -> tuple[list[float], list[TopLogprobs]]:
    """Of each row, the log probability of its target, and its k most likely tokens."""
    logprobs, top = list[float](), list[TopLogprobs]()
    for h_nE, t_n in zip(hidden_NE.split(MAX_LOGITS_ROWS), targets_N.split(MAX_LOGITS_ROWS), strict=True):
        logits_nV = forward.logits(h_nE)
        logprobs += log_probabilities(logits_nV, t_n).double().tolist()
        if k:
            ids, values = (each.tolist() for each in top_log_probabilities(logits_nV, k))
            top += [list(zip(*pair, strict=True)) for pair in zip(ids, values, strict=True)]
    return logprobs, top


def _scored(rows: Sequence[tuple[list[int], list[bool]]], shared: int) -> tuple[list[int], list[int], list[int]]:
    """Of a batch without its shared prefix: places that predict a scored token, these tokens, their number by row."""
    places, targets, counts, start = [], [], [], 0
    for token_ids, mask in rows:
        scored = [j for j, flag in enumerate(mask) if flag]
        places += [start + j - 1 - shared for j in scored]  # the row of token j - 1 predicts token j
        targets += [token_ids[j] for j in scored]
        counts.append(len(scored))
        start += len(token_ids) - shared
    return places, targets, counts


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Indices in order, in batches of at most MAX_BATCH_TOKENS."""
    batches: list[list[int]] = [[]]
    for i, length in enumerate(lengths):
        if batches[-1] and sum(lengths[j] for j in batches[-1]) + length > MAX_BATCH_TOKENS:
            batches.append([])
        batches[-1].append(i)
    return batches


def check_rows(config: DecoderConfig, rows: Sequence[tuple[list[int], list[bool]]]) -> None:
    """Raise UserError for a row that cannot be scored, as `score` says."""
    for i, (token_ids, mask) in enumerate(rows):
        if not any(mask) or mask[0]:
            raise UserError(f"the {'prompt' if any(mask) else 'answer'} has no tokens", where=f"row {i}")
        if len(token_ids) > config.max_positions:
            cause = f"{len(token_ids)} tokens exceed the model's {config.max_positions} positions"
            raise UserError(cause, where=f"row {i}")
        if invalid := invalid_tokens(token_ids, config.vocab_size):
            raise UserError(f"token {invalid[0]} is outside 0..{config.vocab_size - 1}", where=f"row {i}")
