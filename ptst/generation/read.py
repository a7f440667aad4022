"""Reading prompts without answering: how likely a model finds their tokens, and its hidden state where it would answer.
What all prompts begin with (a system prompt) is computed once."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from ptst.generation.forward import Forward
from ptst.generation.multi_lora import Adapter
from ptst.generation.sampling import log_probabilities
from ptst.generation.score import MAX_LOGITS_ROWS, Watch, _unwatched, check_rows, hidden_states, shared_prefix
from ptst.kernels.transfer import to_device
from ptst.model.decoder import Decoder


@dataclass(frozen=True)
class ReadPrompt:
    """`logprobs`: log probability (nats) of every token but the first, of which nothing is known. `state_E`: the
    hidden state after the final norm at the last token, in float32 on the CPU."""

    logprobs: list[float]
    state_E: Tensor


def read_prompts(
    decoder: Decoder, prompts: Sequence[list[int]], adapter: Adapter | None = None, watch: Watch = _unwatched
) -> list[ReadPrompt]:
    """What a model makes of each prompt (token ids). `watch` as in `score`. Raises UserError for a prompt of fewer than
    two tokens, one longer than the model's context, and for tokens outside the vocabulary."""
    if not prompts:
        return []
    check_rows(decoder.config, [(ids, [False, *[True] * (len(ids) - 1)]) for ids in prompts])
    forward = Forward(decoder, {"": adapter} if adapter else None)
    return _read(forward, prompts, "" if adapter else None, watch)


@torch.inference_mode()
def _read(forward: Forward, prompts: Sequence[list[int]], adapter: str | None, watch: Watch) -> list[ReadPrompt]:
    shared = min(shared_prefix(prompts), min(map(len, prompts)) - 1)
    before = list[float]()  # of the shared tokens
    last_1E: Tensor | None = None  # the hidden state that predicts the first token of each prompt's own
    found = list[ReadPrompt]()
    for batch, hidden_TE in hidden_states(forward, prompts, shared, adapter, watch):
        if not batch:
            before = _logprobs(forward, hidden_TE[:-1], prompts[0][1:shared])
            last_1E = hidden_TE[-1:].clone()
            continue
        parts_tE = hidden_TE.split([len(prompts[i]) - shared for i in batch])
        # What predicts the prompts' own tokens, one prompt after the other.
        predicting = [h if last_1E is None else torch.cat((last_1E, h)) for h in parts_tE]
        targets = [prompts[i][max(shared, 1) :] for i in batch]
        flat = _logprobs(forward, torch.cat([h[:-1] for h in predicting]), [t for own in targets for t in own])
        rest = iter(flat)
        for h_tE, own in zip(parts_tE, targets, strict=True):
            found.append(ReadPrompt([*before, *islice(rest, len(own))], h_tE[-1].float().cpu().clone()))
    return found


def _logprobs(forward: Forward, hidden_NE: Tensor, targets: Sequence[int]) -> list[float]:
    targets_N = to_device(targets, forward.device, torch.long)
    parts = zip(hidden_NE.split(MAX_LOGITS_ROWS), targets_N.split(MAX_LOGITS_ROWS), strict=True)
    return [p for h_nE, t_n in parts for p in log_probabilities(forward.logits(h_nE), t_n).double().tolist()]
