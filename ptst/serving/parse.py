"""Requests as clients send them, checked: what would change an answer and is not supported is refused by name.

The fields are those of OpenAI's /v1/chat/completions and /v1/completions, and of vLLM's additions `top_k`,
`continue_final_message`, `add_generation_prompt` and `return_token_ids`.
"""

import json
from dataclasses import dataclass
from typing import Any

from ptst.errors import UserError
from ptst.serving.errors import ApiError
from ptst.serving.fields import Fields
from ptst.text.segments import Conversation, Message

MAX_CHOICES = 128  # of one request; OpenAI's limit
MAX_TOP_LOGPROBS = 20  # OpenAI's limit
MAX_STOP_STRINGS = 4  # OpenAI's limit
MAX_STOP_LENGTH = 1000  # characters
MAX_SEED = 2**63
COMPLETION_TOKENS = 16  # the default of OpenAI's /v1/completions

# Values that change nothing, of fields that are not supported.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "repetition_penalty": (1, 1.0),
    "length_penalty": (1, 1.0),
    "min_p": (0, 0.0),
    "min_tokens": (0,),
    "logit_bias": ({},),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
}
_NEUTRAL_IN_CHAT: dict[str, tuple[Any, ...]] = {
    **_NEUTRAL,
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
}
_HARMLESS: tuple[str, ...] = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
_HARMLESS += ("prompt_cache_retention", "parallel_tool_calls")
_EMPTY_IN_MESSAGES: dict[str, tuple[Any, ...]] = {
    "refusal": (),
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "tool_calls": ([],),
    "name": (),
}
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """How answers are drawn and returned. `max_tokens` and `seed` None: not said. `limit`: the field that says
    `max_tokens`. `top_logprobs` counts only with `logprobs`."""

    model: str
    max_tokens: int | None
    limit: str
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    n: int
    stop: tuple[str, ...]
    logprobs: bool
    top_logprobs: int
    stream: bool
    include_usage: bool
    return_token_ids: bool


@dataclass(frozen=True)
class ChatRequest:
    """Messages to answer; `opening`: the beginning of the answer, to be continued."""

    options: Options
    conversation: Conversation
    opening: str | None


@dataclass(frozen=True)
class CompletionRequest:
    """Prompts to continue, each a text or token ids. `echo`: the prompt is part of what is returned."""

    options: Options
    prompts: tuple[str | list[int], ...]
    echo: bool


def parse_body(body: bytes) -> Any:
    """The value of a JSON body. Raises ApiError for what is not JSON in UTF-8, for numbers that are not (NaN), for
    fields that come twice, and for nesting or numbers beyond reason."""
    try:
        return json.loads(body.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_no_duplicates)
    except UnicodeDecodeError as error:
        raise ApiError(f"the body is not UTF-8: byte {error.start}", code="invalid_json") from None
    except json.JSONDecodeError as error:
        raise ApiError(f"the body is not JSON: {error.msg} at character {error.pos}", code="invalid_json") from None
    except RecursionError:
        raise ApiError("the body is nested too deeply", code="invalid_json") from None
    except ValueError:
        raise ApiError("the body holds a number of thousands of digits", code="invalid_json") from None


def _no_constant(name: str) -> Any:
    raise ApiError(f"the body holds {name}, which is not JSON", code="invalid_json")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ApiError("the body holds an object with a key that comes twice", code="invalid_json")
    return found


def parse_chat(value: Any) -> ChatRequest:
    """The request of /v1/chat/completions. Raises ApiError."""
    fields = Fields(value)
    fields.neutral(_NEUTRAL_IN_CHAT)
    logprobs = bool(fields.boolean("logprobs"))
    top = fields.integer("top_logprobs", 0, MAX_TOP_LOGPROBS)
    if top is not None and not logprobs:
        raise fields.wrong("top_logprobs", "needs logprobs to be true", code="invalid_value")
    limits = [key for key in ("max_completion_tokens", "max_tokens") if fields.integer(key, 1) is not None]
    if len(limits) == 2 and fields.raw(limits[0]) != fields.raw(limits[1]):
        raise fields.wrong("max_tokens", "is not max_completion_tokens; give one of them", code="invalid_value")
    max_tokens = fields.integer(limits[0], 1) if limits else None
    options = _options(fields, (max_tokens, limits[0] if limits else "max_tokens"), logprobs, top or 0)
    messages = read_messages(fields)
    opening = _opening(fields, messages)
    fields.ignore(_HARMLESS)
    fields.finish()
    try:
        conversation = Conversation(tuple(messages if opening is None else messages[:-1]))
    except UserError as error:
        raise ApiError(str(error), "messages", code="invalid_value") from None
    return ChatRequest(options, conversation, opening)


def parse_completion(value: Any) -> CompletionRequest:
    """The request of /v1/completions. Raises ApiError."""
    fields = Fields(value)
    n = fields.integer("n", 1, MAX_CHOICES) or 1
    fields.neutral({**_NEUTRAL, "suffix": ("",), "best_of": (n,)})
    top = fields.integer("logprobs", 0, MAX_TOP_LOGPROBS)
    echo = bool(fields.boolean("echo"))
    max_tokens = fields.integer("max_tokens", 0 if echo else 1)
    max_tokens = COMPLETION_TOKENS if max_tokens is None else max_tokens
    options = _options(fields, (max_tokens, "max_tokens"), top is not None, top or 0)
    if echo and options.stream:
        raise fields.wrong("echo", "is not supported with stream", code="unsupported_parameter")
    prompts = _prompts(fields)
    fields.ignore(_HARMLESS)
    fields.finish()
    return CompletionRequest(options, prompts, echo)


def _options(fields: Fields, limit: tuple[int | None, str], logprobs: bool, top_logprobs: int) -> Options:
    model = fields.text("model")
    if not model:
        raise fields.wrong("model", "is missing; /v1/models lists the names", code="missing_required_parameter")
    temperature, top_p = fields.number("temperature", 0, 2), fields.number("top_p", 0, 1)
    if temperature and temperature < 1e-5:
        raise fields.wrong("temperature", "must be at least 0.00001, or 0 for greedy answers", code="invalid_value")
    if top_p == 0:
        raise fields.wrong("top_p", "must be above 0", code="invalid_value")
    stream = bool(fields.boolean("stream"))
    return Options(
        model=model,
        max_tokens=limit[0],
        limit=limit[1],
        temperature=1.0 if temperature is None else temperature,
        top_p=1.0 if top_p is None else top_p,
        top_k=max(0, fields.integer("top_k", -1) or 0),
        seed=fields.integer("seed", -MAX_SEED, MAX_SEED - 1),
        n=fields.integer("n", 1, MAX_CHOICES) or 1,
        stop=_stop(fields),
        logprobs=logprobs,
        top_logprobs=top_logprobs,
        stream=stream,
        include_usage=_include_usage(fields, stream),
        return_token_ids=bool(fields.boolean("return_token_ids")),
    )


def _stop(fields: Fields) -> tuple[str, ...]:
    value = fields.raw("stop")
    found = [] if value is None else value if isinstance(value, list) else [value]
    stop = tuple(fields.as_text("stop", each) for each in found)
    if len(stop) > MAX_STOP_STRINGS or not all(0 < len(each) <= MAX_STOP_LENGTH for each in stop):
        must = f"must be at most {MAX_STOP_STRINGS} texts of 1 to {MAX_STOP_LENGTH} characters"
        raise fields.wrong("stop", must, code="invalid_value")
    return stop


def _include_usage(fields: Fields, stream: bool) -> bool:
    value = fields.raw("stream_options")
    if value is None:
        return False
    if not stream:
        raise fields.wrong("stream_options", "needs stream to be true", code="invalid_value")
    options = Fields(value, "stream_options")
    options.neutral({"continuous_usage_stats": (False,)})
    options.ignore(("include_obfuscation",))
    include = bool(options.boolean("include_usage"))
    options.finish()
    return include


def read_messages(fields: Fields) -> list[Message]:
    """The messages of a chat request, of any order. Raises ApiError."""
    value = fields.raw("messages")
    if not isinstance(value, list) or not value:
        raise fields.wrong("messages", "must be a list of at least one message", code="invalid_type")
    return [_message(Fields(each, f"messages[{i}]")) for i, each in enumerate(value)]


def _message(fields: Fields) -> Message:
    role = fields.text("role") or ""
    if role not in _ROLES:
        named = "is missing" if not role else "is not supported here"
        raise fields.wrong("role", f"{named}; use {', '.join(_ROLES)}", code="invalid_value")
    fields.neutral(_EMPTY_IN_MESSAGES)
    content = fields.raw("content")
    if isinstance(content, list):
        content = "\n".join(_part(Fields(part, f"{fields.name('content')}[{i}]")) for i, part in enumerate(content))
    elif content is None:
        raise fields.wrong("content", "is missing", code="missing_required_parameter")
    text = fields.as_text("content", content)
    fields.finish()
    return Message(_ROLES[role], text)


def _part(fields: Fields) -> str:
    if fields.text("type") != "text":
        raise fields.wrong("type", "is not supported here; only text is", code="invalid_value")
    text = fields.text("text")
    if text is None:
        raise fields.wrong("text", "is missing", code="missing_required_parameter")
    fields.finish()
    return text


def _opening(fields: Fields, messages: list[Message]) -> str | None:
    """The last message where it is the beginning of the answer."""
    continues = bool(fields.boolean("continue_final_message"))
    adds = fields.boolean("add_generation_prompt")
    last = messages[-1].role == "assistant"
    if continues != last:
        cause = "needs the last message to be the assistant's"
        if last:
            cause = "must be true where the last message is the assistant's: the answer then continues it"
        raise fields.wrong("continue_final_message", cause, code="invalid_value")
    if adds is not None and adds == continues:
        raise fields.wrong("add_generation_prompt", f"must be {str(not continues).lower()} here", code="invalid_value")
    if last and not messages[-1].content:
        raise ApiError("the last message is empty", f"messages[{len(messages) - 1}].content", code="invalid_value")
    return messages[-1].content if last else None


def _prompts(fields: Fields) -> tuple[str | list[int], ...]:
    """A text, texts, token ids, or lists of token ids."""
    value = fields.raw("prompt")
    if isinstance(value, str) or (isinstance(value, list) and value and all(type(t) is int for t in value)):
        value = [value]
    if not isinstance(value, list) or not value:
        raise fields.wrong("prompt", "must be a text, token ids, or a list of one kind", code="invalid_type")
    if len({isinstance(each, str) for each in value}) > 1:
        raise fields.wrong("prompt", "must not mix texts and token ids", code="invalid_type")
    for each in value:
        if isinstance(each, str):
            fields.as_text("prompt", each)
        elif not isinstance(each, list) or not each or not all(type(t) is int for t in each):
            raise fields.wrong("prompt", "must be a text, token ids, or a list of one kind", code="invalid_type")
    return tuple(value)
