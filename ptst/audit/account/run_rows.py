"""All data of a run against their files: the main data, what is mixed in, and the validation set."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ptst.audit.account.verdicts import one_at_a_time, recall, remember
from ptst.audit.findings import Finding
from ptst.audit.reference.builtin import BUILT_IN
from ptst.audit.reference.builtin_chats import WITH_VALIDATION
from ptst.audit.reference.columns import Columns
from ptst.audit.reference.mixes import asked_mix
from ptst.audit.reference.rows import Request, check_source
from ptst.audit.reference.selected import check_selection
from ptst.data.kept_rows import identity_of
from ptst.data.sources import Source
from ptst.errors import UserError
from ptst.fingerprints import code_fingerprint, combined
from ptst.progress import say

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
    if sources and sources[0].partial:
        asked[0] = replace(asked[0], limit=len(sources[0].conversations), in_turn=True)
    if len(sources) != len(asked):
        cause = f"{len(asked)} data sets were asked for, and {len(sources)} were read"
        yield Finding("row-lost", asked[-1].name, cause, expected=str(len(asked)), seen=str(len(sources)))
        return
    for number, (source, request) in enumerate(zip(sources, asked, strict=True)):
        own = errors[number] if number < len(errors) else ()
        yield from _check(source, replace(request, errors=own))
    yield from check_selection(settings, read.whole, read.training)


def _check(source: Source, request: Request) -> Iterator[Finding]:
    """The rules of `check_source`. For rows that lie on disk under a key of every byte of their files, that nothing was
    found is remembered."""
    if not (of := getattr(source.conversations, "key", "")) or request.errors:
        yield from check_source(source, request)
        return
    said = identity_of(source.conversations), source.family, repr(sorted(source.unused.items()))
    code = code_fingerprint("audit", "data", "text")
    key = combined("rows", of, *said, repr(request), code).replace(":", "-")
    with one_at_a_time(key):
        if recall(key) is not None:
            say(f"the rows of {source.name} were compared with their files before, and nothing was found")
            return
        say(f"comparing {len(source.conversations)} rows with their files")
        found = list(check_source(source, request))
        if not found:
            remember(key, ())
    yield from found


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
