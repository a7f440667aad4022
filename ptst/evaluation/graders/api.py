"""Replies of a grader behind an OpenAI-compatible endpoint: many requests at once, each reply recorded as it comes.

Prompts are sent as data: each message is a JSON string, so that no judged text can add a message or change a role.
Names of control tokens in judged text are broken, because servers of open models would read them as the tokens.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ptst.api.asking import ask_all
from ptst.api.endpoint import Address, Endpoint, Trouble, check_client
from ptst.api.replies import Reply, ReplyFile, Usage
from ptst.errors import UserError
from ptst.evaluation.graders.quote import without_control_tokens
from ptst.evaluation.verdicts import judge_name_in_files
from ptst.progress import ProgressLine, say_once
from ptst.settings import ApiSettings
from ptst.text.segments import Message

RETRY_TEMPERATURE = 0.7  # of all attempts but the first, which is greedy
_DEFAULT = ApiSettings()


class ApiAsk:
    """An `Ask`: prompts and the number of the attempt in; for each a reply, or the error that prevented it.

    A tuple of messages is a conversation (`/chat/completions`); a text is sent as it is (`/completions`). Raises
    UserError, when it is made, where the package openai or the key is missing or the endpoint's address cannot be one;
    when it is called, where the endpoint would answer no prompt. `usage`: of all replies that it gave, `new_usage`: of
    those among them that were asked for just now.
    """

    def __init__(self, model: str, max_new_tokens: int, settings: ApiSettings = _DEFAULT):
        settings.check_api()
        check_client()
        if not model:
            raise UserError("a judge by API needs a model's name", "say api:MODEL")
        self.model, self.settings = model, settings
        self.max_tokens = settings.api_max_tokens or max_new_tokens
        self.endpoint = Endpoint(Address.of(settings.api_base_url), settings.api_timeout, settings.api_retries)
        self.file = ReplyFile()
        self.usage = self.new_usage = Usage()
        self._counted: set[str] = set()

    def keep_in(self, folder: Path) -> None:
        """Read and record replies in FOLDER/replies.MODEL.jsonl from now on."""
        self.file = ReplyFile(folder / f"replies.{judge_name_in_files(self.model)}.jsonl")

    def record(self) -> dict[str, Any]:
        """What replies depend on besides the prompt; the first attempt is greedy."""
        return {"endpoint": self.endpoint.address.url, "model": self.model, "max_tokens": self.max_tokens}

    def __call__(self, prompts: Sequence[str | tuple[Message, ...]], attempt: int = 0) -> list[str | Exception]:
        requests = [self._request(prompt, attempt) for prompt in prompts]
        keys = [self._key(request, attempt) for request in requests]
        asked = dict(zip(keys, requests, strict=True))  # the same prompt only once
        with self.file.held():
            known = self.file.known
            for key in asked.keys() & known.keys():
                self._count(key, known[key])
            missing = {key: request for key, request in asked.items() if key not in known}
            troubles = self._ask(missing, len(asked)) if missing else {}
            return [_outcome(known[key]) if key in known else UserError(troubles[key]) for key in keys]

    def _count(self, key: str, reply: Reply) -> None:
        if key not in self._counted:
            self._counted.add(key)
            self.usage += reply

    def _request(self, prompt: str | tuple[Message, ...], attempt: int) -> dict[str, Any]:
        if isinstance(prompt, str):
            content: dict[str, Any] = {"prompt": _safe(prompt)}
        else:
            content = {"messages": [{"role": m.role, "content": _safe(m.content)} for m in prompt]}
        temperature = RETRY_TEMPERATURE if attempt else 0.0
        sampling = {"max_tokens": self.max_tokens, "temperature": temperature, "seed": attempt}
        return {"model": self.model, **content, **sampling}

    def _key(self, request: Mapping[str, Any], attempt: int) -> str:
        content = json.dumps([self.endpoint.address.url, request, attempt], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:32]

    def _ask(self, requests: Mapping[str, dict[str, Any]], total: int) -> dict[str, str]:
        """Ask for replies and keep them; what is wrong with the others, in words. Raises UserError for what is wrong
        with all."""
        troubles: dict[str, str] = {}
        done = first = total - len(requests)
        url, price = self.endpoint.address.url, self.settings.api_price
        with ProgressLine(f"replies of {self.model}", total, first=first) as line:

            def on_outcome(key: str, outcome: Reply | Trouble) -> None:
                nonlocal done
                done += 1
                if isinstance(outcome, Reply):
                    self.file.add(key, outcome)
                    self.new_usage += outcome
                    self._count(key, outcome)
                else:
                    troubles[key] = f"{url} {outcome.words}"
                failed = f", {len(troubles):,} without a reply" if troubles else ""
                line.update(done, self.usage.words(price) + failed)

            ask_all(self.endpoint, requests, self.settings.api_concurrency, on_outcome, self._kept)
        return troubles

    def _kept(self) -> str:
        return f"{self.usage.replies:,} replies are kept" if self.file.path else "no more prompts were sent"


def _outcome(reply: Reply) -> str | UserError:
    """The text of a reply, or the error that says why there is none to read."""
    if reply.finish_reason == "content_filter":
        return UserError("the endpoint's content filter stopped the reply")
    if reply.refusal:
        return UserError(f"the model refuses to grade: {reply.refusal[:200]}")
    if reply.text.strip():
        return reply.text
    if reply.finish_reason == "length":
        return UserError(f"the reply ended at {reply.tokens_out} tokens, before its text", "allow more tokens")
    return UserError(f"the reply is empty (finish reason {reply.finish_reason or 'not given'})")


def _safe(text: str) -> str:
    """The text to send, without names of control tokens in what is judged: all of it, or the parts that say so."""
    parts = getattr(text, "parts", ((text, True),))
    safe = "".join(without_control_tokens(part) if judged else part for part, judged in parts)
    if safe != text:
        say_once("note: judged texts name control tokens; each name is sent with a space in it, as in < |im_end|>")
    return safe
