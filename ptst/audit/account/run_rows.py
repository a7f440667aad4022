"""All data of a run against their files: the main data, what is mixed in, and the validation set."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ptst.audit.findings import Finding
from ptst.audit.reference.builtin import BUILT_IN
from ptst.audit.reference.builtin_chats import WITH_VALIDATION
from ptst.audit.reference.columns import Columns
from ptst.audit.reference.mixes import asked_mix
from ptst.audit.reference.rows import Request, check_source
from ptst.audit.reference.selected import check_selection
from ptst.errors import UserError

if TYPE_CHECKING:
    from ptst.training.config import TrainConfig
    from ptst.training.run_sources import RunSources


def check_run_rows(
    settings: "TrainConfig", read: "RunSources", errors: Sequence[Sequence[UserError]] = ()
) -> Iterator[Finding]:
    """The rules of `check_source` on every source of a run. `errors`: of the rows of each that could not be read, the
    validation set's last."""
    sources = read.whole + ([read.validation] if read.validation else [])
    asked = [*_requests(settings)]
    if len(sources) != len(asked):
        cause = f"{len(asked)} data sets were asked for, and {len(sources)} were read"
        yield Finding("row-lost", asked[-1].name, cause, expected=str(len(asked)), seen=str(len(sources)))
        return
    for number, (source, request) in enumerate(zip(sources, asked, strict=True)):
        own = errors[number] if number < len(errors) else ()
        yield from check_source(source, replace(request, errors=own))
    yield from check_selection(settings, read.whole, read.training)


def _requests(settings: "TrainConfig") -> Iterator[Request]:
    columns = Columns.of(settings)
    yield Request(settings.data, "train", settings.limit, settings.holdout, columns)
    for text in settings.mix:
        yield Request(asked_mix(text).data, columns=columns)
    if settings.val_data:
        yield Request(settings.val_data, "validation", columns=columns)
    elif settings.holdout:
        yield Request(settings.data, "validation", None, settings.holdout, columns)
    elif settings.data.startswith(BUILT_IN):
        yield Request(BUILT_IN, "validation", columns=columns)
    elif (base := settings.data.partition(":")[0]) in WITH_VALIDATION and not Path(settings.data).exists():
        yield Request(base, "validation", columns=columns)
