"""What a client is told when a request cannot be answered, in the form of OpenAI's API."""

from collections.abc import Mapping
from typing import Any

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An HTTP error. `param`: the field of the request that is wrong, as OpenAI names it (`messages[1].role`); `code`:
    a short name for programs."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The error as a client gets it, in an answer or in a stream."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def stopping() -> ApiError:
    """The server has been asked to stop."""
    headers = {"retry-after": "5", "connection": "close"}
    return ApiError("the server is stopping", status=503, code="server_stopping", headers=headers)
