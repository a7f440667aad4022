"""What the audit knows of a training setup."""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ptst.audit.reference.formats import Oracle
from ptst.text.prompt_format import PromptFormat
from ptst.text.templates import Template, with_default_system_prompt

if TYPE_CHECKING:
    from ptst.data.examples import TrainingSource

Row = TypeVar("Row")
BLOCK = 2048  # rows that are read at once


@dataclass(frozen=True)
class Setup:
    """A training setup: the prompt format, which answers are trained (all or last), the length limit in tokens and what
    happens to longer examples (drop, cut or stop). `template_file`: where a user's own template was read from.
    `sources`: the setup of each source's rows, and the index of the first of them, where a source has a template of its
    own; () where all rows have this one."""

    prompt_format: PromptFormat
    train_on: str = "all"
    max_length: int | None = None
    too_long: str = "drop"
    template_file: Path | None = None
    sources: tuple[tuple[int, "Setup"], ...] = ()

    @cached_property
    def oracle(self) -> Oracle:
        """The reference formats under this prompt format."""
        return Oracle(self.prompt_format, self.template_file)

    def of_sources(self, sources: "Sequence[TrainingSource]") -> "Setup":
        """This setup for the rows of several sources in turn, those with a template of their own under that."""
        known = [self]  # one object for all sources under the same template
        found, first = list[tuple[int, Setup]](), 0
        for source in sources:
            own = self if source.template is None else self._under(source.template, source.template_file)
            if own not in known:
                known.append(own)
            found.append((first, known[known.index(own)]))
            first += len(source.source.conversations)
        return self if len(known) == 1 else replace(self, sources=tuple(found))

    def _under(self, template: Template, file: Path | None) -> "Setup":
        """Under another template, without the code that gives training its prompt format."""
        p = self.prompt_format
        template = template if p.folder is None else with_default_system_prompt(template, p.folder)
        return replace(self, prompt_format=replace(p, template=template), template_file=file)

    def of_row(self, row: int) -> "Setup":
        """The setup of a row, by its index into those of all sources."""
        if not self.sources:
            return self
        return self.sources[max(0, bisect_right(self.sources, row, key=lambda source: source[0]) - 1)][1]

    def stretches(self, end: int, first: int = 0) -> "Iterator[tuple[range, Setup]]":
        """The rows from `first` up to `end` in stretches of the same source, each with its setup; one stretch at
        least."""
        starts = [start for start, _ in self.sources if first < start < end]
        for start, stop in zip([first, *starts], [*starts, end], strict=True):
            if start < stop or first == end:
                yield range(start, stop), self.of_row(start)

    def groups(self, rows: Sequence[Row]) -> "list[tuple[Setup, Callable[[], Iterator[Row]]]]":
        """All rows of a run by their setups: what reads those of a setup once more, some thousands at a time."""
        found: dict[int, tuple[Setup, list[range]]] = {}
        for stretch, own in self.stretches(len(rows)):
            found.setdefault(id(own), (own, []))[1].append(stretch)
        return [(own, partial(_read, rows, stretches)) for own, stretches in found.values()]


def _read(rows: Sequence[Row], stretches: Iterable[range]) -> Iterator[Row]:
    for stretch in stretches:
        for at in range(stretch.start, stretch.stop, BLOCK):
            yield from rows[at : min(stretch.stop, at + BLOCK)]
