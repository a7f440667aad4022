"""Constrained fine-tuning: the first tokens of an answer are held near those of a reference model.

Qi et al. 2025, "Safety alignment should be made more than just a few tokens deep" (arXiv 2406.05946), equation 3. With
p the model's and q the reference's probability of a trained token, and b the constraint's strength at its place,

    loss       (2 / b) log(1 + (q / p)^b) = -(2 / b) log sigmoid(b (log p - log q))
    gradient   2 sigmoid(b (log q - log p)) times that of -log p

which is cross-entropy with a weight for each token: 1 where the model is the reference, falling to 0 as it makes the
token likelier than the reference does, faster the larger b is. Places are counted in each answer of a conversation:
every run of trained tokens has a first one. The reference's log-probabilities are computed once, before training, and
kept in the run folder.
"""

import hashlib
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ptst.errors import Setting, UserError
from ptst.generation.score import token_log_probabilities
from ptst.kernels.transfer import to_device
from ptst.model.decoder import Decoder
from ptst.progress import ProgressLine, say
from ptst.storage import write_atomically
from ptst.text.encode import Example
from ptst.training.parallel import World, sum_over_ranks

FILE = "reference.safetensors"
EARLY = 5  # tokens of an answer: the first has the first beta, those up to this one the second
_SCORED = 64  # examples that are scored together


@dataclass(frozen=True)
class TokenConstraint:
    """`logprobs`: the reference's log-probabilities of all trained tokens, example after example; those of example i
    begin at `starts[i]`. `betas`: the constraint's strengths at the same places."""

    logprobs: Tensor
    betas: Tensor
    starts: Sequence[int]

    @classmethod
    def over(cls, examples: Sequence[Example], betas: Sequence[float], logprobs: Tensor) -> "TokenConstraint":
        """`betas`: of an answer's first token, of its second to fifth, and of the rest."""
        strengths = [beta for example in examples for beta in token_betas(example.loss_mask, betas)]
        return cls(logprobs, torch.tensor(strengths, dtype=logprobs.dtype), _starts(examples))

    def of(self, examples: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Betas and log-probabilities of these examples' trained tokens, in their order: (N,) each."""
        spans = [slice(*self.starts[i : i + 2]) for i in examples]
        betas, logprobs = (
            to_device(torch.cat([values[span] for span in spans]), device) for values in (self.betas, self.logprobs)
        )
        return betas, logprobs


def token_betas(loss_mask: Sequence[bool], betas: Sequence[float]) -> list[float]:
    """The strength at each trained token that is predicted (all but a document's very first token)."""
    first, early, rest = betas
    out: list[float] = []
    for trained, run in groupby(loss_mask[1:]):
        if trained:
            out += [first if n == 0 else early if n < EARLY else rest for n, _ in enumerate(run)]
    return out


def _starts(examples: Sequence[Example]) -> list[int]:
    return [0, *accumulate(sum(example.loss_mask[1:]) for example in examples)]


def reference_scores(
    examples: Sequence[Example], used: Collection[int], load: Callable[[], Decoder], world: World, path: Path, of: str
) -> Tensor:
    """The reference's log-probabilities of all trained tokens, example after example, float32, on the host: those that
    the main process finds in `path`, or from the decoder that `load` returns, which are then kept there. `used`: the
    examples that a step takes; others are not scored (NaN). `of`: a fingerprint of examples and reference. All ranks
    must call and get the same. Raises UserError for log-probabilities that are not finite."""
    found = read_scores(path, of) if world.is_main_process else None
    if world.sum(found is not None):
        values = torch.zeros(_starts(examples)[-1]) if found is None else found
        values = values.to("cuda" if world.size > 1 and torch.cuda.is_available() else "cpu")
        sum_over_ranks([values], world)
        return values.cpu()
    say(f"scoring {len(used)} examples with the reference model")
    values = score_examples(load(), examples, used, world)
    starts = _starts(examples)
    if not all(torch.isfinite(values[starts[i] : starts[i + 1]]).all() for i in used):
        cause = "the reference model of the token constraint gives log-probabilities that are not finite"
        raise UserError(cause, ("look at its weights, or name another one as ", Setting("reference")))
    if world.is_main_process:
        write_scores(path, values, of)
    return values


def score_examples(decoder: Decoder, examples: Sequence[Example], used: Collection[int], world: World) -> Tensor:
    """A decoder's log-probabilities of all trained tokens, example after example, float32, on the host; NaN where an
    example is not `used`. Each rank computes a share; all must call and get the same."""
    starts, numbers = _starts(examples), sorted(used)[world.rank :: world.size]
    scored = torch.zeros(starts[-1], device=decoder.device)
    with ProgressLine("reference", len(numbers)) as progress:
        for at in range(0, len(numbers), _SCORED):
            part = [i for i in numbers[at : at + _SCORED] if starts[i] < starts[i + 1]]
            rows = [(examples[i].ids, [False, *examples[i].loss_mask[1:]]) for i in part]
            for i, logprobs in zip(part, token_log_probabilities(decoder, rows), strict=True):
                scored[starts[i] : starts[i + 1]] = torch.tensor(logprobs)
            progress.update(min(at + _SCORED, len(numbers)))
    sum_over_ranks([scored], world)
    for i in set(range(len(examples))).difference(used):
        scored[starts[i] : starts[i + 1]] = math.nan
    return scored.cpu()


def write_scores(path: Path, logprobs: Tensor, of: str) -> None:
    """Keep log-probabilities in a file. `of`: a fingerprint of the examples and of the reference model."""
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, save({"logprobs": logprobs}, {"of": of, "sha256": _digest(logprobs)}))


def read_scores(path: Path, of: str) -> Tensor | None:
    """What `write_scores` kept, or None where there is nothing, or nothing of use, which is said."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            logprobs, about = file.get_tensor("logprobs"), file.metadata() or {}
        if about.get("of") == of and about.get("sha256") == _digest(logprobs):
            return logprobs
        reason = "it is of other examples or of another model" if about.get("of") != of else "it has been altered"
    except (OSError, SafetensorError) as error:
        reason = str(error)
    say(f"warning: {path} cannot be used ({reason}), so the reference is computed anew")
    return None


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
