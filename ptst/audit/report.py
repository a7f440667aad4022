"""The audit: the data of a run are prepared as for training and put into its micro-batches, every rule is applied to
them, one report says what was found."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ptst.audit.account.asked_settings import check_settings
from ptst.audit.account.batch_checks import Pack, rows_of
from ptst.audit.account.counts import tally
from ptst.audit.account.run_checks import check_encoded
from ptst.audit.account.run_data import Encoded, RunData
from ptst.audit.account.run_rows import check_run_rows
from ptst.audit.account.step_rule import StepRule
from ptst.audit.account.table import SourceAccount
from ptst.audit.config import AuditConfig
from ptst.audit.drift import check_mix, check_run
from ptst.audit.findings import LEVELS, Finding, Findings
from ptst.audit.output.provenance import provenance
from ptst.audit.owner.compare import check_owner
from ptst.audit.reference.columns import Columns
from ptst.audit.reference.prompts import check_asked
from ptst.audit.reference.rows import Request, check_source
from ptst.audit.rows import bad_row, normalized
from ptst.audit.setup import Setup
from ptst.audit.view import Comparison, TokenView, compare
from ptst.config_file import merge
from ptst.data import sources
from ptst.data.builtin import safety_sets
from ptst.data.examples import TrainingSource, length_limit
from ptst.data.prompt_files import read_prompts
from ptst.data.sources import Source
from ptst.errors import UserError
from ptst.hub.locate import locate_model
from ptst.model.config import DecoderConfig
from ptst.progress import say
from ptst.records import CHECKPOINTS, DataRecord, TrainRecord, read_finished
from ptst.settings import CommandSettings
from ptst.text.prompt_format import PromptFormat, check_used, open_prompt_format, with_roles
from ptst.text.templates import find_template, load_template, with_default_system_prompt
from ptst.training.config import TrainConfig
from ptst.training.run_sources import mix_templates, read_main, read_others
from ptst.training.safeguards import check_phases


@dataclass(frozen=True)
class References:
    """What the data are compared with: the chat template of a model `folder`, a finished `run`, the prompt format at
    `test` time, and the texts `asked` then (`normalized`), with the name of the set that each is from."""

    folder: Path | None = None
    run: TrainRecord | None = None
    test: PromptFormat | None = None
    asked: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Audit(Findings):
    """The report. `packs`: the micro-batches that are shown, with all their documents; `show`: how many rows of them
    are listed. `account`: what became of the rows of each source. `provenance`: versions, date, settings and
    fingerprints."""

    model: str
    data: str
    prompt_format: PromptFormat
    test_template: str
    findings: list[Finding]
    counts: dict[str, Any]
    packs: list[Pack]
    account: list[SourceAccount] = field(default_factory=list)
    show: int = 1
    comparison: Comparison | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> list[tuple[str, list[TokenView]]]:
        """The rows that are listed, with their tokens; those with findings first."""
        return rows_of(self.packs, {f.row for f in self.findings if f.level != "info"}, self.show)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        report: dict[str, Any] = {
            "verdict": self.verdict,
            "model": self.model,
            "data": self.data,
            "template": self.prompt_format.template.name,
            "test_template": self.test_template,
            "family": self.prompt_format.family.name,
            "chat_format": self.prompt_format.format_name,
            "found": self.found,
            "findings": [f.to_json() for f in self.findings],
            "counts": self.counts,
            "account": [account.to_json() for account in self.account],
            "rows": [{"row": row, "tokens": [asdict(t) for t in tokens]} for row, tokens in self.rows],
            "provenance": dict(self.provenance),
        }
        return report | ({"comparison": asdict(self.comparison)} if self.comparison else {})


def audit(
    data: Source | RunData,
    setup: Setup,
    references: References | None = None,
    *,
    micro_batch_tokens: int = 2048,
    unreadable: Iterable[UserError] = (),
    found_in_files: Iterable[Finding] = (),
    show: int = 1,
    allow: Iterable[str] = (),
) -> Audit:
    """Audit the data of a run under a training setup.

    `data`: all of it with the run's plan, or one source, of which the audit takes one pass in micro-batches of
    `micro_batch_tokens`, and whose rows had the errors `unreadable`. `show`: number of rows whose tokens are listed,
    those with findings first. `allow`: rules whose findings become notes."""
    references, allowed = references or References(), set(allow)
    run = RunData.of(data, micro_batch_tokens, unreadable) if isinstance(data, Source) else data
    # Role markers in messages are findings here, so they do not stop the encoding.
    setup = replace(setup, prompt_format=replace(setup.prompt_format, allow_role_markers=True))
    mixed = setup.of_sources(run.training)
    training = Encoded.training(run, setup)
    sources = [each.source for each in run.training]
    checked = [check_encoded(training, run.training, setup, show, references.asked, run.unreadable)]
    if run.validation is not None:
        held_out = Encoded.validation(run.validation, setup, run.rule.micro_batch_tokens)
        unread = run.unreadable[len(sources) :]
        checked.append(check_encoded(held_out, [TrainingSource(run.validation)], setup, show, unreadable=unread))
    findings = [bad_row(error) for errors in run.unreadable for error in errors]
    findings += [*run.found_in_files, *(f for each in checked for f in each.findings)]
    for source, record in zip(sources, training.mixture.records, strict=True):
        findings += _left_out(source, record, source.name if len(sources) > 1 else "")
    findings += _compare(training, mixed, references)
    comparison, note = _compare_with_test(training, setup.prompt_format, references.test)
    findings = [replace(f, allowed=f.rule in allowed) for f in [*findings, *note]]
    findings.sort(key=lambda f: -LEVELS.index(f.level))
    return Audit(
        model=references.folder.name if references.folder else "",
        data=training.mixture.source.name,
        prompt_format=setup.prompt_format,
        test_template=(references.test or setup.prompt_format).template.name,
        findings=findings,
        counts=_counts(run, training, checked[0].distinct, findings),
        packs=[*checked[0].packs, *(pack for each in checked[1:] if each.flagged for pack in each.packs)],
        account=[account for each in checked for account in each.accounts],
        show=show,
        comparison=comparison,
    )


def _left_out(source: Source, record: DataRecord, name: str) -> Iterator[Finding]:
    """What became of a source's rows and columns. `name`: where there are several."""
    for rule in ("dropped", "cut", "untrained"):
        if number := getattr(record, rule):
            yield Finding(rule, name, f"{number} of {record.rows} rows")
    for column, number in source.unused.items():
        yield Finding("unused-column", name, f"{column} ({number} rows)")


def _compare(training: Encoded, setup: Setup, references: References) -> Iterator[Finding]:
    """Comparisons with the folder's chat template and with a finished run."""
    if references.folder is not None:
        for own, rows in setup.groups(training.mixture.source.conversations):
            yield from check_owner(references.folder, (c for c in rows() if c.answered), own)
    if references.run is not None:
        main, *others = training.mixture.records
        yield from check_run(references.run, setup.prompt_format, main.fingerprint or "", main.encoding)
        yield from check_mix(references.run.mix, others)


def _compare_with_test(
    training: Encoded, prompt_format: PromptFormat, test: PromptFormat | None
) -> tuple[Comparison | None, list[Finding]]:
    """The first example beside its prompt at test time, with a note where the templates differ."""
    if test is None or not training.mixture.examples:
        return None, []
    test, example = replace(test, allow_role_markers=True), training.mixture.examples[0]
    comparison = compare(example, training.mixture.source.conversations[example.row], prompt_format, test)
    if test.template == prompt_format.template:
        return comparison, []
    cause = f"{prompt_format.template.name} and {test.template.name} differ from token {comparison.same} on"
    return comparison, [Finding("other-prompt", comparison.row, cause, comparison.same)]


def _counts(run: RunData, training: Encoded, distinct: int, findings: Sequence[Finding]) -> dict[str, Any]:
    """What the report counts."""
    counts = tally(training, distinct)
    counts["bad_rows"] = len(training.bad) + sum(len(errors) for errors in run.unreadable)
    counts["duplicates"] = len(training.mixture.source.conversations) - counts["distinct_rows"]
    for rule in ("role-markers", "overlap"):
        counts[rule.replace("-", "_")] = sum(f.rule == rule for f in findings)
    return counts


def audit_data(config: AuditConfig) -> Audit:
    """The audit of a data set as the settings describe it, or of a finished run's. Raises UserError for mistakes."""
    config.check()
    run = read_finished(config.checkpoint) if config.checkpoint else None
    settings = _settings(config, run)
    check_phases(settings.phases, settings.mix)
    folder = locate_model(settings.model, CHECKPOINTS)
    if run is not None and Path(run.model_folder).name != folder.resolve().name:
        raise UserError(f"this is a run of {run.model}, not of {settings.model}", where=config.checkpoint)
    unreadable: list[list[UserError]] = [[]]
    source = read_main(settings, unreadable[0])
    read = read_others(settings, source, unreadable)
    found = [*check_run_rows(settings, read, unreadable)]
    if not source.conversations and not unreadable[0] and not found:
        raise UserError("there are no rows to audit", where=settings.data)
    shape = DecoderConfig.from_folder(folder)
    template = load_template(settings.template_file) if settings.template_file else find_template(settings.template)
    family = settings.template_family or source.family
    templates = [template, *mix_templates(settings.mix)]
    check_used(config.chat_format, *templates)
    prompt_format = open_prompt_format(
        folder,
        with_roles(*templates),
        family,
        settings.chat_format,
        vocab_size=shape.vocab_size,
        allow_chat_template=True,
    ).with_template(template)  # the audit reports a chat format that is not the folder's own, among the other findings
    test = prompt_format
    if config.test_template is not None:
        test_template = with_default_system_prompt(find_template(config.test_template), folder)
        test = replace(prompt_format, template=test_template)
    limit = length_limit(settings.max_length, shape.max_positions, settings.micro_batch_tokens)
    found += check_settings(settings, prompt_format, read.training, limit, shape.max_positions)
    what = f"template {template.name}, {prompt_format.described}"
    say(f"ptst.audit: {len(source.conversations)} rows of {source.name}, {what}")
    size = settings.micro_batch_tokens
    size = size if size != "auto" else run.micro_batch_tokens if run else limit
    own = {f.name: getattr(settings, f.name) for f in fields(StepRule) if f.name != "micro_batch_tokens"}
    compared = References(folder, run, test, _asked_at_test(config, settings, found))
    data = RunData(read.training, read.validation, StepRule(size, **own), unreadable, found)
    train_setup = Setup(prompt_format, settings.train_on, limit, settings.too_long, settings.template_file)
    report = audit(data, train_setup, compared, show=config.rows, allow=config.allow)
    used = {each.source.name: each.source for each in read.training}
    used |= {f"{source.name} (validation)": source for source in [read.validation] if source is not None}
    files = [each.template_file for each in read.training if each.template_file is not None]
    mixed = {f"{e.source.name} under {e.template.name}": e.under(prompt_format) for e in read.training if e.template}
    return replace(report, provenance=provenance(config, folder, used, prompt_format, files, mixed))


def _settings(config: AuditConfig, run: TrainRecord | None) -> TrainConfig:
    """Each setting as given, else as the run had it, else training's default."""
    settings = TrainConfig() if run is None else merge(TrainConfig(), run.settings, f"{config.checkpoint}/run.json")
    own, train = ({f.name for f in fields(kind)} for kind in (AuditConfig, TrainConfig))
    names = (own & train) - {f.name for f in fields(CommandSettings)} - {"allow"}
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    if config.template is not None:
        given.setdefault("template_file", None)
    if config.data is not None:  # a run with a holdout was trained on the rest of its own data
        nothing = {"holdout": 0.0, "val_data": None, "mix": (), "phases": (), "subsample": None}
        for name, none in nothing.items():
            given.setdefault(name, none)
    elif run is not None and run.data.partial:
        given["limit"] = run.data.rows  # it read no others
    return replace(settings, **given)


def _asked_at_test(config: AuditConfig, settings: TrainConfig, found: list[Finding]) -> dict[str, str]:
    """The texts of the tests (`normalized`). What is wrong with them is added to `found`."""
    sets: dict[str, Iterable[str]] = {
        "the built-in harmful requests": (p.prompt for p in safety_sets.harmful_requests()),
        "the built-in benign look-alikes": (p.prompt for p in safety_sets.look_alikes()),
        "the fresh harmful requests": (p.prompt for p in safety_sets.fresh_requests()),
        "the fresh benign look-alikes": (p.prompt for p in safety_sets.fresh_look_alikes()),
    }
    if config.safety_data is not None:
        sets[str(config.safety_data)] = (p.prompt for p in read_prompts(config.safety_data, settings.column_rules))
    name = config.test_data or (settings.data if sources.own_validation(settings.data) else None)
    if name is not None:
        questions = sources.load(name, "test", rules=settings.column_rules)
        found += check_source(questions, Request(name, "test", columns=Columns.of(settings)))
        users = (m.content for c in questions.conversations for m in c.messages if m.role == "user")
        sets[f"the test data {name}"] = users
    asked = {normalized(text): name for name, texts in sets.items() for text in texts}
    found += check_asked(asked, config.safety_data, Columns.of(settings))
    return asked
