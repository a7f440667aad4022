"""What can go wrong with a request, and the errors of the API in its own form."""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, replace
from typing import Any


class ApiError(Exception):
    """An answer with an error in OpenAI's form."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None, kind: str = ""):
        super().__init__(message)
        self.status = status
        kind = kind or ("server_error" if status >= 500 else "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class Fault:
    """What goes wrong with the requests whose path holds `path` and that are sent with `method`.

    `numbers`: which of those, counted from 0; None: every one. `share`: of them, drawn by number and `seed`.
    `status`, `message`, `code`, `headers`: of the error; with status 0 the request is answered as if nothing were
    wrong, but for `delay` seconds before the answer, or `cut` bytes of its body (counted in all that is streamed) after
    which the server hangs up. `body`: sent with status 200 in place of the answer: malformed JSON, a page of a proxy.
    `after`: the request does its work first, and only then is its answer lost."""

    status: int = 0
    path: str = ""
    method: str = ""
    numbers: Collection[int] | None = None
    share: float = 1.0
    seed: int = 0
    message: str = "the stand-in was told to fail"
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    cut: int | None = None
    body: str | None = None
    after: bool = False

    def concerns(self, method: str, path: str) -> bool:
        return self.path in path and self.method in ("", method)

    def strikes(self, number: int) -> bool:
        """Whether the request of that number, among those that it concerns, goes wrong."""
        if self.numbers is not None and number not in self.numbers:
            return False
        return self.share >= 1 or random.Random(f"{self.seed} {number}").random() < self.share

    def error(self) -> ApiError | None:
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, "")
        kind = self.code if self.code == "insufficient_quota" else kind
        return ApiError(self.status, self.message, self.code, kind=kind) if self.status else None

    def to_json(self) -> dict[str, Any]:
        return asdict(replace(self, numbers=None if self.numbers is None else sorted(self.numbers)))


def wrong_key() -> ApiError:
    message = "Incorrect API key provided. You can find your API key in the settings of your account."
    return ApiError(401, message, "invalid_api_key", kind="authentication_error")


def no_model(name: str) -> ApiError:
    message = f"The model `{name}` does not exist or you do not have access to it."
    return ApiError(404, message, "model_not_found", "model")
