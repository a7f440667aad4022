"""Replies of a grader behind an OpenAI-compatible endpoint."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ptst.settings import ApiSettings
from ptst.text.segments import Message


class ApiAsk:
    """An `Ask`: prompts and the number of the attempt in; for each a reply, or the error that prevented it.

    A tuple of messages is a conversation (`/chat/completions`); a text is sent as it is (`/completions`). Raises
    UserError, when it is made, where the package openai or the key is missing or the endpoint's address cannot be one;
    when it is called, where the endpoint answers nobody.
    """

    def __init__(self, model: str, max_new_tokens: int, settings: ApiSettings = ApiSettings()):
        raise NotImplementedError

    def keep_in(self, folder: Path) -> None:
        """Read and record replies in FOLDER/replies.MODEL.jsonl from now on."""
        raise NotImplementedError

    def record(self) -> dict[str, Any]:
        """What replies depend on besides the prompt: endpoint, model, parameters."""
        raise NotImplementedError

    def __call__(self, prompts: Sequence[str | tuple[Message, ...]], attempt: int = 0) -> list[str | Exception]:
        raise NotImplementedError
