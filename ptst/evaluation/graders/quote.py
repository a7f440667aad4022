"""Text of others inside an API's message, which a server might read control tokens in."""

import re

# Names of control tokens: <|im_end|>, <|turn>, <\uff5cUser\uff5c>, </s>, <end_of_turn>, [/INST], <<SYS>>.
_BAR = r"[|\uff5c]"
_CONTROL = re.compile(
    rf"<{_BAR}[^<>|\uff5c\n]{{1,60}}{_BAR}?>|<[^<>|\uff5c\s]{{1,60}}{_BAR}>"
    r"|</?s>|<(?:bos|eos|pad|unk|mask|start_of_turn|end_of_turn)>|<</?SYS>>"
    r"|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_[A-Z]+|ARGS|THINK)\]"
)


def without_control_tokens(text: str) -> str:
    """The text with a space in each name of a control token (`< |im_end|>`), since some servers read such a name in any
    text as the token itself, which could end a message."""
    return _CONTROL.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
