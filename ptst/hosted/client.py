"""Files and fine-tuning jobs of an endpoint, through OpenAI's own client.

What only reads is asked again where that may help. What starts something is asked once: whoever calls finds out what
became of it. As in `ptst.api`, the key is in no message, and errors are returned, so that no exception holds the
request that has it. Answers are read as JSON, since endpoints differ in the fields that they fill.
"""

import base64
import binascii
import math
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, Self

from ptst.api.endpoint import Address, Trouble, client_options, pause, read_refusal, unreached
from ptst.errors import UserError, Words
from ptst.reading import parse_json

TIMEOUT = 60.0  # seconds for an answer
UPLOAD_TIMEOUT = 1800.0
RETRIES = 8  # of what only reads: outlasts some minutes without a network
PAGE = 100  # items of a list at once
Json = dict[str, Any]
Call = Callable[[Any], Any]  # of the client: one request, its raw answer
_TEXT, _ITEM, _PAGE = "text", "an id", "a list"  # what an answer is, or the JSON object must have


class JobsClient:
    """An endpoint, from `with` on."""

    def __init__(self, address: Address):
        self.address = address
        self.reached = False

    def __enter__(self) -> Self:
        from openai import DefaultHttpxClient, OpenAI

        direct = DefaultHttpxClient(follow_redirects=False)  # data and key go to no other host
        self._client = OpenAI(http_client=direct, **client_options(self.address, TIMEOUT))
        return self

    def __exit__(self, _kind: type | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self._client.close()

    def files(self) -> Iterator[Json]:
        """The files for fine-tuning, newest first."""
        return self._pages(
            lambda client, after: client.files.with_raw_response.list(purpose="fine-tune", limit=PAGE, **after)
        )

    def file(self, id: str) -> Json | None:
        """A file; None where there is none of this id."""
        found = self._repeated(lambda client: client.files.with_raw_response.retrieve(id), id=id)
        return self._unless_lost(found)

    def upload(self, name: str, content: bytes) -> Json | Trouble:
        """Send a training file, once."""
        return self._once(
            lambda client: client.files.with_raw_response.create(
                file=(name, content, "application/jsonl"), purpose="fine-tune", timeout=UPLOAD_TIMEOUT
            )
        )

    def text(self, id: str) -> str | None:
        """The content of a file that a job made: text, also where the endpoint sends it in base64. None where it cannot
        be had."""
        found = self._repeated(lambda client: client.files.with_raw_response.content(id), _TEXT)
        if isinstance(found, Trouble):
            return None
        try:
            return self.address.clean(base64.b64decode(found, validate=True).decode())
        except (binascii.Error, ValueError):
            return str(found)

    def jobs(self, metadata: dict[str, str]) -> Iterator[Json]:
        """The fine-tuning jobs, newest first. An endpoint may leave out those with other metadata, and may not."""
        asked = {f"metadata[{key}]": value for key, value in metadata.items()}
        return self._pages(
            lambda client, after: client.fine_tuning.jobs.with_raw_response.list(limit=PAGE, extra_query=asked, **after)
        )

    def create(self, request: Json, metadata: dict[str, str]) -> Json | Trouble:
        """Start a job, once. This is what costs."""
        body = {"metadata": metadata}
        return self._once(lambda client: client.fine_tuning.jobs.with_raw_response.create(**request, extra_body=body))

    def job(self, id: str) -> Json | None:
        """A job; None where there is none of this id."""
        found = self._repeated(lambda client: client.fine_tuning.jobs.with_raw_response.retrieve(id), id=id)
        return self._unless_lost(found)

    def events(self, id: str) -> Iterator[Json]:
        """The events of a job, newest first."""
        return self._pages(
            lambda client, after: client.fine_tuning.jobs.with_raw_response.list_events(id, limit=PAGE, **after)
        )

    def cancel(self, id: str) -> Json | Trouble:
        """Ask for a job to end. One that has been cancelled is, though the answer that said so may be lost."""
        found = self._repeated(lambda client: client.fine_tuning.jobs.with_raw_response.cancel(id), id=id)
        if isinstance(found, Trouble):
            with suppress(UserError):
                if (job := self.job(id)) is not None and job.get("status") == "cancelled":
                    return job
        return found

    def error(self, trouble: Trouble, remedy: Words = "") -> UserError:
        """The sentence that says what is wrong."""
        return UserError(f"{self.address.url} {trouble.words}", remedy)

    def _pages(self, call: Callable[..., Any]) -> Iterator[Json]:
        """All items of a list that comes in pages. Raises UserError where one does not come."""
        after: Json = {}
        while True:
            page = self._repeated(partial(call, after=after), _PAGE)
            if isinstance(page, Trouble):
                raise self.error(page)
            found = [item for item in page["data"] or () if isinstance(item, dict)]
            yield from found
            last = str(found[-1].get("id")) if found else None
            if not page.get("has_more") or last is None or after.get("after") == last:
                return
            after = {"after": last}

    def _unless_lost(self, found: Json | Trouble) -> Json | None:
        """None for what there is not. Raises UserError for any other trouble."""
        if not isinstance(found, Trouble):
            return found
        if found.status != 404:
            raise self.error(found)
        return None

    def _repeated(self, call: Call, kind: str = _ITEM, id: str | None = None) -> Any:
        """What a request that only reads gives, asked again where that may help; Trouble where nothing does."""
        for repeat in range(RETRIES + 1):
            found = self._once(call, kind, id)
            if not isinstance(found, Trouble) or found.final or not found.again or repeat == RETRIES:
                return found
            wait_before_repeat(found, repeat)
        raise AssertionError

    def _once(self, call: Call, kind: str = _ITEM, id: str | None = None) -> Any:
        """What one request gives: a JSON object of this kind (`id`: that one), or the text, or Trouble."""
        import openai

        try:
            text = call(self._client).text
            text = text() if callable(text) else text
        except openai.APIStatusError as error:
            self.reached = True
            return read_refusal(error.status_code, error.body, error.response.headers, self.address)
        except openai.APIConnectionError as error:
            return unreached(error, TIMEOUT, gone=not self.reached)
        self.reached = True
        return self.address.clean(text) if kind == _TEXT else self._read(text, kind, id)

    def _read(self, text: str, kind: str, id: str | None) -> Json | Trouble:
        """The JSON object in an answer. What is not of its kind is never taken for an empty list, say, since jobs would
        then be started again."""
        try:
            body = parse_json(text)
        except ValueError:
            body = None
        if not isinstance(body, dict):
            beginning = " ".join(self.address.clean(text).split())[:40]
            return Trouble(f"gave no JSON object but {beginning!r}", again=True)
        found: Json = self._cleaned(body)
        if kind == _PAGE:
            whole = "data" in found and isinstance(found["data"], list | None)
        else:
            whole = isinstance(found.get("id"), str) and id in (None, found["id"])
        if whole:
            return found
        if isinstance(error := found.get("error"), dict):
            return Trouble(f"replied with an error ({' '.join(str(error.get('message')).split())[:200]})", again=True)
        return Trouble(f"gave JSON without {'the id asked for' if id else kind}", again=True)

    def _cleaned(self, value: Any) -> Any:
        """A value of JSON without the key, wherever an endpoint repeats it, and without what JSON does not have."""
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)
        if isinstance(value, str):
            return self.address.clean(value)
        if isinstance(value, list):
            return [self._cleaned(item) for item in value]
        if isinstance(value, dict):
            return {self.address.clean(name): self._cleaned(item) for name, item in value.items()}
        return value


def wait_before_repeat(trouble: Trouble, repeat: int) -> None:
    """As long as the endpoint asks for, or twice as long each time."""
    time.sleep(pause(trouble, repeat))
