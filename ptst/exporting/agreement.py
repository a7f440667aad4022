"""Does what was written answer as the run does? Logits and greedy answers of both, on a few prompts, in float32.

The run is taken as it is evaluated: its adapter unmerged over the base model. Both models are never in memory at once.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ptst.data.builtin.safety_sets import look_alikes
from ptst.data.builtin.word_problems import generate as word_problems
from ptst.generation.engine import generate
from ptst.generation.kv_cache import common_prefix_length
from ptst.generation.request import EngineOptions, Sampling
from ptst.model.decoder import Decoder, LoraLinear
from ptst.model.lora import merge_lora
from ptst.text.prompt_format import PromptFormat
from ptst.text.segments import Conversation, Message

QUESTIONS = 6  # of each template
ANSWER = 24  # greedy tokens of each answer
POSITIONS = 40  # logits compared per prompt: its last tokens and the answer's


@dataclass(frozen=True)
class Observed:
    """What a model does on the prompts: greedy answers, and the logits (N, V) of the last positions of prompt and
    answer. `base_NV`: the same without the adapter. `rounding`: see `rounding_change`."""

    answers: list[list[int]]
    logits_NV: Tensor
    base_NV: Tensor | None = None
    rounding: float = 0.0


@dataclass(frozen=True)
class Agreement:
    """How far the export is from the run. `largest`, `mean`: change of a logit. `logit_range`: largest distance of a
    logit from the mean of its position. `effect`: largest change of a logit by the adapter itself, None without one.
    `same_tokens` of `tokens`: of the run's greedy answers, until the first that differs. `same_top` of `positions`:
    where the most likely token is the same after the same tokens. `rounding`: the largest change by random rounding;
    `tolerance`: the largest that is accepted."""

    prompts: int
    positions: int
    largest: float
    mean: float
    logit_range: float
    effect: float | None
    tokens: int
    same_tokens: int
    same_answers: int
    same_top: int
    rounding: float
    tolerance: float

    @property
    def accepted(self) -> bool:
        return self.largest <= self.tolerance  # False for NaN

    @property
    def sentences(self) -> tuple[str, ...]:
        """For people, the report's and the card's."""
        answers = f"{self.same_tokens} of {self.tokens} tokens of {self.prompts} greedy answers are the same"
        found = [
            f"Largest change of a logit {self.largest:.2g}, mean {self.mean:.2g}, at {self.positions} positions of "
            f"{self.prompts} prompts (accepted: {self.tolerance:.2g}; logits range over {self.logit_range:.3g}).",
            f"The most likely token is the same at {self.same_top} of them; {answers} (until the first that differs).",
        ]
        if self.effect is not None:
            share = f"; the export's change is {self.largest / self.effect:.1%} of that" if self.effect else ""
            found.append(f"The adapter itself changes a logit by up to {self.effect:.2g}{share}.")
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def prompts_of(formats: Sequence[PromptFormat], max_positions: int) -> list[list[int]]:
    """Built-in questions under each template, those that fit with an answer: half word problems, half requests."""
    questions = [p.question for p in word_problems("test", QUESTIONS // 2)]
    questions += [p.prompt for p in look_alikes()[: QUESTIONS // 2]]
    asked = [Conversation((Message("user", question),), "") for question in questions]
    found = [f.encode(conversation).ids for f in formats for conversation in asked]
    return [ids for ids in found if len(ids) + ANSWER <= max_positions]


@torch.inference_mode()
def observe(
    decoder: Decoder,
    prompts: Sequence[list[int]],
    stop_ids: frozenset[int],
    *,
    answers: list[list[int]] | None = None,
    rounded: Mapping[str, torch.dtype] | None = None,
) -> Observed:
    """What a model does on the prompts. `answers`: of the model to compare with, after which logits are taken.
    `rounded`: weights that an export rounds, with the type that they are rounded to; the decoder is then used up."""
    done = generate(decoder, prompts, stop_ids, Sampling(ANSWER), EngineOptions(len(prompts)))
    own = [answer.token_ids for answer in done]
    rows = [prompt + answer for prompt, answer in zip(prompts, own if answers is None else answers, strict=True)]
    logits_NV = _logits(decoder, rows)
    adapted = any(isinstance(module, LoraLinear) for module in decoder.modules())
    with _without_adapter(decoder):
        base_NV = _logits(decoder, rows) if adapted else None
    rounding = rounding_change(decoder, rows, logits_NV, rounded) if rounded else 0.0
    return Observed(own, logits_NV, base_NV, rounding)


def _logits(decoder: Decoder, rows: Sequence[list[int]]) -> Tensor:
    """Logits (N, V) at the last POSITIONS of each row, in float32 on the CPU, row by row to save memory."""
    found = []
    for row in rows:
        tokens_T = torch.tensor(row, device=decoder.device)
        hidden_TE = decoder.documents(tokens_T, [0, len(row)])[-POSITIONS:]
        found.append((hidden_TE @ decoder.head_VE.t()).float().cpu())
    return torch.cat(found)


@contextmanager
def _without_adapter(decoder: Decoder) -> Iterator[None]:
    """Inside, every adapter has the factor 0."""
    layers = [module for module in decoder.modules() if isinstance(module, LoraLinear)]
    scales = [layer.scale for layer in layers]
    for layer in layers:
        layer.scale = 0.0
    try:
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scale = scale


def compare(run: Observed, export: Observed, tolerance: float | None) -> Agreement:
    """The agreement of an export with its run. `tolerance`: the user's."""
    change_NV = (run.logits_NV - export.logits_NV).abs()
    spread = float((run.logits_NV - run.logits_NV.mean(-1, keepdim=True)).abs().max())
    pairs = list(zip(run.answers, export.answers, strict=True))
    return Agreement(
        prompts=len(pairs),
        positions=len(change_NV),
        largest=float(change_NV.max()),
        mean=float(change_NV.mean()),
        logit_range=spread,
        effect=None if run.base_NV is None else float((run.logits_NV - run.base_NV).abs().max()),
        tokens=sum(len(x) for x, _ in pairs),
        same_tokens=sum(common_prefix_length(x, y) for x, y in pairs),
        same_answers=sum(x == y for x, y in pairs),
        same_top=int((run.logits_NV.argmax(-1) == export.logits_NV.argmax(-1)).sum()),
        rounding=run.rounding,
        tolerance=tolerance or accepted_change(run.rounding, spread),
    )


def rounding_change(
    decoder: Decoder, rows: Sequence[list[int]], logits_NV: Tensor, rounded: Mapping[str, torch.dtype]
) -> float:
    """The largest change of a logit if every value of these weights is moved at random, evenly within half of the step
    of its type, as rounding moves it. The adapter is merged for that, and the weights stay moved."""
    merge_lora(decoder)
    generator = torch.Generator(decoder.device).manual_seed(0)
    for key, dtype in rounded.items():
        info, weight = torch.finfo(dtype), decoder.get_parameter(key)
        _, exponent = torch.frexp(weight)
        step = torch.ldexp(torch.full_like(weight, info.eps), exponent - 1).clamp_(min=info.smallest_normal * info.eps)
        random = torch.empty_like(weight).uniform_(-0.5, 0.5, generator=generator)
        weight.add_(step.mul_(random))
    return float((_logits(decoder, rows) - logits_NV).abs().max())


def accepted_change(rounding: float, logit_range: float) -> float:
    """The largest change of a logit that rounding explains: four times what moving all weights at random by as much
    does to this very model on these prompts, and what sums in another order do in float32.

    The largest of millions of changes differs little from one draw to the next: on random models of each family,
    exports that are right changed a logit by 0.6 to 1.6 times as much. A mistake (another scale, a matrix that is left
    out) changes logits by as much as the adapter itself does. Sums in another order changed them by up to 30 units of
    float32's roundoff, of the range of the logits.
    """
    return 4 * rounding + 250 * torch.finfo(torch.float32).eps / 2 * logit_range
