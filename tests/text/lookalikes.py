"""Chat templates with the features of published ones, written here: what Llama, Mistral, TinyLlama, Zephyr, SmolLM2
and Qwen do to a conversation. By name: the tokenizer (tests/audit/clean.py) and the template.
"""

from __future__ import annotations

from tests.text import folders

_EVERY = "{% for m in messages %}"
_REST = "{% for m in rest %}"
_ORDER = (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate, user first') }}{% endif %}"
)
_SYSTEM_APART = (
    "{% if messages[0].role == 'system' %}{% set given = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}"
)
_TOOLS = "{% if tools is defined and tools is not none %}{{ raise_exception('tools') }}{% endif %}"

# Llama 2: BOS and EOS at every turn, trims, a space before EOS.
LLAMA2 = (
    _SYSTEM_APART + _REST + _ORDER + "{% if m.role == 'user' %}{{ bos_token }}[INST] "
    "{% if loop.first and given is defined %}{% set asked = '<<SYS>>\n' ~ given ~ '\n<</SYS>>\n\n' ~ m.content %}"
    "{% else %}{% set asked = m.content %}{% endif %}{{ asked | trim }} [/INST]"
    "{% else %}{{ ' ' ~ (m.content | trim) ~ ' ' ~ eos_token }}{% endif %}{% endfor %}"
)
_BLOCK = "{{ '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\n\n' ~ (m.content | trim) ~ '<|eot_id|>' }}"
_PROMPT = "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
LLAMA3 = _EVERY + "{% if loop.first %}{{ bos_token }}{% endif %}" + _BLOCK + "{% endfor %}" + _PROMPT


# Llama 3.1 and later: a system block in any case, with the date, from a variable or from the clock.
def _dated(date: str) -> str:
    return (
        "{{ bos_token }}" + _TOOLS + date + _SYSTEM_APART + "{{ '<|start_header_id|>system<|end_header_id|>\n\n' }}"
        "{{ 'Cutting Knowledge Date: December 2023\n' }}{{ 'Today Date: ' ~ today ~ '\n\n' }}"
        "{{ (given | trim) if given is defined else '' }}{{ '<|eot_id|>' }}" + _REST + _BLOCK + "{% endfor %}" + _PROMPT
    )


LLAMA31 = _dated("{% set today = date_string if date_string is defined else '26 Jul 2024' %}")
LLAMA32 = _dated("{% set today = strftime_now('%d %b %Y') %}")

# Mistral v0.1 and v0.2, first revisions: no system prompts, no space before an answer; v0.1 has one behind EOS.
_FIRST = (
    "{{ bos_token }}" + _EVERY + _ORDER + "{% if m.role == 'user' %}{{ '[INST] ' ~ m.content ~ ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ m.content ~ eos_token ~ '{gap}' }}"
    "{% else %}{{ raise_exception('no other roles here') }}{% endif %}{% endfor %}"
)
MISTRAL_V01_FIRST, MISTRAL_V02_FIRST = (_FIRST.replace("{gap}", gap) for gap in (" ", ""))
# Later revisions: a space after every control token; the system prompt in the first question.
MISTRAL_V02 = (
    _SYSTEM_APART + "{{ bos_token }}" + _REST + _ORDER + "{% if m.role == 'user' %}"
    "{% if loop.first and given is defined %}{{ ' [INST] ' ~ given ~ '\n\n' ~ m.content ~ ' [/INST]' }}"
    "{% else %}{{ ' [INST] ' ~ m.content ~ ' [/INST]' }}{% endif %}{% else %}{{ ' ' ~ m.content ~ eos_token }}"
    "{% endif %}{% endfor %}"
)
# v0.3: markers are control tokens; the system prompt is in the last message, if that is a question; answers trimmed.
MISTRAL_V03 = (
    _SYSTEM_APART + _TOOLS + "{{ bos_token }}" + _REST + _ORDER + "{% if m.role == 'user' %}"
    "{% if loop.last and given is defined %}{{ '[INST] ' ~ given ~ '\n\n' ~ m.content ~ '[/INST]' }}"
    "{% else %}{{ '[INST] ' ~ m.content ~ '[/INST]' }}{% endif %}{% else %}{{ ' ' ~ (m.content | trim) ~ eos_token }}"
    "{% endif %}{% endfor %}"
)
# TinyLlama and Zephyr: markers that are text, no line break behind the generation prompt, blank lines of the template.
ZEPHYR = (
    _EVERY + "\n{{ '<|' ~ m.role ~ '|>\n' ~ m.content ~ eos_token }}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
_CHATML_BLOCK = "{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}"
_CHATML_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def _chatml(default: str) -> str:
    first = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\n" + default + "<|im_end|>\n' }}{% endif %}"
    return _TOOLS + first + _EVERY + _CHATML_BLOCK + "{% endfor %}" + _CHATML_PROMPT


SMOLLM2 = _chatml("Your name is SmolLM.")
QWEN25 = _chatml("You are Qwen, a helpful assistant.")
# Qwen3: an empty reasoning block before an answer after the last question; earlier reasoning is cut out; a switch.
_THINK = "'<think>\n\n</think>\n\n'"
QWEN3 = (
    "{% set ns = namespace(last=0) %}" + _EVERY + "{% if m.role == 'user' and not (m.content.startswith("
    "'<tool_response>') and m.content.endswith('</tool_response>')) %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}" + _EVERY + "{% if m.role == 'assistant' %}{% set said = m.content.split('</think>')[-1].lstrip('\n')"
    " if '</think>' in m.content else m.content %}{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.last %}{{ " + _THINK + " }}{% endif %}{{ said ~ '<|im_end|>\n' }}"
    "{% else %}" + _CHATML_BLOCK + "{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ " + _THINK + " }}{% endif %}{% endif %}"
)
# With Hugging Face's marks of what is trained.
GENERATION = (
    _EVERY + "{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}"
    "{{ m.content ~ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}" + _CHATML_BLOCK + "{% endif %}{% endfor %}"
) + _CHATML_PROMPT

LOOKALIKES: dict[str, tuple[str, str]] = {
    "like-llama2": ("llama2", LLAMA2),
    "like-llama3": ("llama3", LLAMA3),
    "like-llama3.1": ("llama3", LLAMA31),
    "like-llama3.2": ("llama3", LLAMA32),
    "like-mistral-v0.1-first": ("mistral-v1", MISTRAL_V01_FIRST),
    "like-mistral-v0.2-first": ("mistral-v1", MISTRAL_V02_FIRST),
    "like-mistral-v0.2": ("mistral-v1", MISTRAL_V02),
    "like-mistral-v0.3": ("mistral-v3", MISTRAL_V03),
    "like-tinyllama": ("llama2", ZEPHYR),
    "like-zephyr": ("mistral-v1", ZEPHYR),
    "like-smollm2": ("smollm2", SMOLLM2),
    "like-qwen2.5": ("qwen", QWEN25),
    "like-qwen3": ("qwen", QWEN3),
    "like-qwen-training": ("qwen", GENERATION),
    "gemma": ("small-gemma", folders.GEMMA),
    "small-llama3.2": ("small-llama3", LLAMA32),
}
