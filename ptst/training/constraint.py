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
import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ptst.data.example_arrays import trained_of
from ptst.errors import Setting, UserError
from ptst.generation.score import token_log_probabilities
from ptst.kernels.transfer import to_device
from ptst.model.decoder import Decoder
from ptst.progress import ProgressLine, say
from ptst.storage import atomic_path
from ptst.text.encode import Example
from ptst.training.agreement import first_seen
from ptst.training.parallel import World, sum_over_ranks

FILE = "reference.safetensors"
EARLY = 5  # tokens of an answer: the first has the first beta, those up to this one the second
_SCORED = 64  # examples that are scored together
_PIECE = 1 << 20  # values that are in memory at once
_PATH_MAX = 4096  # bytes, of Linux


@dataclass(frozen=True)
class TokenConstraint:
    """`logprobs`: the reference's log-probabilities of all trained tokens, example after example; those of example i
    begin at `starts[i]`. `betas`: the strengths at an answer's first token, at its second to fifth, and at the rest."""

    examples: Sequence[Example]
    betas: Sequence[float]
    logprobs: Tensor
    starts: np.ndarray

    @classmethod
    def over(cls, examples: Sequence[Example], betas: Sequence[float], logprobs: Tensor) -> "TokenConstraint":
        """Of all examples. `betas`, `logprobs`: as of the constraint."""
        return cls(examples, betas, logprobs, _starts(examples))

    def of(self, examples: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Betas and log-probabilities of these examples' trained tokens, in their order: (N,) each."""
        betas = [beta for i in examples for beta in token_betas(self.examples[i].loss_mask, self.betas)]
        logprobs = torch.cat([self.logprobs[self.starts[i] : self.starts[i + 1]] for i in examples])
        return to_device(torch.tensor(betas, dtype=logprobs.dtype), device), to_device(logprobs, device)


def token_betas(loss_mask: Sequence[bool], betas: Sequence[float]) -> list[float]:
    """The strength at each trained token that is predicted (all but a document's very first token)."""
    first, early, rest = betas
    out: list[float] = []
    for trained, run in groupby(loss_mask[1:]):
        if trained:
            out += [first if n == 0 else early if n < EARLY else rest for n, _ in enumerate(run)]
    return out


def _starts(examples: Sequence[Example]) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(trained_of(examples), dtype=np.int64)])


def reference_scores(
    examples: Sequence[Example], used: Collection[int], load: Callable[[], Decoder], world: World, path: Path, of: str
) -> Tensor:
    """The reference's log-probabilities of all trained tokens, example after example, float32, mapped from `path`,
    where the main process finds them, or where they are written from the decoder that `load` returns. `used`: the
    examples that a step takes; others are not scored (NaN). `of`: a fingerprint of examples and reference. All ranks
    must call and get the same. Raises UserError for log-probabilities that are not finite, and for a rank that does
    not see the file."""
    # Of a run without a given folder, the main process alone knows which one it is.
    of_main = Path(os.fsdecode(world.gather(os.fsencode(path.absolute()).ljust(_PATH_MAX, b"\0"))[0].rstrip(b"\0")))
    found = read_scores(path, of) if world.is_main_process else None
    if not world.sum(found is not None):
        say(f"scoring {len(used)} examples with the reference model")
        blocks = score_examples(load(), examples, used, world)
        if world.is_main_process:
            write_scores(path, blocks, int(_starts(examples)[-1]), of)
        else:
            for _ in blocks:
                pass
        world.barrier()
    if found is not None:
        return found
    # The folder that ranks share may have another name on another node.
    if (seen := first_seen(of_main, path)) is None:
        cause = f"rank {world.rank} does not see {of_main}, which rank 0 wrote, nor {path.absolute()}"
        raise UserError(cause, ("give all ranks the same ", Setting("out"), ", on a file system that they share"))
    return _mapped(seen)


def score_examples(
    decoder: Decoder, examples: Sequence[Example], used: Collection[int], world: World
) -> Iterator[np.ndarray]:
    """A decoder's log-probabilities of all trained tokens, example after example, float32, some at a time; NaN where an
    example is not `used`. Each rank computes a share; all must call and get the same. Raises UserError for values that
    are not finite."""
    starts, numbers, written = _starts(examples), sorted(used), 0
    with ProgressLine("reference", len(numbers)) as progress:
        for at in range(0, len(numbers), _SCORED * world.size):
            part = numbers[at : at + _SCORED * world.size]
            first, end = int(starts[part[0]]), int(starts[part[-1] + 1])
            scored = torch.zeros(end - first, device=decoder.device)
            own = [i for i in part[world.rank :: world.size] if starts[i] < starts[i + 1]]
            rows = [(examples[i].ids, [False, *examples[i].loss_mask[1:]]) for i in own]
            for i, logprobs in zip(own, token_log_probabilities(decoder, rows), strict=True):
                scored[starts[i] - first : starts[i + 1] - first] = torch.tensor(logprobs)
            sum_over_ranks([scored], world)
            yield from _nothing(first - written)
            yield _finite(scored.cpu().numpy(), [slice(*(starts[i : i + 2] - first)) for i in part])
            written = end
            progress.update(at + len(part))
    yield from _nothing(int(starts[-1]) - written)


def _finite(scored: np.ndarray, spans: Sequence[slice]) -> np.ndarray:
    """The block with NaN outside of these spans, in which all must be finite."""
    block = np.full_like(scored, math.nan)
    for span in spans:
        if not np.isfinite(scored[span]).all():
            cause = "the reference model of the token constraint gives log-probabilities that are not finite"
            raise UserError(cause, ("look at its weights, or name another one as ", Setting("reference")))
        block[span] = scored[span]
    return block


def _nothing(number: int) -> Iterator[np.ndarray]:
    """So many times NaN."""
    for at in range(0, number, _PIECE):
        yield np.full(min(_PIECE, number - at), math.nan, np.float32)


def write_scores(path: Path, blocks: Iterable[np.ndarray], number: int, of: str) -> None:
    """Keep log-probabilities in a file of safetensors, as they come. `number`: of all; `of`: a fingerprint of the
    examples and of the reference model."""
    path.parent.mkdir(exist_ok=True)
    digest = hashlib.sha256()
    with atomic_path(path) as partial, open(partial, "wb") as file:
        file.write(_header(number, {"of": of, "sha256": digest.hexdigest()}))
        for block in blocks:
            digest.update(block.tobytes())
            file.write(block.tobytes())
        file.seek(0)
        file.write(_header(number, {"of": of, "sha256": digest.hexdigest()}))  # as long as before


def _header(number: int, about: dict[str, str]) -> bytes:
    entry = {"dtype": "F32", "shape": [number], "data_offsets": [0, 4 * number]}
    text = json.dumps({"__metadata__": about, "logprobs": entry}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_scores(path: Path, of: str) -> Tensor | None:
    """What `write_scores` kept, mapped, or None where there is nothing, or nothing of use, which is said."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
        logprobs = _mapped(path)
        if about.get("of") == of and about.get("sha256") == _digest(logprobs):
            return logprobs
        reason = "it is of other examples or of another model" if about.get("of") != of else "it has been altered"
    except (OSError, SafetensorError, ValueError) as error:  # ValueError: bytes that are no whole number of values
        reason = str(error)
    say(f"warning: {path} cannot be used ({reason}), so the reference is computed anew")
    return None


def _mapped(path: Path) -> Tensor:
    """The only tensor of a file, in memory where it is looked at."""
    with open(path, "rb") as file:
        begin = 8 + int.from_bytes(file.read(8), "little")
    if begin == path.stat().st_size:
        return torch.zeros(0)
    return torch.from_numpy(np.memmap(path, np.float32, "c", begin))


def _digest(tensor: Tensor) -> str:
    digest = hashlib.sha256()
    for piece in tensor.split(_PIECE):
        digest.update(piece.numpy().tobytes())
    return digest.hexdigest()
