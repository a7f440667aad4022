"""For notebooks and scripts: answers and audits of single conversations, in memory."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ptst.audit.report import Audit, References, audit
from ptst.audit.setup import Setup
from ptst.data.layouts import to_conversation
from ptst.data.sources import Source
from ptst.errors import UserError
from ptst.generation.engine import Engine
from ptst.generation.multi_lora import read_adapter
from ptst.generation.request import Answer, EngineOptions, Request, Sampling
from ptst.model.decoder import Decoder
from ptst.model.weights import pick_device, pick_dtype
from ptst.open import OpenModel, check_adapter, check_base
from ptst.records import TrainRecord, find_record
from ptst.text.segments import Conversation, Message

Row = str | Conversation | Mapping[str, Any]
"""A user's message, a conversation, or a row as data files have it: question and answer, messages, ..."""


def audit_conversation(model: OpenModel, row: Row) -> Audit:
    """Audit one training example: `.rows[0][1]` are its tokens (text, author, trained), `.findings` what is wrong,
    `.verdict` "info" where nothing is. Raises UserError for a row of no known shape."""
    conversation = _conversation(row, "conversation")
    source = Source(conversation.source, model.prompt_format.family.name, (conversation,))
    setup = Setup(model.prompt_format, "all", None, "stop")
    return audit(source, setup, References(model.folder), micro_batch_tokens=model.config.max_positions)


def generate(
    model: OpenModel,
    prompts: Sequence[Row],
    sampling: Sampling | None = None,
    *,
    runs: Sequence[Path | str | None] | None = None,
    decoder: Decoder | None = None,
    batch_size: int = 64,
) -> list[Answer]:
    """Answer every prompt under the model's template; a final answer in a row is left out.

    `runs`: for each prompt the folder of the run, or of anybody's adapter, that answers it (None: the base model), all
    in one batch; without it, the model as it was opened answers. `decoder`: weights that are loaded already. Raises
    UserError for a prompt that the template cannot render or the context cannot hold, for an adapter of another base
    model, and for answers that failed.
    """
    if isinstance(prompts, (str, Mapping, Conversation)):
        raise UserError("prompts is a single row", "give a list of rows")
    if runs is not None and len(runs) != len(prompts):
        raise UserError(f"there are {len(runs)} runs for {len(prompts)} prompts", "give one for each, or None")
    if not prompts:
        return []
    sampling = sampling or Sampling()
    names = [None if run is None else str(run) for run in runs or [None] * len(prompts)]
    adapters = {name: Path(name) for name in names if name is not None}
    for folder in adapters.values():
        if run := find_record(folder, TrainRecord):
            check_base(folder, run, model.folder)
            if run.quantize != model.quantize:
                cause = f"{folder} was trained over a base in {run.quantize}, and {model.name} is in {model.quantize}"
                raise UserError(cause, "open the run itself, as checkpoint")
        else:
            check_adapter(folder, model.config, model.name, model.folder)
    if decoder is None:
        load = model.load if runs is None else model.load_base
        decoder = load(pick_dtype("auto"), pick_device())
    ids = [model.prompt_format.encode(_conversation(row, f"prompt {i}").prompt()).ids for i, row in enumerate(prompts)]
    engine = Engine(
        decoder,
        model.prompt_format.stop_ids,
        EngineOptions(min(batch_size, len(ids)), max(map(len, ids)) + sampling.max_new_tokens),
        decode=model.prompt_format.tokenizer.decode_answer,
        adapters={name: read_adapter(decoder, folder) for name, folder in adapters.items()},
    )
    answers: dict[str | int, Answer] = {}
    requests = [Request(p, sampling, i, name) for i, (p, name) in enumerate(zip(ids, names, strict=True))]
    engine.run(requests, answers.__setitem__)
    failed = [f"prompt {i}: {answers[i].error}" for i in range(len(ids)) if answers[i].error]
    if failed:
        raise UserError(f"{len(failed)} of {len(ids)} answers failed, the first one: {failed[0]}")
    return [answers[i] for i in range(len(ids))]


def _conversation(row: Row, where: str) -> Conversation:
    if isinstance(row, Conversation):
        return row
    return Conversation((Message("user", row),), where) if isinstance(row, str) else to_conversation(dict(row), where)
