"""The rows that a run's first steps need, where they are trained in the order of the data: found while rows are read,
so that a source of any size is read no further.

Rows are encoded here for the lengths of their examples alone; steps are made of these as the plan of the run makes
them.
"""

from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice

from ptst.data.encode_rows import AT_ONCE, Encoder
from ptst.data.order import WINDOW, groups
from ptst.data.sources import ReadRow
from ptst.errors import UserError


class FirstSteps:
    """As many rows as `steps` optimizer steps need. `complete`: after reading, whether there were no others."""

    def __init__(self, encoder: Encoder, steps: int, examples_per_step: int, tokens_per_step: int | None = None):
        self._encoder, self._steps = encoder, steps
        self._sizes = examples_per_step, tokens_per_step
        self.complete = False

    def __call__(self, rows: Iterable[ReadRow]) -> Iterator[ReadRow]:
        """The rows up to the last one that a step takes. Raises what reading raises, of these rows alone."""
        lengths, waiting = array("q"), deque[ReadRow]()

        def examples() -> Iterator[int]:
            for row, length in self._measured(rows, lambda: self._wanted(len(lengths))):
                waiting.append(row)
                if length is not None:
                    lengths.append(length)
                    yield len(lengths) - 1
            self.complete = True

        for _ in islice(groups(lengths, examples(), *self._sizes), self._steps):
            yield from waiting
            waiting.clear()
        yield from waiting

    def _wanted(self, found: int) -> int:
        """How many rows to read next: no more than are needed, or, where that depends on their tokens, a few more."""
        examples, tokens = self._sizes
        return WINDOW if tokens is not None else min(AT_ONCE, self._steps * examples - found)

    def _measured(self, rows: Iterable[ReadRow], wanted: Callable[[], int]) -> Iterator[tuple[ReadRow, int | None]]:
        """Rows with the tokens of their examples; None for a row that no step takes."""
        rest, error, done = iter(rows), None, 0
        while error is None:
            block: list[ReadRow] = []
            try:
                for row in islice(rest, wanted()):
                    block.append(row)
            except UserError as found:  # of a row that may be beyond the last one; those before it are in the block
                error = found
            if not block and error is None:
                return
            part = self._encoder.part([row.conversation for row in block], done)
            lengths = dict(zip(part.rows, part.lengths, strict=True))
            # A row that cannot be trained on ends the run, when it is encoded for it.
            lengths |= dict.fromkeys(chain(part.bad, part.beyond), 1)
            for number, row in enumerate(block, done):
                yield row, lengths.get(number)
            done += len(block)
        raise error
