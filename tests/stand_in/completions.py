"""Chat completions and completions: parameters checked, answers given whole or streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from tests.stand_in.answers import limit, logprob, tokens
from tests.stand_in.faults import ApiError

Answer = Callable[[str, list[dict[str, Any]], Any], str]  # model, messages, salt -> text


def _check(body: dict[str, Any]) -> None:
    """Raise ApiError for what the API would refuse."""
    if not isinstance(body.get("model"), str):
        raise ApiError(400, "you must provide a model parameter", None, "model")
    ranges = {"temperature": (0, 2), "top_p": (0, 1), "n": (1, 128), "max_tokens": (1, 1e9), "top_logprobs": (0, 20)}
    for name, (least, most) in (ranges | {"max_completion_tokens": (1, 1e9)}).items():
        value = body.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ApiError(400, f"Invalid type for '{name}'", "invalid_type", name)
        if value is not None and not least <= value <= most:
            raise ApiError(400, f"Invalid '{name}': {value} is out of range", "invalid_value", name)


def _check_messages(body: dict[str, Any]) -> list[dict[str, Any]]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "Invalid 'messages': empty array or missing", "empty_array", "messages")
    for at, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant", "developer"):
            raise ApiError(400, f"Invalid value for 'messages[{at}].role'", "invalid_value", f"messages[{at}].role")
        if not isinstance(message.get("content"), str):
            raise ApiError(400, f"Invalid 'messages[{at}].content'", "invalid_type", f"messages[{at}].content")
    return messages


class Completion:
    """One request: its choices, in full or in chunks. `chat` False: the older completions, of a bare prompt."""

    def __init__(self, body: dict[str, Any], chat: bool, answer: Answer, number: int):
        _check(body)
        self.body, self.chat, self.number = body, chat, number
        prompts = body.get("prompt")
        if not chat and not isinstance(prompts, str) and not (isinstance(prompts, list) and len(prompts) == 1):
            raise ApiError(400, "Invalid 'prompt': one text is read", "invalid_type", "prompt")
        prompt = prompts if isinstance(prompts, str) else (prompts or [""])[0]
        messages = _check_messages(body) if chat else [{"role": "user", "content": prompt}]
        sampled = bool(body.get("temperature", 1.0))
        most = body.get("max_completion_tokens", body.get("max_tokens", None if chat else 16))
        stops = body.get("stop") or []
        stops = [stops] if isinstance(stops, str) else stops
        self.choices = []
        for index in range(body.get("n") or 1):
            salt = (body.get("temperature"), body.get("seed"), index) if sampled else None
            self.choices.append(limit(answer(body["model"], messages, salt), most, stops))
        self.tokens_in = sum(len(tokens(m["content"])) + 4 for m in messages)
        self.tokens_out = sum(len(tokens(text)) for text, _ in self.choices)

    @property
    def usage(self) -> dict[str, int]:
        total = self.tokens_in + self.tokens_out
        return {"prompt_tokens": self.tokens_in, "completion_tokens": self.tokens_out, "total_tokens": total}

    @property
    def head(self) -> dict[str, Any]:
        kind = "chat.completion" if self.chat else "text_completion"
        kind += ".chunk" if self.chat and self.body.get("stream") else ""
        fields = {"id": f"cmpl-{self.number}", "object": kind, "created": 1_700_000_000, "model": self.body["model"]}
        return fields | {"system_fingerprint": "fp_stand_in"}

    def logprobs(self, text: str, start: int = 0) -> dict[str, Any] | None:
        pieces = list(enumerate(tokens(text), start))
        if self.chat:
            if not self.body.get("logprobs"):
                return None
            top = self.body.get("top_logprobs") or 0
            return {"content": [logprob(piece, place, top) for place, piece in pieces], "refusal": None}
        if self.body.get("logprobs") is None:
            return None
        found = [logprob(piece, place, self.body["logprobs"]) for place, piece in pieces]
        tops = [{t["token"]: t["logprob"] for t in each["top_logprobs"]} for each in found]
        names, values = [each["token"] for each in found], [each["logprob"] for each in found]
        offsets = [sum(map(len, names[:i])) for i in range(len(names))]
        return {"tokens": names, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def whole(self) -> dict[str, Any]:
        choices = []
        for index, (text, finish) in enumerate(self.choices):
            said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
            choices.append({"index": index, **said, "logprobs": self.logprobs(text), "finish_reason": finish})
        return {**self.head, "choices": choices, "usage": self.usage}

    def chunks(self) -> Iterator[dict[str, Any]]:
        """The events of a stream, each with one token of one choice."""
        for index, (text, finish) in enumerate(self.choices):
            if self.chat:
                yield self._chunk(index, {"role": "assistant", "content": ""}, None, None)
            for place, piece in enumerate(tokens(text)):
                yield self._chunk(index, {"content": piece}, None, self.logprobs(piece, place))
            yield self._chunk(index, {} if self.chat else {"content": ""}, finish, None)
        if (self.body.get("stream_options") or {}).get("include_usage"):
            yield {**self.head, "choices": [], "usage": self.usage}

    def _chunk(self, index: int, delta: dict[str, Any], finish: str | None, logprobs: Any) -> dict[str, Any]:
        said = {"delta": delta} if self.chat else {"text": delta["content"]}
        return {**self.head, "choices": [{"index": index, **said, "logprobs": logprobs, "finish_reason": finish}]}
