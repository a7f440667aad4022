"""Another chat format than a model's own, for the rung `chat-format`: the first known one that the model's tokenizer
can write and that asks otherwise, else plain names of roles, which every tokenizer can write."""

from dataclasses import replace

from ptst.text.chat_formats import BOS, CHAT_FORMATS, ChatFormat, text
from ptst.text.prompt_format import PromptFormat
from ptst.text.segments import Conversation, Message
from ptst.text.templates import find_template
from ptst.text.tokenizer import Tokenizer

# Of other formats by a switch alone: too near to them to be another one.
_VARIANTS = ("llama3-dated", "chatml-no-think")
_PROBE = Conversation((Message("user", "What is the tallest tree in the park?"),))


def role_names(tokenizer: Tokenizer) -> ChatFormat:
    """`User: ... Assistant: ...` in plain text, after BOS where the tokenizer adds one to a text."""
    start = (BOS,) if tokenizer.bos in tokenizer.opening else ()
    user = text("User: ")
    return ChatFormat(
        "role-names",
        start=(*start, *user),
        system=((*start, *text("System: ")), (*text("\n\n"), *user)),
        later=(*text("\n\n"), *user),
        user_end=text("\n\nAssistant:"),
        answer_prefix=text(" "),
        role_markers=("User:", "Assistant:", "System:"),
    )


def another_format(own: PromptFormat) -> PromptFormat:
    """The prompt format with another chat format than the model's own. That the model never saw it is the point, so it
    is not compared with the folder's chat template; the answer ends at the tokenizer's EOS and at all ends that the
    folder names."""
    bare = replace(own, template=find_template("chat:vanilla"), allow_role_markers=True)
    asked = _written(bare)
    known = [f for f in CHAT_FORMATS.values() if f.name not in _VARIANTS and f.name != own.chat_format.name]
    suitable = [f for f in known if f.suits(own.tokenizer)]
    for chat_format in suitable:
        if _written(replace(bare, chat_format=chat_format)) != asked:
            return _with(own, chat_format)
    return _with(own, role_names(own.tokenizer))


def _with(own: PromptFormat, chat_format: ChatFormat) -> PromptFormat:
    found = f"another than the model's own, which is {own.chat_format.name}"
    return replace(own, chat_format=chat_format, found=found)


def _written(prompt_format: PromptFormat) -> str:
    """How a question is asked, in text. Role markers that are text in one format and control tokens in another read
    alike here, as they should: such formats are not told apart by their words."""
    return "".join(segment.text for segment in prompt_format.segments(_PROBE))
