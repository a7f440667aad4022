"""`generate`: many prompts in, their answers out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from ptst.generation.engine import BATCH_SIZE, Engine
from ptst.generation.request import Answer, EngineOptions, Request, Sampling, Statistics
from ptst.generation.stop_strings import Decode
from ptst.model.decoder import Decoder


def generate(
    decoder: Decoder,
    prompts: Sequence[list[int]],
    stop_ids: Collection[int],
    sampling: Sampling,
    options: EngineOptions | None = None,
    decode: Decode | None = None,
    on_step: Callable[[Statistics], None] | None = None,
) -> list[Answer]:
    """The answers to a list of prompts (token ids), in order.

        answers = generate(decoder, prompts, stop_ids, Sampling(max_new_tokens=64), decode=tokenizer.decode_answer)
        print(answers[0].text, answers[0].finish_reason)

    `stop_ids` end an answer. Adapters that are attached to the decoder (`load_adapter`) apply; an `Engine` answers with
    several adapters at once. A prompt's id, which with `sampling.seed` determines its random numbers, is its index.
    `decode(prompt ids, answer ids)` gives the answers' text (without it: token ids only). `on_step(statistics)` is
    called after every step, about once per token of an answer.

    Raises UserError, before anything is computed, for an empty prompt and for prompts that with their answers exceed
    the model's context or the memory; the message names the prompt by its index.
    """
    if not prompts:
        return []
    options = options or EngineOptions()
    length = max(map(len, prompts)) + sampling.max_new_tokens
    batch_size = min(options.batch_size or BATCH_SIZE[decoder.device.type], len(prompts))
    options = replace(options, batch_size=batch_size, max_length=options.max_length or length)
    engine = Engine(decoder, stop_ids, options, decode=decode)
    requests = [Request(prompt, sampling, i) for i, prompt in enumerate(prompts)]
    for request in requests:
        engine.check(request)
    answers: dict[str | int, Answer] = {}
    engine.run(requests, answers.__setitem__, on_step=on_step)
    return [answers[i] for i in range(len(prompts))]
