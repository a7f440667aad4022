"""The prompt format: template x chat format x task format (family) x tokenizer, put together in one place for training,
testing, auditing, chatting and judging, so that these cannot differ."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ptst.errors import UserError
from ptst.text.chat_template import with_default_system_prompt
from ptst.text.encode import Example, encode
from ptst.text.formats import detect_format, eos_ids, marks, terminator
from ptst.text.segments import Conversation
from ptst.text.templates import Family, Template, find_family, render
from ptst.text.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class PromptFormat:
    """Everything that turns a conversation into ids: shared by training and testing, so that they cannot differ."""

    template: Template
    family: Family
    chat_format: str
    tokenizer: Tokenizer
    allow_role_markers: bool = False
    eos_ids: frozenset[int] = frozenset()
    """End-of-sequence ids that the model folder names besides the format's terminator."""

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer: the trained terminator and the folder's end-of-sequence ids."""
        return self.eos_ids | {terminator(None if self.template.is_text else self.chat_format, self.tokenizer)}

    @property
    def described(self) -> str:
        """`chat format chatml, family gsm8k`."""
        chat_format = "none (text template)" if self.template.is_text else self.chat_format
        return f"chat format {chat_format}, family {self.family.name}"

    def encode(self, conversation: Conversation, train: str = "all") -> Example:
        """Ids of the whole conversation, or, where it ends in a user turn, of the generation prompt.

        Raises UserError, naming the row, for what the template or format cannot say, for text that is not Unicode,
        and, unless `allow_role_markers`, for messages that hold the chat format's own marks where those are plain text.
        """
        if not self.allow_role_markers and not self.template.is_text:
            reject_role_markers(conversation, self.chat_format)
        segments = render(conversation, self.template, self.family, self.chat_format, self.tokenizer, train)
        try:
            return encode(segments, self.tokenizer)
        except ValueError as error:
            raise UserError(f"{conversation.where}{error}") from None


def reject_role_markers(conversation: Conversation, chat_format: str) -> None:
    """Raise UserError if a message spells a mark of the format that is plain text: the model could not tell it from
    a real one, so a user's text could open or close a turn."""
    for number, message in enumerate(conversation.messages, 1):
        for mark in marks(chat_format):
            if mark in message.content:
                raise UserError(
                    f"{conversation.where}message {number} ({message.role}) holds {mark}, a role marker of the format "
                    f"{chat_format}; take it out, or allow it with --allow role-markers"
                )


def open_prompt_format(
    folder: Path,
    template: Template,
    family: str,
    chat_format: str | None = None,
    *,
    vocab_size: int | None = None,
    allow_role_markers: bool = False,
) -> PromptFormat:
    """The prompt format of a model folder. `chat_format` None: the folder's own; `vocab_size`: embedding rows of the
    model, which the tokenizer must not exceed.

    Raises UserError for an unknown family, a tokenizer that is absent or damaged, a chat format that cannot be told.
    """
    tokenizer = load_tokenizer(folder, vocab_size)
    chat_format = chat_format or detect_format(folder, tokenizer)
    template = with_default_system_prompt(template, folder)
    return PromptFormat(template, find_family(family), chat_format, tokenizer, allow_role_markers, eos_ids(folder))
