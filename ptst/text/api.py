"""The same prompts as messages for a chat API, in the paper's wording for GPT-3.5 (Table 10).

There the question stands without "Question: ", every prompt has a system message (an empty one where the template has
none), and the safety prompts open with "Be helpful, respectful and honest." because the API's models are told elsewhere
who they are.
"""

from __future__ import annotations

from ptst.errors import UserError
from ptst.text.segments import Conversation
from ptst.text.templates import BE_HELPFUL, FAMILIES, LLAMA, SHORT, Template, chat_words

_SYSTEM = {LLAMA: BE_HELPFUL, SHORT: BE_HELPFUL.partition(" Your answers")[0]}


def api_messages(conversation: Conversation, template: Template) -> list[dict[str, str]]:
    """Messages of `{"role", "content"}`: system, the demonstration if there is one, and the conversation's turns.

    Raises UserError for a `text:` template, which has no roles.
    """
    if template.is_text:
        raise UserError(f"{conversation.where}{template.name} has no roles, so it cannot be said to a chat API")
    system, turns = chat_words(conversation, template, FAMILIES["plain"])
    out = [{"role": "system", "content": _SYSTEM.get(system or "", system or "")}]
    out += [
        {"role": r, "content": t} for r, t in zip(("user", "assistant"), template.demonstration or (), strict=False)
    ]
    return out + [{"role": m.role, "content": m.content} for m in turns]
