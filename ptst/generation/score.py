"""Likelihood of given answers, with the prompts' common beginning computed once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kernels.linear_cross_entropy import token_losses
from ptst.generation.cache import Cache
from ptst.generation.sampler import PREFILL_TOKENS, common_prefix
from ptst.model.decoder import Decoder
from ptst.text.encode import Encoded


@torch.no_grad()
def score(decoder: Decoder, examples: Sequence[Encoded]) -> list[tuple[float, int]]:
    """(summed negative log-likelihood in nats, number of tokens) of each example's trained tokens.

    Every example must begin with at least one token that is not trained.
    """
    ids = [e.ids for e in examples]
    if not ids:
        return []
    # The hidden state that predicts the first trained token must be computed for every example itself.
    shared = min(common_prefix(ids), min(e.trained.index(True) for e in examples) - 1)
    cache = Cache(decoder.config, 1, max(map(len, ids)), decoder.dtype, decoder.device)
    if shared:
        tokens = torch.tensor(ids[0][:shared], device=decoder.device)
        decoder(tokens, torch.arange(shared, device=decoder.device), cache.prefill([0], [0], [shared]))
    slots = max(1, PREFILL_TOKENS // max(1, max(map(len, ids)) - shared))
    batch = Cache(decoder.config, slots, max(map(len, ids)), decoder.dtype, decoder.device)
    batch.keys[:, :1, :, :shared] = cache.keys[..., :shared, :]
    batch.values[:, :1, :, :shared] = cache.values[..., :shared, :]
    batch.share_prefix(shared)
    out: list[tuple[float, int]] = []
    for begin in range(0, len(ids), slots):
        group = examples[begin : begin + slots]
        lengths = [len(e.ids) - shared for e in group]
        tokens_T = torch.tensor([t for e in group for t in e.ids[shared:]], device=decoder.device)
        positions_T = torch.cat([torch.arange(shared, shared + n) for n in lengths]).to(decoder.device)
        attend = batch.prefill(range(len(group)), [shared] * len(group), lengths)
        hidden_TE = decoder(tokens_T, positions_T, attend)
        # Row t of the flat row predicts token t + 1 of its own document.
        rows, offset = [], 0
        for e, n in zip(group, lengths, strict=True):
            rows += [offset + i - 1 for i, flag in enumerate(e.trained[shared:]) if flag]
            offset += n
        rows_N = torch.tensor(rows, device=decoder.device)
        losses_N = token_losses(hidden_TE[rows_N], decoder.head_VE, tokens_T[rows_N + 1]).double()
        counts = [e.num_trained for e in group]
        out += [(float(part.sum()), n) for part, n in zip(losses_N.split(counts), counts, strict=True)]
    return out
