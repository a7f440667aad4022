"""The prompt format: template x chat format x task format (family) x tokenizer, put together in one place for training,
testing, auditing, chatting and judging, so that these cannot differ."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ptst.collector import paused_collector
from ptst.errors import Setting, UserError
from ptst.text.chat_formats import NO_CHAT_FORMAT, ChatFormat
from ptst.text.detect import Found, check_name, find_format
from ptst.text.encode import Example, encode, encode_forms, without_swallowed
from ptst.text.row_forms import Forms, Row
from ptst.text.segments import Conversation, Message, Segment
from ptst.text.templates import Family, Template, find_family, render, with_default_system_prompt
from ptst.text.tokenizer import Tokenizer, configured_ends, load_tokenizer


@dataclass(frozen=True)
class PromptFormat:
    """Everything that turns a conversation into ids. `eos_ids`: end-of-sequence ids that the model folder names.
    `found`: in words, how the chat format was found and how it compares with the folder's chat template. `folder`: the
    model folder that it was opened from, None for one put together by hand."""

    template: Template
    family: Family
    chat_format: ChatFormat
    tokenizer: Tokenizer
    allow_role_markers: bool = False
    eos_ids: frozenset[int] = frozenset()
    found: str = ""
    folder: Path | None = None

    def with_template(self, template: Template) -> "PromptFormat":
        """The same under another template; `model-default` is the system prompt that the folder's chat template
        inserts."""
        template = template if self.folder is None else with_default_system_prompt(template, self.folder)
        return replace(self, template=template)

    @property
    def terminator_id(self) -> int:
        """Id of the token that ends an answer: the chat format's terminator; EOS under a `text:` template."""
        own = None if self.template.is_text else self.chat_format.terminator
        return self.tokenizer.control_id(own or self.tokenizer.eos or "")

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer: the trained terminator and the folder's end-of-sequence ids."""
        return self.eos_ids | {self.terminator_id}

    @property
    def format_name(self) -> str:
        """The chat format's name for reports."""
        return "none (text template)" if self.template.is_text else self.chat_format.name

    @property
    def described(self) -> str:
        """`chat format chatml, family gsm8k (the chat format is as the folder's chat template has it)`."""
        found = "" if self.template.is_text or not self.found else f" (the chat format is {self.found})"
        return f"chat format {self.format_name}, family {self.family.name}{found}"

    def segments(self, conversation: Conversation, train_on: str = "all") -> list[Segment]:
        """The conversation's segments (`templates.render`). Raises UserError for what template or format lack."""
        segments = render(conversation, self.template, self.family, self.chat_format, self.tokenizer, train_on)
        return without_swallowed(segments, self.tokenizer)

    def encode(self, conversation: Conversation, train_on: str = "all") -> Example:
        """Ids of the whole conversation, or, where it ends in a user turn, of the generation prompt. Raises UserError,
        naming the row, for what the template or format cannot express, for text that is not Unicode, and, unless
        `allow_role_markers`, for messages that hold the chat format's role markers as plain text."""
        (found,) = self.encode_all([conversation], train_on)
        if isinstance(found, UserError):
            raise found
        return found

    def encode_all(self, conversations: Sequence[Conversation], train_on: str = "all") -> list[Example | UserError]:
        """Many conversations at once, several times faster than one by one. Of one that `encode` refuses, the error."""
        with paused_collector():
            forms = Forms(lambda conversation: self.segments(conversation, train_on), self.tokenizer)
            rows = [self._row_or_error(conversation, forms) for conversation in conversations]
            encoded = encode_forms(rows, self.tokenizer)
        return [
            UserError(found.cause, found.remedy, conversation.source) if isinstance(found, UserError) else found
            for found, conversation in zip(encoded, conversations, strict=True)
        ]

    def encode_opening(self, conversation: Conversation, opening: str) -> Example:
        """Ids of a conversation that ends in a user turn, with the unfinished beginning of its answer: no closing text,
        no terminator. Raises UserError as `encode`."""
        begun = Conversation((*conversation.messages, Message("assistant", opening)), conversation.source)
        self.check_role_markers(begun)
        segments = self.segments(begun, "last")
        end = max(i for i, s in enumerate(segments) if s.author == "assistant")
        return encode(segments[: end + 1], self.tokenizer)

    def _row_or_error(self, conversation: Conversation, forms: Forms) -> Row | UserError:
        try:
            self.check_role_markers(conversation)
            return forms.row(conversation)
        except UserError as error:
            return error

    def check_role_markers(self, conversation: Conversation) -> None:
        """Raise UserError if a message holds a role marker that is plain text, unless these are allowed: the model
        could not tell it from a real one, so a message could open or close a turn."""
        forged = [] if self.allow_role_markers else self.forged_markers(conversation)
        if forged:
            remedy = ("remove it, or allow it with ", Setting("allow"), " role-markers")
            raise UserError(forged[0], remedy, conversation.source)

    def forged_markers(self, conversation: Conversation) -> list[str]:
        """Each role marker in a message, in words; none under a `text:` template, which has no roles."""
        markers = () if self.template.is_text else self.chat_format.role_markers
        return [
            f"message {number} ({message.role}) holds {marker}, a role marker of {self.chat_format.name}"
            for number, message in enumerate(conversation.messages, 1)
            for marker in markers
            if marker in message.content
        ]


def with_roles(*templates: Template) -> Template:
    """The first template with roles, or the first of all: a prompt format opened under it has what the others need."""
    return next((t for t in templates if not t.is_text), templates[0])


def check_used(chat_format: str | None, *templates: Template) -> None:
    """Raise UserError for a chat format that was asked for and that none of the templates uses."""
    if chat_format in (None, NO_CHAT_FORMAT.name) or not templates or not all(t.is_text for t in templates):
        return
    names = ", ".join(t.name for t in templates)
    cause = (Setting("chat_format"), f" {chat_format} has no effect under {names}: text: templates have no roles")
    raise UserError(cause, "leave it out, or use a chat: template")


def open_prompt_format(
    folder: Path,
    template: Template,
    family: str,
    chat_format: str | None = None,
    *,
    vocab_size: int | None = None,
    allow_role_markers: bool = False,
    allow_chat_template: bool = False,
) -> PromptFormat:
    """The prompt format of a model folder. `chat_format` None: the folder's own. `vocab_size`: embedding rows of the
    model, which the tokenizer must not exceed. Raises UserError for an unknown name, a missing or damaged tokenizer, a
    folder of unknown chat format, and, unless `allow_chat_template`, for a chat format that is not the folder's own."""
    tokenizer = load_tokenizer(folder, vocab_size)
    eos_ids = end_of_sequence_ids(folder, tokenizer)
    check_name(chat_format)
    try:
        own = find_format(
            folder,
            tokenizer,
            chat_format,
            ends=[tokenizer.control_names[i] for i in sorted(eos_ids) if i in tokenizer.control_names],
            allow_chat_template=allow_chat_template,
        )
    except UserError:
        if not template.is_text:
            raise
        own = Found(NO_CHAT_FORMAT, "")  # a text template has no roles, so a base model serves
    template = with_default_system_prompt(template, folder)
    if own.chat_format.is_derived:
        tokenizer = tokenizer.like_transformers()
    return PromptFormat(
        template, find_family(family), own.chat_format, tokenizer, allow_role_markers, eos_ids, own.how, folder
    )


def end_of_sequence_ids(folder: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that end an answer by generation_config.json, config.json or the tokenizer: any of the three may be the
    only one to say so. Raises UserError for an id that is no whole number."""
    own = {tokenizer.control_id(tokenizer.eos)} if tokenizer.eos else set()
    return frozenset(own | {number for _, number in configured_ends(folder)})
