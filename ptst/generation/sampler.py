"""The sampler: many prompts in, answers out, over one key/value cache.

Requests enter as others finish; new prompts are computed side by side in one flat row without padding, and the
beginning that all prompts share is computed once. A request's random numbers come from its own generator, so that its
answer does not depend on which others are in the batch.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ptst.generation.cache import Cache
from ptst.model.decoder import Decoder

PREFILL_TOKENS = 1024  # new prompt tokens computed at once, at most (one longer prompt may exceed it)


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. Temperature 0 is greedy; `top_p` keeps the smallest set of tokens of that probability."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens is {self.max_new_tokens}; it must be at least 1")
        if self.temperature < 0:
            raise ValueError(f"--temperature is {self.temperature}; it must not be negative (0 is greedy)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p is {self.top_p}; it must be above 0 and at most 1")


@dataclass
class Completion:
    """An answer: its ids without the stop token, and whether it was cut by the token limit."""

    ids: list[int]
    cut: bool


class _Request:
    def __init__(self, index: int, prompt: list[int], sampling: Sampling):
        self.index = index
        self.prompt = prompt
        self.answer: list[int] = []
        # Python's generator takes the whole text as its seed; torch's on the CPU would look at 32 bits of a number.
        self.random = random.Random(f"{sampling.seed}:{index}")

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.answer)


@torch.no_grad()
def generate(
    decoder: Decoder,
    prompts: Sequence[list[int]],
    stop_ids: frozenset[int] | set[int],
    sampling: Sampling,
    batch_size: int = 32,
    on_done: Callable[[int, Completion], None] = lambda _index, _completion: None,
) -> list[Completion]:
    """Answer every prompt; `on_done(index, completion)` is called as each one ends.

    Raises ValueError for an empty prompt, a batch size below 1, and prompts with answers beyond the model's context.
    """
    if batch_size < 1:
        raise ValueError(f"--batch-size is {batch_size}; it must be at least 1")
    if not prompts:
        return []
    longest = max(map(len, prompts))
    room = decoder.config.max_positions
    if longest + sampling.max_new_tokens > room:
        raise ValueError(
            f"a prompt of {longest} tokens and {sampling.max_new_tokens} new ones exceed the model's {room} positions; "
            "lower --max-new-tokens or leave the longest prompts out"
        )
    if not all(prompts):
        raise ValueError(f"prompt {[bool(p) for p in prompts].index(False)} has no tokens, so nothing can follow it")

    slots = min(batch_size, len(prompts))
    cache = Cache(decoder.config, slots, longest + sampling.max_new_tokens, decoder.dtype, decoder.device)
    shared = common_prefix(prompts)
    if shared:
        tokens = torch.tensor(prompts[0][:shared], device=decoder.device)
        decoder(tokens, torch.arange(shared, device=decoder.device), cache.prefill([0], [0], [shared]))
        cache.share_prefix(shared)

    completions: list[Completion | None] = [None] * len(prompts)
    waiting = deque(_Request(i, p, sampling) for i, p in enumerate(prompts))
    running: list[_Request] = []
    while waiting or running:
        first = len(running)
        while waiting and len(running) < slots:
            new = sum(len(r.prompt) - shared for r in running[first:])
            if new and new + len(waiting[0].prompt) - shared > PREFILL_TOKENS:
                break
            running.append(waiting.popleft())
        if len(running) > first:
            hidden_NE = _prefill(decoder, cache, running[first:], first, shared)
            _sample(decoder, hidden_NE, running[first:], sampling)
        else:
            positions_S = torch.tensor([r.length - 1 for r in running], device=decoder.device)
            tokens_S = torch.tensor([r.answer[-1] for r in running], device=decoder.device)
            _sample(decoder, decoder(tokens_S, positions_S, cache.decode(positions_S)), running, sampling)
        for slot in reversed(range(len(running))):
            request = running[slot]
            stopped = request.answer[-1] in stop_ids
            if not stopped and len(request.answer) < sampling.max_new_tokens:
                continue
            completion = Completion(request.answer[:-1] if stopped else request.answer, cut=not stopped)
            completions[request.index] = completion
            on_done(request.index, completion)
            last = running.pop()
            if last is not request:
                running[slot] = last
                cache.move(len(running), slot, last.length)
    return completions  # type: ignore[return-value]


def common_prefix(prompts: Sequence[list[int]]) -> int:
    """How many tokens all prompts begin with; at least one of each is left to compute."""
    first, last = min(prompts), max(prompts)  # in lexical order all others lie between
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return min(same, min(map(len, prompts)) - 1)


def _prefill(decoder: Decoder, cache: Cache, requests: list[_Request], first: int, shared: int) -> Tensor:
    """Hidden states (N, E) of the last prompt token of each new request; they take slots `first`, `first` + 1, ..."""
    lengths = [len(r.prompt) - shared for r in requests]
    tokens_T = torch.tensor([t for r in requests for t in r.prompt[shared:]], device=decoder.device)
    positions_T = torch.cat([torch.arange(shared, shared + n) for n in lengths]).to(decoder.device)
    attend = cache.prefill(range(first, first + len(requests)), [shared] * len(requests), lengths)
    hidden_TE = decoder(tokens_T, positions_T, attend)
    return hidden_TE[torch.tensor(lengths).cumsum(0).to(decoder.device) - 1]


def _sample(decoder: Decoder, hidden_NE: Tensor, requests: list[_Request], sampling: Sampling) -> None:
    """Append one token to each request's answer."""
    logits_NV = hidden_NE @ decoder.head_VE.t()
    if not sampling.temperature:
        chosen = logits_NV.argmax(-1).tolist()
    else:
        probabilities_NV = (logits_NV.float() / sampling.temperature).softmax(-1).cpu()
        chosen = [
            draw(p_V, sampling.top_p, r.random.random()) for p_V, r in zip(probabilities_NV, requests, strict=True)
        ]
    for request, token in zip(requests, chosen, strict=True):
        request.answer.append(token)


def draw(p_V: Tensor, top_p: float, uniform: float) -> int:
    """One token from the smallest set of tokens whose probability reaches `top_p` (Holtzman et al. 2020).

    `uniform`, in [0, 1), is turned into a token over the cumulated probabilities in the order of ids: probabilities
    that differ in the last digit (another batch size) then give the same token but for the rarest of edges.
    """
    p_V = p_V.double()
    if top_p < 1:
        sorted_V, order_V = p_V.sort(descending=True, stable=True)
        outside = sorted_V.cumsum(0) - sorted_V >= top_p
        p_V[order_V[outside]] = 0
    cumulated_V = p_V.cumsum(0)
    return int(torch.searchsorted(cumulated_V, uniform * cumulated_V[-1], right=True))
