"""A user's mistake, told in one sentence: where it is, what is wrong, how to mend it.

Everything that a user can cause is a UserError: the commands print it without a traceback and exit with code 2. Any
other exception is a bug and keeps its traceback. Messages name settings as the library does (`max_length`); a command
line prints them as its flags (`--max-length`, in a grid `--train.max-length`).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class Setting(str):
    """The name of a setting inside a message."""


Words = str | tuple[str, ...]  # a text, or its parts in order, Settings among them


class UserError(ValueError):
    """`cause`: what is wrong. `remedy`: what would be right. `where`: file, line, key or row. `group`: the group of
    settings (`train`, `eval`) that the message speaks of, where a configuration has several."""

    def __init__(self, cause: Words, remedy: Words = "", where: object = ""):
        self.cause, self.remedy, self.where = cause, remedy, str(where)
        self.group = ""
        super().__init__(cause, remedy, where)

    @property
    def parts(self) -> tuple[str, ...]:
        """The whole sentence in parts, Settings among them."""
        cause, remedy = ((words,) if isinstance(words, str) else words for words in (self.cause, self.remedy))
        head = (f"{self.where}: ",) if self.where else ()
        return (*head, *cause, "; ", *remedy) if any(remedy) else (*head, *cause)

    def tell(self, spell: Callable[[str], str] = str) -> str:
        """The whole sentence; `spell` gives a setting's name as the reader knows it."""
        return "".join(spell(part) if isinstance(part, Setting) else part for part in self.parts)

    def __str__(self) -> str:
        return self.tell()


@contextmanager
def settings_group(name: str) -> Iterator[None]:
    """Errors raised inside speak of the settings of this group."""
    try:
        yield
    except UserError as error:
        error.group = name
        raise


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that does not exist: the nearest one and the list."""
    known = list(known)
    near = get_close_matches(name, known, n=1, cutoff=0.0)
    nearest = f"; did you mean {near[0]}?" if near else ";"
    return UserError(f"unknown {kind} {name!r}{nearest} There are: {', '.join(known)}")
