"""The audit itself: a data set taken the way of training, everything looked at, one report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ptst.audit.corpus import check_overlap, check_rows, count, plain
from ptst.audit.drift import check_chat_template, check_run
from ptst.audit.findings import LEVELS, Finding, worst
from ptst.audit.rules import Setup, check_batch
from ptst.audit.view import Comparison, TokenView, compare, view
from ptst.data.examples import prepare
from ptst.data.packing import pack, to_batch
from ptst.data.sources import Source
from ptst.errors import UserError
from ptst.records import TrainRecord
from ptst.text.prompt_format import PromptFormat


@dataclass
class Audit:
    """What was found. `rows` are (place in the data, tokens); `comparison` stands beside the row it is about."""

    findings: list[Finding]
    counts: dict[str, Any]
    rows: list[tuple[str, list[TokenView]]] = field(default_factory=list)
    comparison: tuple[str, Comparison] | None = None

    @property
    def verdict(self) -> str:
        return worst(self.findings)


def audit(
    source: Source,
    setup: Setup,
    *,
    bad_rows: Iterable[UserError] = (),
    micro_batch_tokens: int = 2048,
    test: PromptFormat | None = None,
    asked: dict[str, str] | None = None,
    folder: Path | None = None,
    run: TrainRecord | None = None,
    show: int = 1,
    allow: Iterable[str] = (),
) -> Audit:
    """Audit a data set under a training setup.

    `bad_rows`: errors of rows that could not be read. `test`: the prompt format at test time. `asked`: texts
    asked at test time, with the set each is from. `folder`: the model's, whose own chat template is compared. `run`:
    record of a finished run to compare with. `show`: rows whose tokens are shown, those with findings first.
    """
    errors: dict[int, UserError] = {}
    # Marks in messages are findings here, so they do not stop the encoding.
    open_setup = replace(setup, prompt_format=replace(setup.prompt_format, allow_role_markers=True))
    prompt_format = open_setup.prompt_format
    limit = setup.max_length or 10**9
    examples, prepared = prepare(source, prompt_format, limit, setup.too_long, setup.train_on, errors)
    bad_rows = (*bad_rows, *errors.values())
    findings = [Finding("bad-row", e.where, UserError(e.cause, e.remedy).tell()) for e in bad_rows]
    findings += check_rows(source.conversations, prompt_format)
    findings += check_overlap(source.conversations, asked or {})
    batches = pack(examples, micro_batch_tokens)
    for batch in batches:
        findings += check_batch(batch, source.conversations, open_setup)
    for rule, key in (("dropped", "dropped"), ("cut", "cut"), ("untrained", "untrained")):
        if getattr(prepared, key):
            findings.append(Finding(rule, "", f"{getattr(prepared, key)} of {prepared.rows} rows"))
    answered = [c for c in source.conversations if c.answered]
    if folder is not None:
        findings += check_chat_template(folder, answered, prompt_format)
    if run is not None:
        findings += check_run(run, prompt_format, source.fingerprint, prepared.encoding)
    findings = [replace(f, allowed=f.rule in set(allow)) for f in findings]
    findings.sort(key=lambda f: -LEVELS.index(f.level))

    result = Audit(findings, count(source, examples, batches, prepared, micro_batch_tokens))
    result.counts["bad_rows"] = len(bad_rows)
    result.counts["duplicates"] = len(source.conversations) - result.counts["distinct_rows"]
    for rule in ("role-markers", "overlap"):
        result.counts[rule.replace("-", "_")] = sum(f.rule == rule for f in findings)
    flagged = {f.row for f in findings if f.level != "info"}
    place = [c.source for c in source.conversations]
    for example in sorted(examples, key=lambda e: place[e.row] not in flagged)[:show]:
        batch = to_batch([example])
        tokens = view(batch, [example], source.conversations, prompt_format, setup.train_on)[0]
        result.rows.append((place[example.row], tokens))
    if test is not None and examples:
        conversation = source.conversations[examples[0].row]
        result.comparison = (
            conversation.source,
            compare(examples[0], conversation, replace(test, allow_role_markers=True)),
        )
        if test.template != prompt_format.template:
            pair = result.comparison[1]
            cause = f"{prompt_format.template.name} and {test.template.name} part at token {pair.same}"
            result.findings.append(Finding("other-prompt", conversation.source, cause, pair.same))
    return result


def asked_at_test(sets: dict[str, Iterable[str]]) -> dict[str, str]:
    """Texts of test sets as `check_overlap` wants them."""
    return {plain(text): name for name, texts in sets.items() for text in texts}
