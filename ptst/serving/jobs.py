"""A client's request as work for the engine, and its answers as they come: whole, or as a stream of chunks."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ptst.errors import UserError
from ptst.generation.request import Answer, Event, Request, Sampling
from ptst.generation.score import Scored
from ptst.serving.errors import ApiError
from ptst.serving.models import ServedModel
from ptst.serving.parse import ChatRequest, CompletionRequest, Options
from ptst.serving.replies import (
    FINISH_REASONS,
    SSE_DONE,
    Head,
    ScoredTokens,
    Usage,
    chat_logprobs,
    completion_logprobs,
    sse,
    text_length,
)
from ptst.serving.worker import EngineThread, Events, Ticket
from ptst.text.tokenizer import Tokenizer

SEED_BITS = 53  # of a seed that is drawn here: every program reads such a number from JSON as it is


@dataclass(eq=False)
class Job:
    """What one HTTP request asks of the engine: `n` choices of each prompt. `echoed`: for a completion with echo, the
    text of each prompt; `opening_tokens`: control tokens before a prompt that was a text, which have no text."""

    head: Head
    options: Options
    prompts: list[list[int]]
    sampling: Sampling | None  # None: nothing is generated
    echoed: list[str] | None = None
    opening_tokens: int = 0
    usage: Usage = field(default_factory=Usage)

    @property
    def model(self) -> ServedModel:
        return self.head.model

    @property
    def tokenizer(self) -> Tokenizer:
        return self.model.prompt_format.tokenizer

    @property
    def is_chat(self) -> bool:
        return self.head.kind == "chat.completion"

    @property
    def num_sequences(self) -> int:
        """Sequences that it computes, those that are only scored included."""
        return len(self.prompts) * (self.options.n if self.sampling is not None else 1)

    def requests(self) -> list[Request]:
        """One for each choice, those of the first prompt first. The random numbers of a choice depend on the seed and
        its number alone: the same prompt with the same seed has the same answers, whatever else is asked."""
        if self.sampling is None:
            return []
        p = self.model.prompt_format
        return [
            Request(
                ids,
                self.sampling,
                f"{self.head.id}-{number}-{choice}",
                self.model.adapter,
                keep_cached=True,
                draw=choice,
                stop_ids=p.stop_ids,
                decode=p.tokenizer.decode_answer,
                stream=self.options.stream,
            )
            for number, ids in enumerate(self.prompts)
            for choice in range(self.options.n)
        ]


def chat_job(request: ChatRequest, model: ServedModel, default_tokens: int) -> Job:
    """The prompt is what the evaluation reads: the conversation under the model's prompt format. Raises ApiError."""
    p = model.prompt_format
    try:
        if request.opening is None:
            ids = p.encode(request.conversation).ids
        else:
            ids = p.encode_opening(request.conversation, request.opening).ids
    except UserError as error:
        raise ApiError(str(error), "messages", code="invalid_value") from None
    return _job("chat.completion", request.options, model, [ids], default_tokens)


def completion_job(request: CompletionRequest, model: ServedModel, default_tokens: int) -> Job:
    """Prompts as they are, without the template's words. Raises ApiError for a text that spells a control token, which
    would be read as plain text."""
    tokenizer = model.prompt_format.tokenizer
    opening = [tokenizer.control_id(name) for name in tokenizer.opening]
    prompts, texts = [], []
    for prompt in request.prompts:
        if isinstance(prompt, str):
            if spelled := next((name for name in tokenizer.control_names.values() if name in prompt), None):
                cause = f"the prompt holds {spelled}, and a text never becomes a control token here"
                raise ApiError(f"{cause}; send token ids, or use /v1/chat/completions", "prompt", code="invalid_value")
            try:
                after = tokenizer.opening[-1] if opening else None
                prompts.append([*opening, *tokenizer.encode(prompt, after=after)])
            except UserError as error:
                raise ApiError(str(error), "prompt", code="invalid_value") from None
            texts.append(prompt)
        else:
            prompts.append(prompt)
            _check_ids(prompt, model)
            texts.append(tokenizer.decode(prompt))
    job = _job("text_completion", request.options, model, prompts, default_tokens)
    job.echoed = texts if request.echo else None
    job.opening_tokens = len(opening) if isinstance(request.prompts[0], str) else 0
    return job


def _check_ids(prompt: list[int], model: ServedModel) -> None:
    size = model.vocab_size
    if wrong := [t for t in prompt if not 0 <= t < size]:
        raise ApiError(f"prompt holds the token {str(wrong[0])[:30]}, outside 0..{size - 1}", "prompt")


def _job(kind: str, options: Options, model: ServedModel, prompts: list[list[int]], default_tokens: int) -> Job:
    longest = max(map(len, prompts))
    if not all(prompts):
        raise ApiError("the prompt has no tokens", "messages" if kind == "chat.completion" else "prompt")
    room = model.max_length - longest
    asked = options.max_tokens
    if room < (0 if asked == 0 else 1) or (asked is not None and asked > room):
        much = "" if asked is None else f" and {asked} new ones"
        cause = f"a prompt of {longest} tokens{much} exceed the {model.max_length} tokens that a request may have"
        raise ApiError(cause, options.limit if room > 0 else None, code="context_length_exceeded")
    seed = secrets.randbits(SEED_BITS) if options.seed is None else options.seed
    new_tokens = min(default_tokens, room) if asked is None else asked
    sampling = (
        None
        if new_tokens == 0
        else Sampling(
            max_new_tokens=new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=seed,
            top_k=options.top_k,
            stop_strings=options.stop,
            logprobs=options.logprobs,
            top_logprobs=options.top_logprobs,
        )
    )
    usage = Usage(prompt_tokens=sum(map(len, prompts)))
    return Job(Head(kind, model, seed), options, prompts, sampling, usage=usage)


class Answering:
    """A job at the engine. `close` frees what it still holds there."""

    def __init__(self, job: Job, engine: EngineThread):
        self.job, self.engine = job, engine
        self.events: Events = asyncio.Queue()
        self.tickets: list[Ticket] = []
        requests = job.requests()
        for request in requests:
            try:
                engine.check(request)
            except UserError as error:
                raise ApiError(str(error), code="context_length_exceeded") from None
        for index, request in enumerate(requests):
            self.tickets.append(Ticket(request, index, self.events))
            engine.submit(self.tickets[-1])

    def close(self) -> None:
        """Cancel what is unfinished."""
        for ticket in self.tickets:
            self.engine.cancel(ticket)

    async def progress(self) -> AsyncIterator[tuple[Ticket, Event]]:
        """The events of all choices as they come. Raises ApiError for an answer that failed."""
        left, cached = len(self.tickets), list[int]()
        while left:
            ticket, event = await self.events.get()
            if event.answer is not None:
                left -= 1
                if event.answer.error is not None:
                    raise ApiError(event.answer.error, status=500, code="engine_error")
                self.job.usage.completion_tokens += len(event.answer.token_ids)
                cached.append(event.answer.num_cached_tokens)
                self.job.usage.cached_tokens = min(cached)
            yield ticket, event

    async def whole(self) -> dict[str, Any]:
        """The answer as one JSON object."""
        job, options = self.job, self.job.options
        scores = await self._scores()
        answers: dict[int, Answer] = {}
        async for ticket, event in self.progress():
            if event.answer is not None:
                answers[ticket.index] = event.answer
        choices = []
        for index in range(len(job.prompts) * options.n):
            number = index // options.n
            answer = answers.get(index) or Answer([], "", "length", [], top_logprobs=[])
            choices.append(self._choice(index, number, answer, scores[number] if scores else None))
        reply = {**job.head.to_json(), "choices": choices, "usage": job.usage.to_json()}
        if options.return_token_ids and job.is_chat:
            reply["prompt_token_ids"] = job.prompts[0]
        return reply

    async def stream(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events."""
        job, options = self.job, self.job.options
        chunks = [_Chunks(job, index) for index in range(len(self.tickets))]
        extra = {"usage": None} if options.include_usage else {}

        def spelled(choices: list[dict[str, Any]]) -> bytes:
            return sse({**job.head.to_json(chunk=True), "choices": choices, **extra})

        async for ticket, event in self.progress():
            for choice in chunks[ticket.index].take(event):
                yield spelled([choice])
        if options.include_usage:
            extra["usage"] = job.usage.to_json()  # type: ignore[assignment]
            yield spelled([])
        yield SSE_DONE

    async def _scores(self) -> list[Scored]:
        """Of every prompt's tokens but the first, where they are to be returned."""
        job, options = self.job, self.job.options
        if job.echoed is None or not options.logprobs:
            return []
        rows = [(ids, [False] + [True] * (len(ids) - 1)) for ids in job.prompts]
        long = [row for row in rows if len(row[0]) > 1]
        found = iter(await self.engine.score(long, job.model.adapter, options.top_logprobs) if long else ())
        return [next(found) if len(ids) > 1 else Scored([]) for ids in job.prompts]

    def _choice(self, index: int, number: int, answer: Answer, score: Scored | None) -> dict[str, Any]:
        job, options = self.job, self.job.options
        reason = FINISH_REASONS[answer.finish_reason]
        scored = ScoredTokens(answer.token_ids, answer.logprobs or (), answer.top_logprobs or ())
        ids = {"token_ids": answer.token_ids} if options.return_token_ids else {}
        if job.is_chat:
            logprobs = chat_logprobs(job.tokenizer, scored) if options.logprobs else None
            message = {"role": "assistant", "content": answer.text, "refusal": None}
            return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason, **ids}
        text, silent = answer.text, 0
        if job.echoed is not None:
            text, silent = job.echoed[number] + text, job.opening_tokens
        if score is not None:
            scored = _joined(job.prompts[number], score, answer, options.top_logprobs)
        logprobs = completion_logprobs(job.tokenizer, scored, silent) if options.logprobs else None
        ids |= {"prompt_token_ids": job.prompts[number]} if ids else {}
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason, **ids}


def _joined(prompt: list[int], score: Scored, answer: Answer, top: int) -> ScoredTokens:
    """A prompt's tokens with its answer's; nothing predicts the first token."""
    return ScoredTokens(
        [*prompt, *answer.token_ids],
        [None, *score.logprobs, *(answer.logprobs or ())],
        [None, *score.top_logprobs, *(answer.top_logprobs or ())] if top else (),
    )


class _Chunks:
    """One choice of a stream: its chunks, from the engine's events."""

    def __init__(self, job: Job, index: int):
        self.job, self.index = job, index
        self.begun = False
        self.held: list[Event] = []  # events whose text is not certain yet
        self.offset = 0  # characters of tokens sent

    def take(self, event: Event) -> list[dict[str, Any]]:
        """The choice's entries in the next chunks."""
        self.held.append(event)
        first = [] if self.begun or not self.job.is_chat else [self._choice({"role": "assistant", "content": ""})]
        self.begun = True
        text = "".join(e.text for e in self.held)
        tokens = [t for e in self.held for t in e.token_ids]
        if event.answer is None and not text:
            return first
        more = []
        if text or tokens:
            more = [self._choice({"content": text} if self.job.is_chat else text, tokens)]
            self.held = []
        if event.answer is not None:
            reason = FINISH_REASONS[event.answer.finish_reason]
            more.append(self._choice({} if self.job.is_chat else "", reason=reason))
        return first + more

    def _choice(self, new: Any, tokens: Sequence[int] = (), reason: str | None = None) -> dict[str, Any]:
        job, options = self.job, self.job.options
        logprobs = None
        if options.logprobs and tokens:
            values = [v for e in self.held for v in e.logprobs or ()]
            scored = ScoredTokens(tokens, values, [top for e in self.held for top in e.top_logprobs or ()])
            if job.is_chat:
                logprobs = chat_logprobs(job.tokenizer, scored)
            else:
                logprobs = completion_logprobs(job.tokenizer, scored)
                logprobs["text_offset"] = [self.offset + offset for offset in logprobs["text_offset"]]
                self.offset += sum(text_length(job.tokenizer, t) for t in tokens)
        ids = {"token_ids": list(tokens)} if options.return_token_ids else {}
        key = "delta" if job.is_chat else "text"
        return {"index": self.index, key: new, "logprobs": logprobs, "finish_reason": reason, **ids}
