"""Many prompts in, answers out: the engine for a list that is known beforehand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ptst.errors import UserError
from ptst.generation.adapters import Adapter
from ptst.generation.engine import Engine
from ptst.generation.request import Answer, Request, Sampling
from ptst.generation.stop import Decode
from ptst.model.decoder import Decoder

__all__ = ["Answer", "Sampling", "generate"]


def generate(
    decoder: Decoder,
    prompts: Sequence[list[int]],
    stop_ids: frozenset[int] | set[int],
    sampling: Sampling,
    batch_size: int = 32,
    on_done: Callable[[int, Answer], None] = lambda _index, _answer: None,
    *,
    adapter: Adapter | None = None,
    decode: Decode | None = None,
    kv_memory: int | None = None,
    prefill_tokens: int = 512,
    share: bool = True,
) -> list[Answer]:
    """Answer every prompt; `on_done(index, answer)` is called as each one ends. A request's id is its index.

    Raises UserError, before anything runs, for an empty prompt, a batch size below 1, prompts with answers beyond the
    model's context or the cache's memory; a prompt at fault is named by its index.
    """
    if batch_size < 1:
        raise UserError(f"--batch-size is {batch_size}; it must be at least 1")
    if not prompts:
        return []
    engine = Engine(
        decoder,
        stop_ids,
        max_batch=min(batch_size, len(prompts)),
        max_length=max(map(len, prompts)) + sampling.max_new_tokens,
        kv_memory=kv_memory,
        prefill_tokens=prefill_tokens,
        decode=decode,
        adapters={"": adapter} if adapter else None,
        share=share,
    )
    requests = [Request(p, sampling, i, "" if adapter else None) for i, p in enumerate(prompts)]
    for request in requests:
        engine.check(request)
    answers: dict[int, Answer] = {}

    def done(index: int, answer: Answer) -> None:
        answers[index] = answer
        on_done(index, answer)

    engine.run(requests, done)
    return [answers[i] for i in range(len(prompts))]
