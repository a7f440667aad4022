"""Requests to an OpenAI-compatible endpoint, and what came of each: a reply, or what is wrong in a sentence.

What passes is asked again (timeouts, rate limits, errors of the server), what cannot pass ends all asking (a wrong key,
no such model, nobody there), and anything else concerns one prompt. The client's own repeats are off: it would repeat
what cannot pass, and would wait for ever for a reply that trickles. The key is in no text that leaves this module, not
even where the endpoint repeats it; errors are returned, so that no exception holds the request that has the key.
"""

import asyncio
import base64
import logging
import math
import os
import random
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import unquote, urlsplit

from ptst.api.replies import Reply
from ptst.errors import Setting, UserError
from ptst.packages import check_package
from ptst.progress import say_once
from ptst.reading import parse_json

OPENAI = "https://api.openai.com/v1"
FIRST_WAIT = 1.0  # seconds; doubled each time, so that six repeats outlast a limit per minute
LONGEST_WAIT = 120.0  # seconds that an endpoint may ask for
MAX_REPLY = 4 << 20  # characters of an answer's body: no model says so much, and judges read all of it
GIVE_UP = 20  # prompts in a row without any reply
_CONNECT = 10.0  # seconds
_SHORT = 8  # a key below this length is a word like EMPTY, which replies may hold
# Parameters that some models refuse, and the name to try instead.
_OPTIONAL = {"max_tokens": "max_completion_tokens", "temperature": None, "top_p": None, "seed": None}
_REFUSED = re.compile(r"support|unknown|unrecogni|unexpected|not permitted|not allowed|extra|only the default", re.I)
_NO_MONEY = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")
_NO_MODEL = ("model_not_found", "invalid_model")
_LOGGERS = ("openai", "httpx", "httpx2", "httpcore", "httpcore2")
JUDGE_KEYS = ("OPENAI_API_KEY",)  # environment variables: the first that is set has the key
MODEL_KEYS = ("PTST_MODEL_API_KEY", "OPENAI_API_KEY")
_JUDGE_URL = Setting("api_base_url")


@dataclass(frozen=True)
class Trouble:
    """Why there is no reply. `again`: it may pass. `final`: it concerns every prompt. `wait`: seconds that the endpoint
    asks for. `rename`: the parameter to leave out or to spell otherwise. `counts`: nobody sensible answered.
    `filtered`: the prompt itself is declined. `status`: of the refusal."""

    words: str
    again: bool = False
    final: bool = False
    wait: float | None = None
    rename: str = ""
    counts: bool | None = None
    filtered: bool = False
    status: int | None = None


@dataclass(frozen=True)
class Address:
    """Where requests go, and what must never be shown: `url` is without user name and password."""

    url: str
    key: str
    authorization: str | None = None
    variable: str = "OPENAI_API_KEY"
    """The environment variable that has the key."""

    def __repr__(self) -> str:
        return f"Address({self.url!r})"

    @classmethod
    def of(cls, base_url: str | None, keys: Sequence[str] = JUDGE_KEYS, setting: Setting = _JUDGE_URL) -> "Address":
        """Of a base URL (the value of `setting`), by default `OPENAI_BASE_URL`, with the key in the first of the
        environment variables `keys` that is set. Raises UserError for what cannot be a URL or a key, and where there
        is no key; it shows neither, since either may hold a secret."""
        url = base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI
        parts = _split(url)
        if parts is None:
            cause = (setting, " (or OPENAI_BASE_URL) is not the address of an endpoint")
            raise UserError(cause, "it has the form https://HOST/v1, without ? and #")
        host, user, password = parts
        authorization = None
        if base_url and (user or password):
            cause = (setting, " holds a user name or a password, which records of settings would keep")
            raise UserError(cause, "give such an address as OPENAI_BASE_URL")
        if user or password:
            authorization = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
        found = {name: key for name in keys if (key := os.environ.get(name, "").strip())}
        variable = next(iter(found), keys[-1])
        key = found.get(variable, "")
        if not key and authorization is None:
            raise UserError(f"{variable} is not set", "a local server that needs no key takes any word")
        if not re.fullmatch(r"[!-~]*", key):
            raise UserError(f"{variable} holds a space or another character that no key has", "copy it again")
        return cls(host, key or "none", authorization, variable)

    def clean(self, text: str) -> str:
        """The text without the key, and without what UTF-8 cannot hold."""
        authorization = self.authorization or ""
        code = authorization.removeprefix("Basic ")
        password = base64.b64decode(code).decode().partition(":")[2]
        for secret in (self.key, code, password):
            if len(secret) >= _SHORT:
                text = text.replace(secret, f"[{self.variable}]")
        return text.encode(errors="backslashreplace").decode()


def _split(url: str) -> tuple[str, str, str] | None:
    """The URL without user name and password, these two; None for what is no base URL."""
    try:
        parts = urlsplit(url.strip())
        host, _ = parts.hostname, parts.port  # a port that is no number raises
        user, password = unquote(parts.username or ""), unquote(parts.password or "")
    except ValueError:
        return None
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment or "\\" in url:
        return None
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}", user, password


def model_address(base_url: str | None, recorded: str | None = None) -> Address:
    """The endpoint of a model under test, or to be trained. `recorded`: of the record of a run; a password in
    OPENAI_BASE_URL, which no record keeps, is used where that is the same address. Raises UserError as `Address.of`."""
    setting = Setting("base_url")
    if base_url is None and recorded is not None:
        try:
            if (address := Address.of(None, MODEL_KEYS, setting)).url == recorded:
                return address
        except UserError:  # of an address that is not used
            pass
    return Address.of(base_url or recorded, MODEL_KEYS, setting)


def check_client() -> None:
    """Raise UserError where the package openai is not installed."""
    check_package("openai", "models behind an API need", "api")


def client_options(address: Address, timeout: float) -> dict[str, Any]:
    """Options of OpenAI's client, one that waits or an asynchronous one: `timeout` seconds for an answer, and none of
    its own repeats."""
    from openai import Timeout

    quiet_loggers()
    return {
        "api_key": address.key,
        "base_url": address.url,
        "max_retries": 0,
        "timeout": Timeout(timeout, connect=min(_CONNECT, timeout)),
        "default_headers": {"Authorization": address.authorization} if address.authorization else None,
    }


def pause(trouble: Trouble, repeat: int) -> float:
    """Seconds before a repeat: what the endpoint asks for, or twice as long each time."""
    backoff = min(FIRST_WAIT * 2**repeat, LONGEST_WAIT) * (1 + random.random() / 4)
    return backoff if trouble.wait is None else trouble.wait


class Endpoint:
    """An address, asked within limits: seconds for one reply, repeats of one request."""

    def __init__(self, address: Address, timeout: float, retries: int):
        self.address, self.timeout, self.retries = address, timeout, retries
        self.spelling: dict[str, str | None] = {}  # parameters that this model wants otherwise (None: not at all)
        self.reached = self.replied = False
        self.in_a_row = 0

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Connections, and a new chance for what ended the last asking."""
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        self.ended = asyncio.Event()
        self.end: Trouble | None = None
        direct = DefaultAsyncHttpxClient(follow_redirects=False)  # prompts and key go to no other host
        options = client_options(self.address, self.timeout)
        async with AsyncOpenAI(http_client=direct, **options) as self.client:
            yield

    async def ask(self, request: dict[str, Any]) -> Reply | Trouble:
        """A reply, after as many repeats as it needs and may have."""
        repeat = 0
        while True:
            sent = dict(self.spelling)
            outcome = await self._try(_spelled(request, sent), last=repeat == self.retries)
            if isinstance(outcome, Reply):
                self.reached, self.replied, self.in_a_row = True, True, 0
                return outcome
            if outcome.rename and self._respell(outcome.rename, sent):
                continue
            if outcome.final or not outcome.again or repeat == self.retries or self.end:
                return self._judge(outcome)
            await self._pause(pause(outcome, repeat))
            if self.end:
                return outcome
            repeat += 1

    def _judge(self, trouble: Trouble) -> Trouble:
        """End all asking where this is what every prompt would get."""
        self.in_a_row += not self.replied if trouble.counts is None else trouble.counts
        if self.end is None and (trouble.final or self.in_a_row >= GIVE_UP):
            words = trouble.words if trouble.final else f"{trouble.words}, and so for {self.in_a_row} prompts in a row"
            self.end = Trouble(words, final=True)
            self.ended.set()
        return trouble

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.ended.wait()

    def _respell(self, name: str, sent: dict[str, str | None]) -> bool:
        """Spell a refused parameter otherwise, from now on; False where that was tried."""
        if self.spelling != sent:  # another request was refused just before
            return True
        if name in self.spelling:
            return False
        self.spelling[name] = new = _OPTIONAL[name]
        say_once(f"note: {self.address.url} refuses {name}; {f'asked with {new}' if new else 'asked without it'}")
        return True

    async def _try(self, request: dict[str, Any], last: bool) -> Reply | Trouble:
        import openai

        api = self.client.chat.completions if "messages" in request else self.client.completions
        try:
            async with asyncio.timeout(self.timeout):
                raw = await api.with_raw_response.create(**request)
            return read_reply(raw.text, self.address)
        except (TimeoutError, openai.APITimeoutError, openai.APIConnectionError) as error:
            return unreached(error, self.timeout, gone=last or not self.reached)
        except openai.APIStatusError as error:
            self.reached = True
            return read_refusal(error.status_code, error.body, error.response.headers, self.address)
        except UnicodeError:
            return Trouble("was not asked: the prompt holds a lone surrogate, which is not text")


def unreached(error: Exception, timeout: float, gone: bool) -> Trouble:
    """What it means that no answer came. `gone`: nobody there is final."""
    cause = type(error.__cause__).__name__
    if cause in ("ConnectError", "ConnectTimeout"):
        return Trouble("cannot be reached", again=True, final=gone)
    if cause == "UnsupportedProtocol":
        return Trouble("cannot be reached over its protocol", final=True)
    if isinstance(error, TimeoutError) or "Timeout" in cause:
        return Trouble(f"gave no reply within {timeout:g} s", again=True, counts=True)
    return Trouble("closed the connection before its reply was whole", again=True, counts=True)


def quiet_loggers() -> None:
    """Below a warning the client's libraries log headers, in which an endpoint may repeat the key."""
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)


def read_refusal(status: int, body: object, headers: Any, address: Address) -> Trouble:
    """What an answer with a status of 300 or more means."""
    return replace(_refusal(status, body, headers, address), status=status)


def _refusal(status: int, body: object, headers: Any, address: Address) -> Trouble:
    fields = body if isinstance(body, dict) else {}
    code = str(fields.get("code") or fields.get("type") or "")
    said = fields.get("message") or fields.get("detail") or ""
    message = " ".join(address.clean(said if isinstance(said, str) else str(said)).split())
    words = f"answers with status {status}" + (f" ({message[:200]})" if message else "")
    if status < 400:
        there = address.clean(str(headers.get("location")))[:200]
        return Trouble(
            f"redirects to {there!r} (status {status}), where nothing is sent; is its address right?", final=True
        )
    if status in (401, 403):  # not in its own words: they may hold a part of the key
        return Trouble(f"refuses the key in {address.variable} (status {status})", final=True)
    if code in _NO_MONEY or status == 402:
        return Trouble(f"has no credit left for this key (status {status})", final=True)
    if status in (404, 405) or code in _NO_MODEL:
        return Trouble(f"{words}; are its address and the model's name right?", final=True)
    if status in (408, 409, 429) or status >= 500:
        wait = retry_after(headers)
        if wait is not None and wait > LONGEST_WAIT:
            return Trouble(f"asks to wait for {wait:g} s (status {status})", final=True)
        return Trouble(words, again=True, wait=wait, counts=True)
    if code == "content_filter":
        return Trouble("refuses the prompt (its content filter)", counts=False, filtered=True)
    return Trouble(words, rename=_refused_parameter(str(fields.get("param") or ""), message))


def _spelled(request: dict[str, Any], spelling: dict[str, str | None]) -> dict[str, Any]:
    """A request with its parameters as the model wants them."""
    spelled = dict(request)
    for name, new in spelling.items():
        if name in spelled:
            value = spelled.pop(name)
            spelled |= {new: value} if new else {}
    return spelled


def _refused_parameter(param: str, message: str) -> str:
    """The optional parameter that an error is about; "" for none."""
    if not _REFUSED.search(message):
        return ""
    return next((n for n in _OPTIONAL if param == n or re.search(rf"\b{n}\b", message)), "")


def retry_after(headers: Any) -> float | None:
    """Seconds that an endpoint asks to wait, from its headers: a number, or a date; None where it asks for nothing."""
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        with suppress(TypeError, ValueError):
            seconds = float(headers.get(name)) / unit
            return None if math.isnan(seconds) else max(seconds, 0.0)
    with suppress(TypeError, ValueError):
        import time

        return max(parsedate_to_datetime(headers.get("retry-after")).timestamp() - time.time(), 0.0)
    return None


def read_reply(text: str, address: Address) -> Reply | Trouble:
    """The reply in the body of a successful answer."""
    if len(text) > MAX_REPLY:
        return Trouble(f"gave {len(text) >> 20:,} MB, which is no reply", counts=True)
    try:
        body = parse_json(text)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        beginning = " ".join(address.clean(text).split())[:40]
        return Trouble(f"gave no JSON object but {beginning!r}", counts=True)
    if isinstance(error := body.get("error"), dict):
        return Trouble(f"replied with an error ({address.clean(str(error.get('message')))[:200]})", counts=True)
    choices = body.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message", choice) if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        return Trouble("gave JSON without choices", counts=True)
    usage = body.get("usage")
    tokens_in, tokens_out = (
        n if isinstance(usage, dict) and type(n := usage.get(name)) is int and n >= 0 else None
        for name in ("prompt_tokens", "completion_tokens")
    )
    content, refusal = message.get("content", message.get("text")), message.get("refusal")
    if not isinstance(content, str | None) or not isinstance(refusal, str | None):
        return Trouble("gave a reply that is not text", counts=True)
    finish, served = (
        address.clean(str(value or ""))[:100] for value in (choice.get("finish_reason"), body.get("model"))
    )
    return Reply(address.clean(content or ""), address.clean(refusal or ""), finish, served, tokens_in, tokens_out)
