"""What a fine-tuning job would be, before anything leaves this machine: its file, checked and counted, and its price.

Epochs are a property of the whole job there. Where every source has the same whole number of them, the file has each
row once. Otherwise sources are mixed by rows: the file has each row as often as it is to be seen, in the order in which
a run on this machine would take them, and the job makes one pass over it.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any

from rich.table import Table

from ptst.data.order import SourcePlan, check_visits, epochs
from ptst.hosted.checks import base_model, check_file, check_hosted, hosted_template, longest_row, settings_of
from ptst.hosted.record import HostedRecord, model_weights
from ptst.hosted.rows import Rows, to_rows
from ptst.hosted.tokens import TokenCounter, find_counter
from ptst.records import environment
from ptst.text.templates import FAMILIES, Template
from ptst.training import recipes
from ptst.training.config import TrainConfig
from ptst.training.run_sources import read_main, read_others

MARK_LENGTH = 32


@dataclass(frozen=True)
class HostedPlan:
    """`content`: the training file; `visits`: how often each source's rows are in it; `n_epochs`: passes over it.
    `tokens`: of all passes, as the endpoint counts what it is paid for."""

    config: TrainConfig
    model: str
    template: Template
    sources: list[Rows]
    validation: Rows | None
    counter: TokenCounter
    content: bytes
    rows: int
    tokens: int
    n_epochs: int
    by_rows: bool

    @property
    def validation_content(self) -> bytes | None:
        return None if self.validation is None else _to_file(self.validation.lines)

    @property
    def hyperparameters(self) -> dict[str, Any]:
        return {"n_epochs": self.n_epochs, **settings_of(self.config)}

    @property
    def mark(self) -> str:
        """What the same job has always, and another never: by it a job is found again at the endpoint."""
        files = [None if c is None else hashlib.sha256(c).hexdigest() for c in (self.content, self.validation_content)]
        parts = [self.model, *files, self.hyperparameters, self.config.seed]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:MARK_LENGTH]

    @property
    def cost(self) -> float | None:
        """In the unit of the price; at most that where tokens are an upper bound."""
        price = self.config.api_price_train
        return None if price is None else self.tokens * price / 1e6

    @property
    def mixing(self) -> str:
        """How several sources, or fractions of an epoch, are put into one job, in words; "" where there is one."""
        if not self.by_rows:
            return ""
        parts = [f"{s.record.name} {s.record.epochs:g} x {len(s.lines):,}" for s in self.sources]
        return f"epochs are the whole job's there, so rows are mixed in the file: {', '.join(parts)}; one pass over it"

    def record(self, endpoint: str) -> HostedRecord:
        """The record to begin with."""
        main, *others = (source.record for source in self.sources)
        return HostedRecord(
            config=self.config,
            environment=environment(),
            model=self.config.model,
            base_model=self.model,
            endpoint=endpoint,
            weights=model_weights(endpoint, self.model),
            template=self.template,
            family=FAMILIES["plain"],
            data=main,
            mix=tuple(others),
            validation=self.validation.record if self.validation else None,
            mark=self.mark,
            token_count=self.counter.name,
            recipe=recipes.origins(self.config.recipe, vars(self.config)) if self.config.recipe else None,
        )

    def table(self) -> Table:
        table = Table("", "", title=f"fine-tuning job for {self.model}", show_header=False)
        for name, value in self._lines():
            table.add_row(name, value)
        return table

    def described(self) -> dict[str, Any]:
        """The plan as JSON has it."""
        sources = [{**s.record.result(), "duplicates": s.record.duplicates} for s in self.sources]
        first = json.loads(self.content.partition(b"\n")[0])
        return {
            "model": self.model,
            "template": self.template.name,
            "rows": self.rows,
            "bytes": len(self.content),
            "sha256": hashlib.sha256(self.content).hexdigest(),
            "tokens": self.tokens,
            "token_count": self.counter.name,
            "cost": self.cost,
            "hyperparameters": self.hyperparameters,
            "mixing": self.mixing or None,
            "sources": sources,
            "validation_rows": len(self.validation.lines) if self.validation else 0,
            "first_row": first,
        }

    def _lines(self) -> list[tuple[str, str]]:
        most = "" if self.counter.exact else "at most "
        longest = max(max(source.tokens) for source in self.sources)
        lines = [("template", self.template.name)]
        for source in self.sources:
            r = source.record
            left = {"dropped as too long": r.dropped, "without a trained answer": r.untrained}
            notes = "".join(f", {n:,} {what}" for what, n in (left | {"duplicates": r.duplicates}).items() if n)
            under = f" under {r.template.name}" if r.template else ""
            lines.append((f"rows of {r.name}{under}", f"{r.examples:,} x {r.epochs:g} epochs{notes}"))
        lines.append(("file", f"{self.rows:,} rows, {len(self.content):,} bytes"))
        if self.validation:
            lines.append(("validation file", f"{len(self.validation.lines):,} rows"))
        lines.append(("tokens in the longest row", f"{most}{longest:,}"))
        lines.append(("tokens of all passes", f"{most}{self.tokens:,} ({self.counter.name})"))
        given = {k.replace("_", " "): str(v) for k, v in self.hyperparameters.items()}
        lines += [*given.items(), ("seed", str(self.config.seed))]
        if self.mixing:
            lines.append(("mixed by rows", self.mixing))
        price = "no price was given" if self.cost is None else f"{most}{self.cost:,.4f}"
        lines.append(("cost", price))
        return lines


def plan_hosted(config: TrainConfig) -> HostedPlan:
    """Read the data and make the file. Nothing is sent. Raises UserError for settings and data that a job cannot take,
    with file and line."""
    config.check()
    check_hosted(config)
    model, template = base_model(config), hosted_template(config)
    counter, longest = find_counter(model), longest_row(model)
    limit = min((n for n in (config.max_length, longest) if n is not None), default=None)
    read = read_others(config, read_main(config))
    made: list[Rows] = []
    for each in read.training:
        rows = to_rows(each.source, each.template or template, config.train_on, counter, limit, config.too_long)
        holdout = _holdout(config, not made)
        record = replace(rows.record, epochs=each.epochs, template=each.template, holdout=holdout)
        made.append(replace(rows, record=record))
    validation = None
    if read.validation is not None:
        validation = to_rows(read.validation, template, config.train_on, counter, limit, config.too_long)
        check_file(_to_file(validation.lines), len(validation.lines), "the validation file")
    lines = [line for rows in made for line in rows.lines]
    tokens = [n for rows in made for n in rows.tokens]
    number = made[0].record.epochs or 0.0
    by_rows = number != int(number) or any(rows.record.epochs != number for rows in made)
    passes = 1 if by_rows else int(number)
    once = [SourcePlan(len(rows.lines), (rows.record.epochs or 0.0) if by_rows else 1.0) for rows in made]
    check_visits(once)
    order = [at for epoch in epochs(once, config.seed) for at in epoch]
    content = _to_file([lines[at] for at in order])
    check_file(content, len(order), "the training file")
    total = passes * sum(tokens[at] for at in order)
    return HostedPlan(
        config=config,
        model=model,
        template=template,
        sources=made,
        validation=validation,
        counter=counter,
        content=content,
        rows=len(order),
        tokens=total,
        n_epochs=passes,
        by_rows=by_rows,
    )


def _holdout(config: TrainConfig, main: bool) -> float:
    return config.holdout if main else 0.0


def _to_file(lines: list[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()
