"""Model folders with a chat template of a known shape, written here, and a tokenizer that has its control tokens."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LOOP = "{% for m in messages %}"
_GENERATE = "{% if add_generation_prompt %}"

CHATML = (
    LOOP + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    LOOP + "{% set text = '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' %}"
    "{{ (bos_token if loop.first else '') + text }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_SPLIT_SYSTEM = (
    "{% if messages[0].role == 'system' %}{% set system, rest = messages[0].content, messages[1:] %}"
    "{% else %}{% set system, rest = none, messages %}{% endif %}"
)
LLAMA2 = (
    _SPLIT_SYSTEM + "{% for m in rest %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' }}"
    "{% if loop.first and system is not none %}{{ '<<SYS>>\n' + system + '\n<</SYS>>\n\n' }}{% endif %}"
    "{{ m.content.strip() + ' [/INST]' }}{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
MISTRAL_V1 = (
    _SPLIT_SYSTEM + "{{ bos_token }}{% for m in rest %}{% if m.role == 'user' %}{{ '[INST] ' }}"
    "{% if loop.first and system is not none %}{{ system + '\n\n' }}{% endif %}{{ m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_V3 = (
    _SPLIT_SYSTEM + "{{ bos_token }}{% for m in rest %}{% if m.role == 'user' %}{{ '[INST]' }}"
    "{% if loop.last and system is not none %}{{ system + '\n\n' }}{% endif %}{{ m.content + '[/INST]' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_V7 = (
    "{{ bos_token }}" + LOOP + "{% if m.role == 'system' %}{{ '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}"
    "{% elif m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}{% else %}{{ m.content + eos_token }}{% endif %}"
    "{% endfor %}"
)
# Markers that are text, each message closed by EOS.
ZEPHYR = (
    LOOP + "{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}" + _GENERATE + "<|assistant|>\n"
    "{% endif %}"
)
VICUNA = (
    "{{ bos_token }}" + LOOP + "{% if m.role == 'system' %}{{ m.content + ' ' }}{% elif m.role == 'user' %}"
    "{{ 'USER: ' + m.content + ' ASSISTANT:' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}{{ bos_token }}" + LOOP +
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim }}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)  # fmt: skip
# The system prompt is bare, the generation prompt opens a reasoning block, reasoning is cut out of answers.
REASONING = (
    "{% set ns = namespace(system='') %}"
    + LOOP
    + "{% if m.role == 'system' %}{% set ns.system = m.content %}{% endif %}"
    "{% endfor %}{{ bos_token + ns.system }}" + LOOP + "{% if m.role == 'user' %}{{ '<|User|>' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
# Answers have no end of their own.
UNENDED = (
    LOOP
    + "{{ {'system': '### System:\n', 'user': '### User:\n', 'assistant': '### Assistant:\n'}[m.role] + m.content }}"
    "{% if m.role != 'assistant' %}{{ '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)
# A default system prompt, a tools branch, a macro, a date.
DEFAULT = (
    "{% macro block(role, text) %}<|im_start|>{{ role }}\n{{ text }}<|im_end|>\n{% endmacro %}"
    "{% if tools %}{{ raise_exception('tools') }}{% endif %}"
    "{% if messages[0].role != 'system' %}{{ block('system', 'It is ' + strftime_now('%d %b %Y') + '.') }}{% endif %}"
    + LOOP
    + "{{ block(m.role, m.content) }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# No generation prompt, and one after the last answer, too.
HEADLESS = (
    LOOP + "{{ '<|' + m.role + '|>\n' + m.content + ('<|end|>' if m.role == 'assistant' else '') + '\n' }}{% endfor %}"
)
TRAILING = ZEPHYR.replace(_GENERATE, "{% if true %}")
NO_LAST_END = (
    LOOP + "{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% if add_generation_prompt or not loop.last %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# A switch of reasoning, as Qwen3's: an empty block before the newest answer, in the generation prompt when it is off.
_BLOCK = "<think>\n\n</think>\n\n"
THINKING = (
    LOOP + "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{{ ('"
    + _BLOCK
    + "' if loop.last else '') + m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '" + _BLOCK + "' }}{% endif %}{% endif %}"
).replace("\n", "\\n")
SPELLED = {  # by the name of the hand-written format whose owner writes so
    "chatml": CHATML,
    "llama3": LLAMA3,
    "llama2": LLAMA2,
    "mistral-v1": MISTRAL_V1,
    "mistral-v3": MISTRAL_V3,
    "mistral-v7": MISTRAL_V7,
}
CONTROL = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral-v3": ("[INST]", "[/INST]"),
    "mistral-v7": ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "reasoning": ("<|User|>", "<|Assistant|>"),
    "headless": ("<|end|>",),
    "thinking": ("<|im_start|>", "<|im_end|>", "<think>", "</think>"),
}


def write_tokenizer(folder: Path, names: tuple[str, ...] = (), **settings: object) -> Path:
    """A byte-level tokenizer whose line breaks merge as Llama-3's, with <s>, </s> and other control tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("\u010a", "\u010a"), ("\u0120", "a"), ("t", "h"), ("th", "e"), ("\u0120", "the"), (":", "\u010a")]
    names = ("<s>", "</s>", *names)
    vocab = {token: i for i, token in enumerate((*names, *letters, *(a + b for a, b in merges)))}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_folder(folder: Path, template: str | None, names: tuple[str, ...] = (), **settings: object) -> Path:
    """A folder with a tokenizer and a chat template."""
    write_tokenizer(folder, names, **settings)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


# Of a guard model: it asks about an exchange. Messages are texts, or lists of parts.
_GUARD_ASKS = "<END>\n\nFirst line must read 'safe' or 'unsafe'. If unsafe, name the categories.<|im_end|>\n"
GUARD = (
    " <|im_start|>user\nTask: check the last message.\n\n<CATEGORIES>\nS1: Rudeness.\n</CATEGORIES>\n\n<BEGIN>\n\n"
    + LOOP
    + "{{ {'user': 'User', 'assistant': 'Agent'}[m.role] + ': ' + m.content.strip() + '\n\n' }}{% endfor %}"
    + _GUARD_ASKS
)
GUARD_PARTS = GUARD.replace("m.content.strip()", "m.content[0]['text']")
