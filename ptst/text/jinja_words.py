"""Pieces of Jinja, written so that jinja2, minijinja and llama.cpp read them alike."""

from collections.abc import Iterable, Sequence

Part = tuple[bool, str]  # (whether it is a variable, its name or the literal text)


def literal(words: str) -> str:
    """A text as a Jinja string that jinja2, minijinja and llama.cpp read alike. Escapes are those that all three know;
    other characters stand for themselves."""
    for character, escape in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t")):
        words = words.replace(character, escape)
    return f'"{words}"'


def joined(parts: Iterable[Part]) -> str:
    """Parts as one Jinja expression."""
    merged: list[Part] = []
    for part in parts:
        if merged and not (merged[-1][0] or part[0]):
            merged[-1] = (False, merged[-1][1] + part[1])
        else:
            merged.append(part)
    written = [name if variable else literal(name) for variable, name in merged if variable or name]
    return " + ".join(written) or literal("")


def numbered(names: Sequence[str], least: int = 8) -> tuple[list[tuple[str, str, int, int]], list[str]]:
    """Long runs of names that differ in a number (`<|reserved_special_token_7|>`) as (before, after, first, last), and
    the other names."""
    groups: dict[tuple[str, str], list[int]] = {}
    for name in names:
        if split := _number(name):
            groups.setdefault((split[0], split[2]), []).append(split[1])
    loops, taken = [], set()
    for (prefix, suffix), numbers in groups.items():
        numbers.sort()
        start = 0
        for at in range(1, len(numbers) + 1):
            if at == len(numbers) or numbers[at] != numbers[at - 1] + 1:
                if at - start >= least:
                    loops.append((prefix, suffix, numbers[start], numbers[at - 1]))
                    taken |= {f"{prefix}{n}{suffix}" for n in numbers[start:at]}
                start = at
    return loops, [name for name in names if name not in taken]


def _number(name: str) -> tuple[str, int, str] | None:
    """A name that holds one number, without leading zeros: what precedes it, the number, what follows."""
    digits = [i for i, c in enumerate(name) if c.isascii() and c.isdigit()]
    if not digits or digits[-1] - digits[0] != len(digits) - 1:
        return None
    number = name[digits[0] : digits[-1] + 1]
    return (name[: digits[0]], int(number), name[digits[-1] + 1 :]) if str(int(number)) == number else None


def refuse(condition: str, message: str) -> list[str]:
    """Lines that end the rendering with a message."""
    return [f"{{%- if {condition} -%}}", f"  {{{{- raise_exception({literal(message)}) -}}}}", "{%- endif -%}"]


def spelled(name: str) -> str:
    """The refusal of a message that spells a name."""
    return f'raise_exception("a message spells " ~ {name} ~ ", which is part of the prompt\'s format; take it out")'


def said(words: str, indent: str) -> list[str]:
    """The line that writes a text, none for an empty one."""
    return [f"{indent}{{{{- {literal(words)} -}}}}"] if words else []


def listed(names: Sequence[str]) -> str:
    """Texts as a Jinja list."""
    return f"[{', '.join(map(literal, names))}]"
