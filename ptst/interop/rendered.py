"""A prompt under a template as another tool's text, which keeps what it is made of."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ptst.errors import UserError
from ptst.text.encode import encode
from ptst.text.prompt_format import PromptFormat
from ptst.text.segments import Conversation, Message, Segment
from ptst.text.tokenizer import Tokenizer

Pair = tuple[list[int], list[int]]  # ids that are given, ids that are scored


class Rendered(str):
    """A prompt under a template as text, with the segments that it is made of. `answer`: what precedes an answer, and
    the answer itself as far as it is given (lm-eval's gen_prefix), in the segments of the format."""

    prompt: tuple[Segment, ...]
    answer: tuple[Segment, ...]

    def __new__(cls, prompt: Sequence[Segment], answer: Sequence[Segment]) -> "Rendered":
        begun = answer if answer[-1].text else ()
        new = super().__new__(cls, "".join(s.text for s in (*prompt, *begun)))
        new.prompt, new.answer = tuple(prompt), tuple(answer)
        return new

    def __reduce__(self) -> Any:  # lm-eval pickles requests, to cache them
        return Rendered, (self.prompt, self.answer)

    def ids(self, tokenizer: Tokenizer) -> list[int]:
        """What the model reads before it goes on."""
        begun = self.answer if self.answer[-1].text else ()
        return encode([*self.prompt, *begun], tokenizer).ids

    def pair(self, continuation: str, tokenizer: Tokenizer) -> Pair:
        """The ids of the prompt, and those of a continuation as training has them."""
        given, (*before, last) = self.ids(tokenizer), self.answer
        answer = replace(last, text=last.text + continuation)
        whole = encode([*self.prompt, *before, answer], tokenizer).ids
        if whole[: len(given)] != given:  # where an answer was begun inside a word
            return given, tokenizer.encode(continuation, continuation=True)
        return given, whole[len(given) :]


def render_prompt(prompt_format: PromptFormat, messages: Sequence[Message], begun: bool = False) -> Rendered:
    """The prompt of messages that end in a question or, where the answer is `begun`, in its beginning. Raises UserError
    for messages of another order, and for what the template cannot express."""
    conversation = Conversation(tuple(messages))
    if conversation.answered != begun:
        last = "no answer is begun" if begun else "an answer is to follow an answer"
        raise UserError(f"the messages end in the role {messages[-1].role}, and {last}")
    prompt_format.check_role_markers(conversation)
    if not conversation.answered:
        conversation = Conversation((*messages, Message("assistant", "")))
    prompt = prompt_format.segments(conversation.prompt())
    whole = prompt_format.segments(conversation, "last")
    assert whole[: len(prompt)] == prompt, "the prompt of testing is that of training"
    end = max(i for i, s in enumerate(whole) if s.author == "assistant")
    return Rendered(prompt, whole[len(prompt) : end + 1])
