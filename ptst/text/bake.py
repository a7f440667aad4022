"""A prompt format as a chat template in Hugging Face's dialect of Jinja: an experiment's prompts for other programs.

A folder whose `chat_template.jinja` is the text made here runs a template of this project under vLLM, transformers,
llama.cpp or any other program that renders chat templates. The template writes what `PromptFormat.segments` writes:
literals of the template and the chat format are strings in it, the messages are data. What a rendered text cannot say
(a message that spells a control token would become one) the baked template refuses, unless that is allowed.

Only what every engine has is used: no namespace, no filters but `length`, escapes that all of them read. Every tag
eats the whitespace around it, so that no setting of an engine matters. `bake_proof` compares the ids.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ptst.errors import Setting, UserError
from ptst.text.baked import Baked, with_head
from ptst.text.chat_formats import BOS, control, text
from ptst.text.chat_template import read_chat_template
from ptst.text.jinja_words import Part, joined, listed, literal, numbered, refuse, said, spelled
from ptst.text.prompt_format import PromptFormat
from ptst.text.segments import Segment
from ptst.text.templates import MODEL_DEFAULT, Family, Template, fill
from ptst.text.whole_text import spelled_names

_X, _TASK = (True, "content"), (True, "task")


def bake_chat_template(prompt_format: PromptFormat, *, generation: bool = False) -> str:
    """The chat template of a prompt format, as the text of a `chat_template.jinja`.

    Messages that hold role markers or the names of control tokens are refused by it, unless the prompt format allows
    role markers. `generation`: with Hugging Face's `{% generation %}` around the trained tokens, which transformers and
    TRL read and other engines refuse. Raises UserError for a prompt format without a chat format, or whose control
    tokens the tokenizer lacks."""
    template = prompt_format.template
    assert template.system != MODEL_DEFAULT, "with_default_system_prompt comes first"
    baker = _Baker(prompt_format, generation)
    body = baker.text_template() if template.is_text else baker.chat_template()
    own = None if prompt_format.folder is None else read_chat_template(prompt_format.folder)
    form = "none" if template.is_text else prompt_format.chat_format.name
    return with_head(Baked(template.name, prompt_format.family.name, form, own), body)


def refused_texts(prompt_format: PromptFormat) -> list[str]:
    """What no message may hold in a baked template: control tokens by name, and the chat format's role markers."""
    if prompt_format.allow_role_markers:
        return []
    markers = () if prompt_format.template.is_text else prompt_format.chat_format.role_markers
    return list(dict.fromkeys((*spelled_names(prompt_format.tokenizer), *markers)))


def word_parts(words: str, family: Family) -> tuple[list[Part], list[Part]]:
    """What a template writes before and after the user's text; the task's system prompt is a variable in it."""
    marks = {"user": _X, "system": _TASK}
    parts = [marks.get(s.author, (False, s.text)) for s in fill(words, family, "", "")]
    at = parts.index(_X)
    return parts[:at], parts[at + 1 :]


def static(parts: Iterable[Part], task: str = "") -> str:
    """The text of parts where the task's system prompt is known."""
    return "".join(task if variable else words for variable, words in parts)


@dataclass(frozen=True)
class _Words:
    """What a template makes of a conversation, with the system prompt of its task or without one. `system`: None for no
    system block."""

    system: list[Part] | None
    before: list[Part]
    after: list[Part]

    @classmethod
    def of(cls, template: Template, family: Family, has_task: bool) -> "_Words":
        """As `templates.chat_words` has it."""
        user, system = template.user, template.system
        parts: list[Part] | None = None if system is None else [(False, system)]
        if has_task and family.has_task and template.task_system is not None:
            user = template.task_user or user
            first, *rest = template.task_system.split("{task}")
            parts = [(False, first), *(part for words in rest for part in (_TASK, (False, words)))]
        elif has_task:
            parts = [_TASK] if system is None else [(False, f"{system}\n\n"), _TASK]
        before, after = word_parts(user, family)
        if not has_task:
            before, after = ([(False, static(side))] for side in (before, after))
        return cls(parts, before, after)


class _Baker:
    def __init__(self, prompt_format: PromptFormat, generation: bool):
        self.p, self.generation = prompt_format, generation
        self.template, self.family = prompt_format.template, prompt_format.family
        self.format, self.tokenizer = prompt_format.chat_format, prompt_format.tokenizer
        for segment in () if self.template.is_text else self._controls():
            self.tokenizer.control_id(segment.text)

    def _controls(self) -> list[Segment]:
        f = self.format
        if f.name == "none":
            raise UserError("this model has no known chat format", ("choose one with ", Setting("chat_format")))
        every = (*(f.start or ()), *f.system[0], *f.system[1], *f.later, *f.user_end, *f.answer_prefix, *f.closing)
        return [*self._named(every + (f.history[0] + f.history[1] if f.history else ())), *self._end()]

    def _named(self, segments: Sequence[Segment]) -> list[Segment]:
        if BOS in segments and self.tokenizer.bos is None:
            cause = "this tokenizer names no BOS or EOS token"
            raise UserError(cause, "the chat format needs one; choose another format")
        bos = control(self.tokenizer.bos or "")
        return [s for segment in segments for s in (bos if segment is BOS else (segment,)) if s.control]

    def _end(self) -> tuple[Segment, ...]:
        return control((self.format.terminator if not self.template.is_text else None) or self.tokenizer.eos or "")

    def say(self, segments: Sequence[Segment]) -> str:
        """A format's literals as text."""
        return "".join((self.tokenizer.bos or "") if s is BOS else s.text for s in segments)

    # text: templates

    def text_template(self) -> str:
        before, after = word_parts(self.template.user, self.family)
        opening = "".join(self.tokenizer.opening)
        prefix = self.family.join if self.template.join is None else self.template.join
        end = self.say(self._end())
        name = self.template.name
        lines = [
            *_preamble(),
            *refuse('messages[0].role in ["system", "developer"]', f"{name} has no place for a system prompt"),
            *refuse("messages | length > 2", f"{name} has no place for a conversation of several turns"),
            "{%- set turns = messages -%}",
            *self._checks(),
            "{%- for message in turns -%}",
            "  {%- set content = text_of(message) -%}",
            "  {%- if loop.first -%}",
            f"    {{{{- {joined(((False, opening + static(before)), _X, (False, static(after))))} -}}}}",
            "  {%- else -%}",
            *self._answer(((False, prefix), _X, (False, end)), "", trained=True),
            "  {%- endif -%}",
            "{%- endfor -%}",
        ]
        return "\n".join(lines)

    # chat: templates

    def chat_template(self) -> str:
        lines = [*_preamble(), *self._task(), *self._checks(), *self._words(), *self._shown()]
        lines += ["{%- set last = turns | length - 1 -%}"] if self._needs_last else []
        lines += [
            "{%- for message in turns -%}",
            "  {%- set content = text_of(message) -%}",
            '  {%- if message.role == "user" -%}',
            *self._user_turn(),
            "  {%- else -%}",
            *self._assistant_turn(),
            "  {%- endif -%}",
            "{%- endfor -%}",
        ]
        return "\n".join(lines)

    @property
    def _needs_last(self) -> bool:
        return self.format.history is not None or self.format.system_last

    def _task(self) -> list[str]:
        """The turns, and the task's system prompt: the conversation's, else the family's."""
        task = "none" if self.family.task is None else literal(self.family.task)
        return [
            '{%- if messages[0].role in ["system", "developer"] -%}',
            "  {%- set task = text_of(messages[0]) -%}",
            "  {%- set turns = messages[1:] -%}",
            "{%- else -%}",
            f"  {{%- set task = {task} -%}}",
            "  {%- set turns = messages -%}",
            "{%- endif -%}",
        ]

    def _checks(self) -> list[str]:
        """Roles and texts of the messages."""
        lines = [
            *refuse("not turns", "a conversation needs a message of the user"),
            "{%- for message in turns -%}",
            '  {%- if message.role != ("user" if loop.index0 % 2 == 0 else "assistant") -%}',
            '    {{- raise_exception("roles must be user and assistant in turn, after an optional system message") -}}',
            "  {%- endif -%}",
            "{%- endfor -%}",
            '{%- if add_generation_prompt and turns[-1].role == "assistant" -%}',
            '  {{- raise_exception("a generation prompt follows a message of the user, and the last one is not") -}}',
            "{%- endif -%}",
        ]
        return lines + self._guard()

    def _guard(self) -> list[str]:
        refused = refused_texts(self.p)
        if not refused:
            return []
        loops, single = numbered(refused)
        lines = [
            "{#- A rendered text cannot tell these, spelled in a message, from the prompt's own. -#}",
            "{%- for message in messages -%}",
            f"  {{%- for name in {listed(single)} -%}}",
            "    {%- if name in text_of(message) -%}",
            f"      {{{{- {spelled('name')} -}}}}",
            "    {%- endif -%}",
            "  {%- endfor -%}",
        ]
        for prefix, suffix, first, last in loops:
            name = f"({literal(prefix)} ~ number ~ {literal(suffix)})"
            lines += [
                f"  {{%- if {literal(prefix)} in text_of(message) -%}}",
                f"    {{%- for number in range({first}, {last + 1}) -%}}",
                f"      {{%- if {name} in text_of(message) -%}}",
                f"        {{{{- {spelled(name)} -}}}}",
                "      {%- endif -%}",
                "    {%- endfor -%}",
                "  {%- endif -%}",
            ]
        return [*lines, "{%- endfor -%}"]

    def _words(self) -> list[str]:
        """The opening, and what precedes and follows the user's text."""
        with_task = _Words.of(self.template, self.family, True)
        if self.family.task is not None:
            return self._opening(with_task, "")
        without = _Words.of(self.template, self.family, False)
        return [
            "{%- if task is none -%}",
            *self._opening(without, "  "),
            "{%- else -%}",
            *self._opening(with_task, "  "),
            "{%- endif -%}",
        ]

    def _opening(self, words: _Words, indent: str) -> list[str]:
        f = self.format
        block, start = words.system, self.say(f.start or ())
        if block is not None:
            block = [(False, self.say(f.system[0])), *block, (False, self.say(f.system[1]))]
        if block is None and f.start is None:
            message = f"{f.name} needs a system prompt"
            return [f"{indent}{{{{- raise_exception({literal(message)}) -}}}}"]
        if f.system_last:
            sets = {"opening": [(False, start)], "block": block or []}
        else:
            sets = {"opening": [(False, start)] if block is None else block}
        sets |= {"before": words.before, "after": words.after}
        return [f"{indent}{{%- set {name} = {joined(parts)} -%}}" for name, parts in sets.items()]

    def _shown(self) -> list[str]:
        """The opening, with the demonstration where there is one, which no conversation precedes."""
        lines = ["{{- opening -}}"]
        if self.template.demonstration is None:
            return lines
        f, (asked, answered) = self.format, self.template.demonstration
        if f.history is not None:
            shown = asked + self.say(f.history[0]) + answered + self.say(f.history[1])
        else:
            spoken = self.say(f.answer_prefix) + answered + (self.say(f.closing) if f.closes_single else "")
            shown = asked + self.say(self.user_end) + spoken + self.say((*self._end(), *f.after_answer))
        return [*lines, f"{{{{- {literal(shown)} -}}}}"]

    @property
    def user_end(self) -> tuple[Segment, ...]:
        end = self.format.user_end
        if self.template.tight and end[:1] and end[0].text.startswith(" [/INST]"):
            return (*text(end[0].text.removeprefix(" ")), *end[1:])
        return end

    def _user_turn(self) -> list[str]:
        f = self.format
        later = self.say(f.later)
        lines = []
        if self.template.demonstration is not None:
            lines += [f"    {{{{- {literal(later)} -}}}}"] if later else []
        elif later:
            lines += ["    {%- if not loop.first -%}", f"      {{{{- {literal(later)} -}}}}", "    {%- endif -%}"]
        if f.system_last:
            lines += ["    {%- if loop.index0 >= last - 1 -%}", "      {{- block -}}", "    {%- endif -%}"]
        lines.append("    {{- before + content + after -}}")
        close, prompt = split_prompt(self.user_end)
        newest = said(self.say(close), "    ")
        if prompt:
            shown = said(self.say(prompt), "      ")
            newest += ["    {%- if not loop.last or add_generation_prompt -%}", *shown, "    {%- endif -%}"]
        if f.history is None:
            return lines + newest
        return [
            *lines,
            "    {%- if loop.index0 < last - 1 -%}",
            *said(self.say(f.history[0]), "      "),
            "    {%- else -%}",
            *newest,
            "    {%- endif -%}",
        ]

    def _assistant_turn(self) -> list[str]:
        f = self.format
        prefix, end = self.say(f.answer_prefix), self.say(self._end())
        closing, after = self.say(f.closing), self.say(f.after_answer)
        parts: list[Part] = [(False, prefix), _X]
        if closing and not f.closes_single:
            parts += [(True, f'({literal(closing)} if turns | length > 2 else "")'), (False, end)]
        else:
            parts.append((False, closing + end))
        if f.history is None and not f.system_last:
            return self._answer(parts, after, trained=True)
        if f.history is None:  # earlier answers follow prompts that never occur where the system prompt has moved
            return self._only_last(self._answer(parts, after, True, "  "), self._answer(parts, after, False, "  "))
        earlier = [f"      {{{{- {joined((_X, (False, self.say(f.history[1]))))} -}}}}"]
        return self._only_last(self._answer(parts, after, True, "  "), earlier)

    def _only_last(self, newest: list[str], earlier: list[str]) -> list[str]:
        if newest == earlier:
            return [line[2:] for line in newest]
        return ["    {%- if loop.last -%}", *newest, "    {%- else -%}", *earlier, "    {%- endif -%}"]

    def _answer(self, parts: Sequence[Part], after: str, trained: bool, deeper: str = "") -> list[str]:
        """An answer, with the marks around what is trained."""
        indent = "    " + deeper
        if not (self.generation and trained):
            return [f"{indent}{{{{- {joined((*parts, (False, after)))} -}}}}"]
        lines = ["{%- generation -%}", f"{{{{- {joined(parts)} -}}}}", "{%- endgeneration -%}"]
        return [indent + line for line in lines] + said(after, indent)


def split_prompt(user_end: Sequence[Segment]) -> tuple[Sequence[Segment], Sequence[Segment]]:
    """What closes a user's turn, and the generation prompt: the former ends with the first control token and the line
    breaks behind it. Without more text behind that, or without a control token, all of it closes the turn."""
    at = next((i + 1 for i, s in enumerate(user_end) if s.control), len(user_end))
    rest = list(user_end[at:])
    close = list(user_end[:at])
    if rest and not rest[0].control and (breaks := rest[0].text[: len(rest[0].text) - len(rest[0].text.lstrip("\n"))]):
        close += text(breaks)
        rest = [*text(rest[0].text.removeprefix(breaks)), *rest[1:]]
    return (close, rest) if any(s.text.strip() for s in rest) else (user_end, ())


def _preamble() -> list[str]:
    return [
        *refuse("not messages", "there are no messages"),
        *refuse("tools is defined and tools", "this template has no place for tools"),
        "{%- macro text_of(message) -%}",
        "  {%- if message.content is string -%}",
        "    {{- message.content -}}",
        "  {%- elif message.content is sequence and message.content | length == 1 "
        'and message.content[0].type == "text" -%}',
        "    {{- message.content[0].text -}}",
        "  {%- else -%}",
        '    {{- raise_exception("the content of a message must be a text, or a list of one part of text") -}}',
        "  {%- endif -%}",
        "{%- endmacro -%}",
    ]
