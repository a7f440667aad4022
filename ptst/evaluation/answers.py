"""A model's answers to conversations under a template, kept on disk as they come.

Every finished answer is a line of a JSONL file before the next step begins, under a key made of all that it depends on:
the prompt's ids, the sampling, the request's number. An evaluation that was killed reads the file and asks only for
what is missing; a last line that a kill tore is dropped.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ptst.errors import UserError
from ptst.generation.engine import Engine
from ptst.generation.multi_lora import Adapter
from ptst.generation.request import Answer, EngineOptions, Request, Sampling, Statistics
from ptst.model.decoder import Decoder
from ptst.text.prompt_format import PromptFormat
from ptst.text.segments import Conversation


@dataclass(frozen=True)
class Reply:
    """Text and token count of an answer; `cut`: the token limit ended it."""

    text: str
    tokens: int
    cut: bool


class AnswerFile:
    """Answers by key. Raises UserError for a line, other than a torn last one, that is not an answer."""

    def __init__(self, path: Path):
        self.path = path
        self.known: dict[str, Reply] = {}
        raw = path.read_bytes() if path.exists() else b""
        whole = raw[: raw.rfind(b"\n") + 1]
        if whole != raw:
            with open(path, "rb+") as file:
                file.truncate(len(whole))
        # Not splitlines: an answer may hold other line separators, which JSON leaves as they are.
        for number, line in enumerate(whole.decode().split("\n")[:-1], 1):
            try:
                row = json.loads(line)
                key = row.pop("key")
                self.known[key] = Reply(**row)
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f"{path}:{number} is no answer; delete the line and it is asked for anew") from None

    def add(self, key: str, answer: Reply) -> None:
        """Keep an answer; it is with the operating system when this returns."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, **asdict(answer)}, ensure_ascii=False) + "\n")
        self.known[key] = answer


@dataclass(frozen=True)
class Answerer:
    """A model under a template. `on_progress(answers done, statistics)` hears of those on the disk and then of every
    finished answer; `kv_memory` is what the key/value cache may take, in bytes (None: what is free). `adapter` names
    the one of `adapters` that answers (None: the decoder as it stands); those of `beside` answer the same into files of
    their own, in one batch with it.
    """

    decoder: Decoder
    prompt_format: PromptFormat
    stop_ids: frozenset[int]
    batch_size: int
    kv_memory: int | None = None
    on_progress: Callable[[int, Statistics], None] = lambda _done, _statistics: None
    adapter: str | None = None
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    beside: Mapping[str | None, Path] = field(default_factory=dict)

    @property
    def chosen(self) -> Adapter | None:
        """The adapter itself."""
        return None if self.adapter is None else self.adapters[self.adapter]

    def answer(
        self, conversations: Sequence[Conversation], sampling: Sampling, path: Path | None = None
    ) -> list[Reply]:
        """An answer for each conversation, in order; those that are in the file at `path` are taken from it.

        Raises UserError for a prompt that the template cannot say or that does not fit, before anything is asked, and,
        after all others are kept, for answers of `adapter` that went wrong in the model.
        """
        paths = {self.adapter: path, **self.beside}
        prompts = [self.prompt_format.encode(c.prompt()).ids for c in conversations]
        keys = [_key(number, prompt, sampling) for number, prompt in enumerate(prompts)]
        files = {adapter: AnswerFile(path) if path is not None else None for adapter, path in paths.items()}
        answers: dict[str | None, dict[int, Reply]] = {
            adapter: {i: file.known[key] for i, key in enumerate(keys) if file and key in file.known}
            for adapter, file in files.items()
        }
        missing = {
            i if adapter is None else f"{adapter}:{i}": (adapter, i)
            for adapter in paths
            for i in range(len(prompts))
            if i not in answers[adapter]
        }
        errors: list[str] = []
        if missing:
            engine = Engine(
                self.decoder,
                self.stop_ids,
                EngineOptions(
                    batch_size=min(self.batch_size, len(missing)),
                    max_length=max(len(prompts[i]) for _, i in missing.values()) + sampling.max_new_tokens,
                    kv_memory=self.kv_memory,
                ),
                decode=self.prompt_format.tokenizer.decode_answer,
                adapters={name: self.adapters[name] for name in paths if name is not None},
            )
            requests = [Request(prompts[i], sampling, name, adapter) for name, (adapter, i) in missing.items()]
            for request in requests:
                try:
                    engine.check(request)
                except ValueError as error:
                    raise UserError(f"{conversations[missing[request.id][1]].where}{error}") from None

            def done(name: str | int, answer: Answer) -> None:
                adapter, number = missing[name]
                if answer.error is not None:
                    # Those beside are asked again when it is their turn, and hold nobody else up.
                    if adapter == self.adapter:
                        errors.append(f"{conversations[number].where}{answer.error}")
                    return
                reply = Reply(answer.text, len(answer.token_ids), answer.truncated)
                answers[adapter][number] = reply
                if file := files[adapter]:
                    file.add(keys[number], reply)
                self.on_progress(sum(map(len, answers.values())), engine.statistics)

            self.on_progress(sum(map(len, answers.values())), engine.statistics)
            engine.run(requests, done)
        if errors:
            raise UserError(f"{len(errors)} of {len(prompts)} answers failed, the first one: {errors[0]}")
        return [answers[self.adapter][i] for i in range(len(prompts))]


def _key(number: int, prompt: list[int], sampling: Sampling) -> str:
    digest = hashlib.sha256(array("q", prompt).tobytes())
    digest.update(repr((number, sampling)).encode())
    return digest.hexdigest()[:32]
