"""inspect_ai's requests as this project's, and answers as inspect_ai's: what cannot be done is refused by name."""

import secrets
from collections.abc import Sequence
from typing import Any

from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    ContentText,
    GenerateConfig,
    Logprob,
    Logprobs,
    ModelOutput,
    ModelUsage,
    StopReason,
    TopLogprob,
)
from inspect_ai.tool import ToolInfo

from ptst.errors import UserError
from ptst.generation.request import Answer, Sampling
from ptst.text.segments import Conversation, Message
from ptst.text.tokenizer import Tokenizer

NEW_TOKENS = 1024  # where a task sets no limit; less where the context ends
SEED_BITS = 53  # of a seed that is drawn here: every program reads such a number from JSON as it is
# What inspect_ai itself does with them, or what is about tools alone, which are refused.
_INSPECTS_OWN = {"max_retries", "timeout", "attempt_timeout", "stream_idle_timeout", "max_connections", "cache"}
_INSPECTS_OWN |= {"adaptive_connections", "system_message", "max_tool_output", "fail_on_refusal", "reasoning_history"}
_INSPECTS_OWN |= {"parallel_tool_calls", "internal_tools"}
_MAPPED = {"max_tokens", "temperature", "top_p", "top_k", "seed", "stop_seqs", "num_choices"}
_MAPPED |= {"logprobs", "top_logprobs"}
_NEUTRAL: dict[str, tuple[Any, ...]] = {  # values that change nothing
    "best_of": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "cache_prompt": (True, "auto"),
    "fallback_models": ([],),
    "reasoning_effort": ("none",),
    "batch": (False,),
    "extra_headers": ({},),
    "extra_body": ({},),
    "modalities": ([],),
}


def to_conversation(messages: Sequence[ChatMessage], tools: Sequence[ToolInfo] = ()) -> Conversation:
    """The conversation to continue. Raises UserError for tools, for content other than text, and for messages that are
    not an optional system message, then user and assistant in turn, ending with the user."""
    if tools:
        named = ", ".join(tool.name for tool in tools)
        raise UserError(f"this model calls no tools, and the task offers {named}", "use a task without tools")
    conversation = Conversation(tuple(Message(m.role, _text(m)) for m in messages))
    if conversation.answered:
        raise UserError("the last message is the assistant's, so that there is nothing to answer")
    return conversation


def _text(message: ChatMessage) -> str:
    if message.role == "tool" or (isinstance(message, ChatMessageAssistant) and message.tool_calls):
        raise UserError("a message is a tool call or its result, which this model has no words for")
    for part in [] if isinstance(message.content, str) else message.content:
        if not isinstance(part, ContentText):
            raise UserError(f"a {message.role} message holds {part.type}; this model reads text alone")
    return message.text


def to_sampling(config: GenerateConfig, room: int) -> Sampling:
    """How answers are drawn, of at most `room` tokens. Temperature and the rest are 1, as everywhere in inspect_ai,
    where the task sets none; a seed that it does not set is drawn. Raises UserError for an option that is not supported
    and for a value out of range."""
    for name, value in config.model_dump(exclude_none=True).items():
        if name in _INSPECTS_OWN | _MAPPED or any(value == same for same in _NEUTRAL.get(name, ())):
            continue
        raise UserError(f"the option {name} is not supported", "leave it out: nothing is ignored in silence")
    if config.top_logprobs and not config.logprobs:
        raise UserError("top_logprobs needs logprobs", "set logprobs, too")
    if config.num_choices is not None and config.num_choices < 1:
        raise UserError(f"num_choices is {config.num_choices}", "it must be at least 1")
    if config.max_tokens is not None and config.max_tokens < 1:
        raise UserError(f"max_tokens is {config.max_tokens}", "it must be at least 1")
    return Sampling(
        max_new_tokens=min(NEW_TOKENS if config.max_tokens is None else config.max_tokens, room),
        temperature=1.0 if config.temperature is None else config.temperature,
        top_p=1.0 if config.top_p is None else config.top_p,
        seed=secrets.randbits(SEED_BITS) if config.seed is None else config.seed,
        top_k=config.top_k or 0,
        stop_strings=tuple(config.stop_seqs or ()),
        logprobs=bool(config.logprobs),
        top_logprobs=config.top_logprobs or 0,
    )


def stop_reason(finish_reason: str, new_tokens: int | None = None, limit: int | None = None) -> StopReason:
    """Of an answer; `model_length` where the context, not the `limit` that the task set, left it only `new_tokens`."""
    if finish_reason != "length":
        return "stop" if finish_reason in ("stop", "stop_string") else "unknown"
    return "model_length" if new_tokens is not None and new_tokens < (limit or NEW_TOKENS) else "max_tokens"


def to_output(
    model: str,
    prompt_tokens: int,
    answers: Sequence[Answer],
    sampling: Sampling,
    limit: int | None,
    tokenizer: Tokenizer,
) -> ModelOutput:
    """The answers, in order, as inspect_ai has them. A prompt counts once, however many choices it has."""
    cached = min(answer.num_cached_tokens for answer in answers)
    written = sum(len(answer.token_ids) for answer in answers)
    usage = ModelUsage(
        input_tokens=prompt_tokens - cached,
        input_tokens_cache_read=cached,
        output_tokens=written,
        total_tokens=prompt_tokens + written,
    )
    choices = [
        ChatCompletionChoice(
            message=ChatMessageAssistant(content=answer.text, model=model, source="generate"),
            stop_reason=stop_reason(answer.finish_reason, sampling.max_new_tokens, limit),
            logprobs=_logprobs(answer, tokenizer) if sampling.logprobs else None,
        )
        for answer in answers
    ]
    metadata = {"seed": sampling.seed} if sampling.temperature else None
    return ModelOutput(model=model, choices=choices, usage=usage, input_context_tokens=prompt_tokens, metadata=metadata)


def _logprobs(answer: Answer, tokenizer: Tokenizer) -> Logprobs:
    def spelled(number: int, logprob: float) -> dict[str, Any]:
        found = tokenizer.token_bytes(number)
        return {"token": found.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(found)}

    tops = answer.top_logprobs or [[]] * len(answer.token_ids)
    content = [
        Logprob(
            **spelled(number, logprob),
            top_logprobs=[TopLogprob(**spelled(*pair)) for pair in top] if answer.top_logprobs else None,
        )
        for number, logprob, top in zip(answer.token_ids, answer.logprobs or (), tops, strict=True)
    ]
    return Logprobs(content=content)
