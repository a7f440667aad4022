"""Findings counted by their rules, with the first of each: what stops a run, or is said, however many there are."""

from collections.abc import Iterable
from dataclasses import astuple
from typing import Any

from ptst.audit.findings import RULES, Finding
from ptst.errors import Setting, UserError


class Tally:
    """Errors and warnings; notes are left out. `by_rule`: the number of each rule's findings, and the first."""

    def __init__(self, findings: Iterable[Finding] = ()):
        self.by_rule: dict[str, tuple[int, Finding]] = {}
        for finding in findings:
            self.add(finding)

    def add(self, finding: Finding, number: int = 1) -> None:
        """Count a finding, the first of so many."""
        if finding.level != "info":
            before, first = self.by_rule.get(finding.rule, (0, finding))
            self.by_rule[finding.rule] = before + number, first

    def merge(self, other: "Tally") -> None:
        """Add what was found later."""
        for number, first in other.by_rule.values():
            self.add(first, number)

    def of_level(self, level: str) -> list[tuple[int, Finding]]:
        """The numbers of each rule of a level, with its first finding, in order of appearance."""
        return [(number, first) for number, first in self.by_rule.values() if first.level == level]

    def refuse(self, allow: Iterable[str] = ()) -> None:
        """Raise UserError for the first finding of error level whose rule is not allowed."""
        errors = [(number, first) for number, first in self.of_level("error") if first.rule not in {*allow}]
        if errors:
            first, more = errors[0][1], sum(number for number, _ in errors) - 1
            rest = f" ({more} more: python -m ptst.audit lists them)" if more else ""
            remedy = (f"{RULES[first.rule].remedy}, or allow it with ", Setting("allow"), f" {first.rule}{rest}")
            raise UserError(f"{first.rule}: {first.cause}", remedy, first.place)

    def to_json(self) -> list[Any]:
        """All of it as JSON values."""
        return [[number, astuple(first)] for number, first in self.by_rule.values()]

    @classmethod
    def from_json(cls, values: list[Any]) -> "Tally":
        """What `to_json` gave."""
        found = cls()
        for number, first in values:
            found.add(Finding(*first), number)
        return found
