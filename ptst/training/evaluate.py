"""Validation loss and sample answers during training, on the live weights. Neither changes what is trained: no
gradient, no dropout, no random number taken from training."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ptst.data.step_batches import MicroBatch, StepBatches
from ptst.generation.engine import generate
from ptst.generation.request import EngineOptions, Sampling
from ptst.model.decoder import Decoder
from ptst.model.loss import batch_loss
from ptst.progress import ProgressLine
from ptst.text.encode import Example
from ptst.text.prompt_format import PromptFormat
from ptst.text.segments import Conversation
from ptst.threads import SlowDown
from ptst.training.parallel import World
from ptst.training.sharded_answers import sharded_answers
from ptst.training.sharding import idle_loss, idle_passes

MAX_NEW_TOKENS = 128  # of a sample answer


@torch.no_grad()
def validation_loss(
    decoder: Decoder,
    examples: Sequence[Example],
    micro_batch_tokens: int,
    world: World,
    check: Callable[[MicroBatch], None] = lambda _batch: None,
) -> float:
    """Mean loss per trained token (nats). Each rank computes a share; all must call and get the same. `check`: called
    with every micro-batch before it is computed."""
    trained = sum(sum(e.loss_mask[1:]) for e in examples)
    own, slow_down = 0.0, SlowDown()
    place = micro_batch_tokens, world.rank, world.size
    batches = StepBatches(examples, range(len(examples)), *place, check=check)
    with ProgressLine("validation", len(batches)) as progress:
        for done, batch in enumerate(batches, 1):
            with slow_down.watch(decoder.device, len(batch.computed.tokens)):
                own += float(batch_loss(decoder, batch.computed, trained))
            progress.update(done)
    for _ in range(idle_passes(decoder, [len(e.ids) for e in examples], micro_batch_tokens, world)):
        idle_loss(decoder)
    return world.sum(own)


def sample_answers(
    decoder: Decoder, conversations: Sequence[Conversation], prompt_format: PromptFormat
) -> list[dict[str, Any]]:
    """Greedy answers under the training template, one row each: where the question comes from, prompt and answer as
    text, whether the token limit truncated the answer, and the error of one that failed. Where weights are spread over
    ranks, all must call."""
    tokenizer, room = prompt_format.tokenizer, decoder.config.max_positions
    prompts = [prompt_format.encode(c.prompt()).ids for c in conversations]
    asked = [(c, p) for c, p in zip(conversations, prompts, strict=True) if len(p) < room]
    if not asked:
        return []
    most, stop_ids = min(MAX_NEW_TOKENS, room - max(len(p) for _, p in asked)), prompt_format.stop_ids
    if decoder.sharded:
        done = sharded_answers(decoder, [p for _, p in asked], stop_ids, most)
    else:
        with torch.random.fork_rng():
            done = generate(decoder, [p for _, p in asked], stop_ids, Sampling(most), EngineOptions(32))
    return [
        {
            "source": c.source,
            "prompt": tokenizer.decode(p),
            "answer": tokenizer.decode(a.token_ids),
            "cut": a.truncated,
            **({"error": a.error} if a.error else {}),
        }
        for (c, p), a in zip(asked, done, strict=True)
    ]
