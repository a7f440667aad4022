"""Greedy answers of a decoder whose weights are spread over ranks (ptst/model/sharded_weights.py).

The engine reads the weights of all layers, which no rank has. Here every token is a pass through the decoder itself,
which gathers a layer at a time and which all ranks must make: all answer the same prompts, and rank 0's choice of each
token is everybody's, so that a last digit that differs between machines never lets one rank end before another.
"""

from collections.abc import Collection, Sequence
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from ptst.generation.request import NOT_A_NUMBER, Answer, Sampling
from ptst.generation.sampling import sample
from ptst.kernels.attention import packed_attention
from ptst.model.decoder import Decoder


class _Cache:
    """Keys and values of sequences, whose newest tokens lie in one row, `counts` of them each."""

    def __init__(self, decoder: Decoder):
        self.config = decoder.config
        self.held: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # by layer and sequence
        self.counts: dict[int, int] = {}

    def attend(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        """Attention of the newest tokens to all of their sequences, which they become part of."""
        ends = [0, *accumulate(self.counts.values())]
        for sequence, (a, b) in zip(self.counts, pairwise(ends), strict=True):
            new, old = (k_TKD[a:b], v_TKD[a:b]), self.held.get((layer, sequence))
            k, v = new if old is None else (torch.cat(pair) for pair in zip(old, new, strict=True))
            self.held[layer, sequence] = k, v
        keys, values = zip(*(self.held[layer, sequence] for sequence in self.counts), strict=True)
        ends_k = [0, *accumulate(len(k) for k in keys)]
        window = self.config.window(layer)
        return packed_attention(q_THD, torch.cat(keys), torch.cat(values), ends, cu_seqlens_k=ends_k, window=window)


@torch.no_grad()
def sharded_answers(
    decoder: Decoder, prompts: Sequence[list[int]], stop_ids: Collection[int], max_new_tokens: int
) -> list[Answer]:
    """The greedy answers to prompts (token ids), in order, as `generate` gives them. All ranks must call, with the same
    prompts, and get the same."""
    cache, new = _Cache(decoder), dict(enumerate(prompts))  # the tokens of each sequence that no pass has had
    lengths, answers, reasons = dict.fromkeys(new, 0), [list[int]() for _ in prompts], ["length" for _ in prompts]
    for _ in range(max_new_tokens):
        cache.counts = {i: len(tokens) for i, tokens in new.items()}
        tokens = [token for each in new.values() for token in each]
        positions = [lengths[i] + at for i, each in new.items() for at in range(len(each))]
        tokens_T, positions_T = torch.tensor([tokens, positions], device=decoder.device).unbind()
        last_N = torch.tensor(list(accumulate(cache.counts.values())), device=decoder.device) - 1
        hidden_NE = decoder(tokens_T, positions_T, cache.attend)[last_N]
        chosen_N = sample((hidden_NE @ decoder.head_VE.t()).float(), [Sampling()] * len(new), [0.0] * len(new))
        dist.broadcast(chosen_N, 0)
        for i, token in zip(list(new), chosen_N.tolist(), strict=True):
            lengths[i] += len(new.pop(i))
            if token < 0 or token in stop_ids:
                reasons[i] = "error" if token < 0 else "stop"
            else:
                answers[i].append(token)
                new[i] = [token]
        if not new:
            break
    errors = [NOT_A_NUMBER if reason == "error" else None for reason in reasons]
    return [Answer(ids, "", why, error=error) for ids, why, error in zip(answers, reasons, errors, strict=True)]
