"""A model's answers to prompts, kept on disk as they are made.

Every finished answer is a line of a JSONL file before the next step begins, with all that it depends on (the model, the
prompt and its ids, the sampling), what is judged (the bare request, its id and category) and a checksum. An evaluation
that was killed reads the file and generates only what is missing; other judges can judge the answers at any time. An
incomplete last line is dropped; any other that does not belong is refused.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from ptst.errors import UserError
from ptst.evaluation.readings import Readings, compare
from ptst.evaluation.tasks.distance import Reading
from ptst.evaluation.tasks.task import Prompt
from ptst.generation.engine import Engine
from ptst.generation.multi_lora import Adapter
from ptst.generation.read import ReadPrompt
from ptst.generation.request import Answer, EngineOptions, Request, Sampling, Statistics
from ptst.generation.score import token_log_probabilities
from ptst.model.decoder import Decoder
from ptst.reading import check_regular, parse_json
from ptst.settings import EngineSettings
from ptst.storage import append_jsonl, refuse_link
from ptst.text.prompt_format import PromptFormat
from ptst.threads import SlowDown

Pending = dict[tuple[int, int], Request]  # number of the set, and of its prompt -> what is asked


_AGAIN = "delete the file to generate its answers again"


@dataclass(frozen=True)
class Asked:
    """What answers depend on: the prompts' ids (of a model behind an API: what is sent, as JSON), the sampling, and a
    fingerprint of the model ("" where it has none). `prompts`: in words, kept with the answers."""

    ids: Sequence[list[int] | bytes]
    sampling: Sampling
    model: str = ""
    prompts: Sequence[Prompt] = ()

    @classmethod
    def of(cls, prompts: Sequence[Prompt], prompt_format: PromptFormat, sampling: Sampling, model: str = "") -> "Asked":
        """What is asked with those of `prompts` that are answered."""
        asked = [p for p in prompts if p.kind == "generate"]
        return cls([p.encode(prompt_format).ids for p in asked], sampling, model, asked)

    def described(self, number: int) -> dict[str, Any]:
        """A prompt and the sampling in words."""
        if not self.prompts:
            return {}
        prompt = self.prompts[number]
        words = {"id": prompt.conversation.source, "category": prompt.category, "request": prompt.request}
        messages = [{"role": m.role, "content": m.content} for m in prompt.conversation.prompt().messages]
        return {**words, "messages": messages, "sampling": asdict(self.sampling)}

    def key(self, number: int, seed: int | None = None) -> str:
        """Of the answer to prompt `number`, drawn with this seed (None: that of the sampling)."""
        sampling = self.sampling if seed is None else replace(self.sampling, seed=seed)
        ids = self.ids[number]
        digest = hashlib.sha256(ids if isinstance(ids, bytes) else array("q", ids).tobytes())
        digest.update(repr((number, sampling)).encode())
        return digest.hexdigest()[:32]

    def check(self, row: Mapping[str, Any], where: str) -> None:
        """Raise UserError for an answer of another model, to another prompt, or with other sampling."""
        if row["model"] != self.model:
            cause = f"is an answer of other weights ({row['model'] or 'none'}) than those measured now ({self.model})"
            raise UserError(cause, f"put those back, or {_AGAIN}", where)
        if not 0 <= row["index"] < len(self.ids) or row["key"] != self.key(row["index"], row["seed"]):
            raise UserError("is an answer to another prompt, or drawn with other settings", _AGAIN, where)


class AnswerFile:
    """Answers by key, in memory only where there is no path. Raises UserError for a line, other than an incomplete last
    one, that is not an answer to what is asked."""

    def __init__(self, path: Path | None, asked: Asked):
        self.path, self.asked = path, asked
        self.known: dict[str, Answer] = {}
        if path and path.exists():
            cut_torn_line(path)
            for where, row in read_answers(path):
                asked.check(row, where)
                self.known[row["key"]] = Answer(row["token_ids"], row["text"], row["finish_reason"])

    def find(self, number: int) -> Answer | None:
        """The answer to a prompt, if there is one."""
        return self.known.get(self.asked.key(number))

    def add(self, number: int, answer: Answer, **more: Any) -> None:
        """Keep an answer; the operating system has it when this returns. `more`: what an API says of it."""
        asked, key = self.asked, self.asked.key(number)
        row = {"key": key, "model": asked.model, "index": number, "seed": asked.sampling.seed}
        row |= {"token_ids": answer.token_ids, "text": answer.text, "finish_reason": answer.finish_reason}
        row |= asked.described(number) | more
        if self.path:
            append_jsonl(self.path, {**row, "check": _checksum(row)})
        self.known[key] = answer


def read_answers(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and record of every answer in a file; an incomplete last line is left out. Raises UserError for any other
    line that is not as it was written."""
    check_regular(path)
    # Not splitlines: an answer may contain other line separators, which JSON does not escape.
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        yield (where := f"{path}:{number}"), _read_row(line, where)


def cut_torn_line(path: Path) -> None:
    """Remove what a kill left of a file's last line."""
    check_regular(path)
    raw = path.read_bytes()
    if (whole := raw.rfind(b"\n") + 1) < len(raw):
        refuse_link(path)
        os.truncate(path, whole)


def _read_row(line: bytes, where: str) -> dict[str, Any]:
    """A line as it was written. Raises UserError for any other."""
    try:
        row = parse_json(line.decode())
        if row.keys() == {"key", "token_ids", "text", "finish_reason"}:
            raise UserError("was written by an earlier version of ptst, which kept no fingerprints", _AGAIN, where)
        if row.pop("check") == _checksum(row):
            return row
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise UserError("is not a valid record", "delete the line to regenerate it", where)


def _checksum(row: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(row).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class AskedSet:
    """Prompts that one adapter (None: the decoder alone) answers under one template, into a file (None: in memory)."""

    adapter: str | None
    prompts: Sequence[Prompt]
    prompt_format: PromptFormat
    sampling: Sampling
    path: Path | None

    def open(self, model: str) -> AnswerFile:
        """The file, with the answers that it has; `model`: a fingerprint of what answers."""
        ids = [p.encode(self.prompt_format).ids for p in self.prompts]
        return AnswerFile(self.path, Asked(ids, self.sampling, model, self.prompts))

    def request(self, file: AnswerFile, number: int, name: int) -> Request:
        """What is asked with a prompt. Its random numbers are the same whatever else is asked."""
        draw = number if self.adapter is None else f"{self.adapter}:{number}"
        ids, stops = file.asked.ids[number], self.prompt_format.stop_ids
        assert not isinstance(ids, bytes), "an endpoint's"
        decode = self.prompt_format.tokenizer.decode_answer
        return Request(ids, self.sampling, name, self.adapter, draw=draw, stop_ids=stops, decode=decode)


@dataclass(frozen=True)
class Answerer:
    """A model under a template. `on_progress(number of answers, statistics)` is called with those on disk, and after
    every decoding step. `adapter`: the one of `adapters` that answers (None: the decoder alone). `besides`: what else
    is answered in the same batches, by it or by others of `adapters`. `models`: by adapter, a fingerprint of all that
    its answers depend on besides prompt and sampling. `trained_with`: the prompt format of the training, with which
    prompts that are read are compared; `readings`: what was read before."""

    decoder: Decoder
    prompt_format: PromptFormat
    engine: EngineSettings = field(default_factory=EngineSettings)
    on_progress: Callable[[int, Statistics], None] = lambda _done, _statistics: None
    adapter: str | None = None
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    besides: Sequence[AskedSet] = ()
    models: Mapping[str | None, str] = field(default_factory=dict)
    trained_with: PromptFormat | None = None
    readings: Readings = field(default_factory=Readings)

    def answer(self, prompts: Sequence[Prompt], sampling: Sampling, path: Path | None = None) -> list[Answer]:
        """An answer for each prompt, in order, a Reading for those of kind "prompt"; generated ones that the file at
        `path` has are taken from there.

        Raises UserError for a prompt that the template cannot express or that does not fit, before anything is
        computed, and, after all others are kept, for answers of `adapter` that failed in the model.
        """
        found: dict[str, Iterator[Answer]] = {
            "generate": iter(self._generate([p for p in prompts if p.kind == "generate"], sampling, path)),
            "loglikelihood": iter(self._score([p for p in prompts if p.kind == "loglikelihood"])),
            "prompt": iter(self._read([p for p in prompts if p.kind == "prompt"])),
        }
        return [next(found[p.kind]) for p in prompts]

    def _read(self, prompts: Sequence[Prompt]) -> list[Reading]:
        """Raises UserError as `read_prompts`, and where the prompt of the training cannot be written."""
        if not prompts:
            return []
        adapter = None if self.adapter is None else self.adapters[self.adapter]
        model, watch = self.models.get(self.adapter, ""), partial(SlowDown().watch, self.decoder.device)
        ids = [p.encode(self.prompt_format).ids for p in prompts]
        read = self.readings.read(model, self.decoder, ids, adapter, watch)
        trained_ids: list[list[int] | None] = [None] * len(ids)
        trained: list[ReadPrompt | None] = [None] * len(ids)
        if self.trained_with is not None:
            own = [p.encode(self.trained_with).ids for p in prompts]
            trained_ids, trained = [*own], [*self.readings.read(model, self.decoder, own, adapter, watch)]
        self.on_progress(len(prompts), Statistics())
        return [compare(*each) for each in zip(ids, read, trained_ids, trained, strict=True)]

    def _score(self, prompts: Sequence[Prompt]) -> list[Answer]:
        adapter = None if self.adapter is None else self.adapters[self.adapter]
        longest, device = self.decoder.config.max_positions, self.decoder.device
        answers: list[Answer] = []
        slow_down = SlowDown()
        # The openings of one conversation share its whole prompt, which is computed once for them.
        for _, alike in groupby(prompts, lambda p: None if p.opening is None else id(p.conversation)):
            group = list(alike)
            examples = [p.encode(self.prompt_format) for p in group]
            for p, e in zip(group, examples, strict=True):
                if len(e.ids) > longest:
                    cause = f"{len(e.ids)} tokens exceed the model's {longest} positions"
                    raise UserError(cause, "leave it out", p.conversation.source)
            self.on_progress(len(answers), Statistics())
            rows = [(e.ids, e.loss_mask) for e in examples]
            logprobs = token_log_probabilities(self.decoder, rows, adapter, partial(slow_down.watch, device))
            for p, e, row in zip(group, examples, logprobs, strict=True):
                given = [token for token, flag in zip(e.ids, e.loss_mask, strict=True) if flag]
                text = p.conversation.messages[-1].content if p.opening is None else p.opening
                answers.append(Answer(given, text, "stop", row))
            self.on_progress(len(answers), Statistics())
        return answers

    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling, path: Path | None) -> list[Answer]:
        sets = [AskedSet(self.adapter, prompts, self.prompt_format, sampling, path), *self.besides]
        files = [each.open(self.models.get(each.adapter, "")) for each in sets]
        missing = [(s, i) for s, file in enumerate(files) for i in range(len(file.asked.ids)) if file.find(i) is None]
        pending: Pending = {(s, i): sets[s].request(files[s], i, name) for name, (s, i) in enumerate(missing)}
        failed: list[str] = []
        total = sum(len(file.asked.ids) for file in files)

        def on_done(name: str | int, answer: Answer) -> None:
            assert isinstance(name, int)
            number, i = missing[name]
            if answer.error is None:
                files[number].add(i, answer)
                del pending[number, i]
            elif number == 0:  # failed answers of other sets are generated again in their turn
                failed.append(f"{prompts[i].conversation.where}{answer.error}")
            on_step(engine.statistics)

        slow_down, before = SlowDown(), Statistics()

        def on_step(statistics: Statistics) -> None:
            nonlocal before
            tokens = statistics.tokens + statistics.prompt_tokens - before.tokens - before.prompt_tokens
            if statistics.steps > before.steps:
                slow_down.took(self.decoder.device, tokens, statistics.seconds - before.seconds)
            before = replace(statistics)
            self.on_progress(total - len(pending), statistics)

        if pending:
            engine = self._start(pending, sets)
            on_step(engine.statistics)
            engine.run(list(pending.values()), on_done, on_step=on_step)
        if failed:
            raise UserError(f"{len(failed)} of {len(prompts)} answers failed, the first: {failed[0]}")
        return [files[0].known[files[0].asked.key(i)] for i in range(len(prompts))]

    def _start(self, pending: Pending, sets: Sequence[AskedSet]) -> Engine:
        """An engine for these requests, which are checked."""
        engine = Engine(
            self.decoder,
            self.prompt_format.stop_ids,
            EngineOptions(
                batch_size=min(self.engine.batch_size, len(pending)),
                max_length=max(len(r.prompt) + r.sampling.max_new_tokens for r in pending.values()),
                kv_memory=self.engine.kv_bytes,
            ),
            decode=self.prompt_format.tokenizer.decode_answer,
            adapters={r.adapter: self.adapters[r.adapter] for r in pending.values() if r.adapter is not None},
        )
        for (number, i), request in pending.items():
            try:
                engine.check(request)
            except UserError as error:
                source = sets[number].prompts[i].conversation.source
                error.where = ": ".join(filter(None, (source, error.where)))
                raise
        return engine
