"""Comparison with a finished run's record."""

from collections.abc import Iterator, Sequence

from ptst.audit.findings import Finding
from ptst.records import DataRecord, TrainRecord
from ptst.text.prompt_format import PromptFormat


def check_run(run: TrainRecord, prompt_format: PromptFormat, fingerprint: str, encoding: str) -> Iterator[Finding]:
    """Would a finished run's data be encoded the same today?"""
    for what, then, now in (
        ("template", run.template, prompt_format.template),
        ("family", run.family, prompt_format.family),
        ("chat format", run.chat_format, prompt_format.chat_format.name),
        ("data", run.data.fingerprint, fingerprint),
        ("token ids", run.data.encoding, encoding),
    ):
        if then != now:
            detail = f": {then} then, {now} now" if isinstance(now, str) else ""
            yield Finding("run-drift", "run.json", f"the {what} of the run is not today's{detail}")


def check_mix(then: Sequence[DataRecord], now: Sequence[DataRecord]) -> Iterator[Finding]:
    """Would what a finished run mixed in be read and encoded the same today?"""
    if len(then) != len(now):
        yield Finding("run-drift", "run.json", f"the run mixed in {len(then)} sources, this audit {len(now)}")
        return
    for old, new in zip(then, now, strict=True):
        for what, name in (("template", "template"), ("data", "fingerprint"), ("token ids", "encoding")):
            if getattr(old, name) != getattr(new, name):
                verb = "is" if what == "template" else "are"
                yield Finding("run-drift", "run.json", f"the {what} of {old.name} {verb} not today's")
