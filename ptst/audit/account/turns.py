"""Whether steps on the main data and on what is mixed in take turns as `phases` says. What is due is known here from
the settings alone:

a step        has examples of one side: of the sources mixed in, or of the main source
the turns     begin with what is mixed in and have `phases` steps each; a side that has had its epochs has no more of
              them, so that the other one goes on alone
"""

from collections.abc import Sequence

SIDES = ("what is mixed in", "the main data")


class Turns:
    """Follows the steps of a run. `due`: how often the examples of each side are taken in all."""

    def __init__(self, phases: Sequence[int], due: Sequence[int]):
        self.phases, self.due = phases, due
        self._had = [0, 0]
        self._side, self._in_turn = 0, 0  # the side of the step before, and how many of its steps came in a row

    def take(self, sizes: Sequence[int]) -> tuple[str, bool]:
        """The next step, by its examples of each source, the main one first. Returns what is wrong with it, or "", and
        whether its side of what is mixed in has had its epochs, so that it may be smaller than others."""
        own = sum(sizes[1:]), sizes[0]
        if all(own):
            return f"{own[1]} examples of {SIDES[1]} and {own[0]} of {SIDES[0]} in one step", True
        expected, side = self._expected(), int(own[1] > 0)
        self._in_turn = 1 if side != self._side else self._in_turn % self.phases[side] + 1
        self._side = side
        self._had[side] += own[side]
        cause = f"a step on {SIDES[side]} in place of one on {SIDES[expected]}" if side != expected else ""
        return cause, side == 0 and self._had[0] >= self.due[0]

    def _expected(self) -> int:
        """The side that has the next step."""
        side = self._side if self._in_turn < self.phases[self._side] else 1 - self._side
        return side if self._had[side] < self.due[side] else 1 - side
