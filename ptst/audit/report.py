"""The audit: a data set is prepared as for training, every rule is applied to it, one report says what was found. In
training, no run starts and no step is taken on an error that is not allowed (`check_start`, `watch`)."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import count
from pathlib import Path
from typing import Any

from ptst.audit.config import AuditConfig
from ptst.audit.counts import tally
from ptst.audit.documents import check_documents
from ptst.audit.drift import check_run
from ptst.audit.findings import LEVELS, RULES, Finding
from ptst.audit.owner import check_owner
from ptst.audit.provenance import provenance
from ptst.audit.reference_columns import Columns
from ptst.audit.reference_prompts import check_asked
from ptst.audit.reference_rows import Request, check_source
from ptst.audit.rows import check_overlap, check_rows, normalized
from ptst.audit.setup import Setup
from ptst.audit.shape import check_shape
from ptst.audit.view import Comparison, TokenView, compare, view
from ptst.config_file import merge
from ptst.data import sources
from ptst.data.builtin import safety_sets
from ptst.data.examples import length_limit, prepare
from ptst.data.packing import Batch, pack
from ptst.data.prompt_files import read_prompts
from ptst.data.sources import Source
from ptst.errors import Setting, UserError
from ptst.hub.locate import locate_model
from ptst.model.config import DecoderConfig
from ptst.progress import say
from ptst.records import CHECKPOINTS, TrainRecord, read_finished
from ptst.settings import CommandSettings
from ptst.text.encode import Example
from ptst.text.prompt_format import PromptFormat, check_used, open_prompt_format
from ptst.text.templates import find_template, load_template, with_default_system_prompt
from ptst.training.config import TrainConfig

LISTED = 20  # findings of one rule that are listed; all are counted


@dataclass(frozen=True)
class References:
    """What the data are compared with: the chat template of a model `folder`, a finished `run`, the prompt format at
    `test` time, and the texts `asked` then (`normalized`), with the name of the set that each is from."""

    folder: Path | None = None
    run: TrainRecord | None = None
    test: PromptFormat | None = None
    asked: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Audit:
    """The report. `rows`: (row, its tokens) of the rows that are shown. `provenance`: versions, date, settings and
    fingerprints."""

    model: str
    data: str
    prompt_format: PromptFormat
    test_template: str
    findings: list[Finding]
    counts: dict[str, Any]
    rows: list[tuple[str, list[TokenView]]]
    comparison: Comparison | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """The highest level among the findings; info if there are none."""
        return max((f.level for f in self.findings), key=LEVELS.index, default="info")

    @property
    def found(self) -> dict[str, int]:
        """Number of findings by rule, in order of appearance."""
        return dict(Counter(f.rule for f in self.findings))

    @property
    def listed(self) -> list[Finding]:
        """The first findings of every rule, so that one rule cannot hide the others."""
        numbers: defaultdict[str, count] = defaultdict(count)
        return [f for f in self.findings if next(numbers[f.rule]) < LISTED]

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
            "rows": [{"row": row, "tokens": [asdict(t) for t in tokens]} for row, tokens in self.rows],
            "provenance": dict(self.provenance),
        }
        return report | ({"comparison": asdict(self.comparison)} if self.comparison else {})


def audit(
    source: Source,
    setup: Setup,
    references: References | None = None,
    *,
    micro_batch_tokens: int = 2048,
    unreadable: Iterable[UserError] = (),
    found_in_files: Iterable[Finding] = (),
    show: int = 1,
    allow: Iterable[str] = (),
) -> Audit:
    """Audit a data set under a training setup.

    `unreadable`: errors of rows that could not be read. `found_in_files`: of the rows against their files. `show`:
    number of rows whose tokens are shown, those with findings first. `allow`: rules whose findings become notes."""
    references, allowed = references or References(), set(allow)
    # Role markers in messages are findings here, so they do not stop the encoding.
    setup = replace(setup, prompt_format=replace(setup.prompt_format, allow_role_markers=True))
    prompt_format, errors = setup.prompt_format, dict[int, UserError]()
    examples, prepared = prepare(
        source, prompt_format, setup.max_length or 10**9, setup.too_long, setup.train_on, errors
    )
    bad_rows = [*unreadable, *errors.values()]
    batches = pack(examples, micro_batch_tokens)
    causes = [UserError(e.cause, e.remedy).tell(lambda name: f"the setting {name}") for e in bad_rows]
    findings = [Finding("bad-row", e.where, cause) for e, cause in zip(bad_rows, causes, strict=True)]
    findings += found_in_files
    findings += check_data(source, batches, setup, references.asked)
    left_out = {rule: getattr(prepared, rule) for rule in ("dropped", "cut", "untrained")}
    findings += [Finding(rule, "", f"{number} of {prepared.rows} rows") for rule, number in left_out.items() if number]
    findings += [Finding("unused-column", "", f"{name} ({number} rows)") for name, number in source.unused.items()]
    if references.folder is not None:
        answered = [c for c in source.conversations if c.answered]
        findings += check_owner(references.folder, answered, setup)
    if references.run is not None:
        findings += check_run(references.run, prompt_format, source.fingerprint, prepared.encoding)
    comparison = None
    if references.test is not None and examples:
        test = replace(references.test, allow_role_markers=True)
        comparison = compare(examples[0], source.conversations[examples[0].row], prompt_format, test)
        if test.template != prompt_format.template:
            cause = f"{prompt_format.template.name} and {test.template.name} differ from token {comparison.same} on"
            findings.append(Finding("other-prompt", comparison.row, cause, comparison.same))
    findings = [replace(f, allowed=f.rule in allowed) for f in findings]
    findings.sort(key=lambda f: -LEVELS.index(f.level))
    counts = tally(source, batches, prepared, micro_batch_tokens)
    counts["bad_rows"] = len(bad_rows)
    counts["duplicates"] = len(source.conversations) - counts["distinct_rows"]
    for rule in ("role-markers", "overlap"):
        counts[rule.replace("-", "_")] = sum(f.rule == rule for f in findings)
    flagged = {f.row for f in findings if f.level != "info"}
    shown = sorted(examples, key=lambda e: source.conversations[e.row].source not in flagged)[:show]
    rows = [(source.conversations[e.row].source, view(e, source.conversations[e.row], setup)) for e in shown]
    model = references.folder.name if references.folder else ""
    test_template = (references.test or prompt_format).template.name
    return Audit(model, source.name, prompt_format, test_template, findings, counts, rows, comparison)


def check_data(
    source: Source, batches: Iterable[Batch], setup: Setup, asked: Mapping[str, str] | None = None
) -> list[Finding]:
    """All rules on the rows and batches of a data set, for command and training alike. `asked` as in `References`."""
    findings = [*check_rows(source.conversations, setup.prompt_format)]
    findings += check_overlap(source.conversations, asked or {})
    for batch in batches:
        findings += check_documents(batch, source.conversations, setup)
    return findings


def audit_data(config: AuditConfig) -> Audit:
    """The audit of a data set as the settings describe it, or of a finished run's. Raises UserError for mistakes."""
    config.check()
    run = read_finished(config.checkpoint) if config.checkpoint else None
    settings = _settings(config, run)
    folder = locate_model(settings.model, CHECKPOINTS)
    if run is not None and Path(run.model_folder).name != folder.resolve().name:
        raise UserError(f"this is a run of {run.model}, not of {settings.model}", where=config.checkpoint)
    unreadable: list[UserError] = []
    source = sources.load(settings.data, "train", settings.limit, unreadable, settings.holdout, settings.column_rules)
    rows = (settings.data, "train", settings.limit, settings.holdout)
    found = [*check_source(source, Request(*rows, Columns.of(settings), unreadable))]
    if not source.conversations and not unreadable and not found:
        raise UserError("there are no rows to audit", where=settings.data)
    shape = DecoderConfig.from_folder(folder)
    template = load_template(settings.template_file) if settings.template_file else find_template(settings.template)
    family = settings.template_family or source.family
    check_used(config.chat_format, template)
    prompt_format = open_prompt_format(
        folder, template, family, settings.chat_format, vocab_size=shape.vocab_size, allow_chat_template=True
    )  # the audit reports a chat format that is not the folder's own, among the other findings
    test = prompt_format
    if config.test_template is not None:
        test_template = with_default_system_prompt(find_template(config.test_template), folder)
        test = replace(prompt_format, template=test_template)
    limit = length_limit(settings.max_length, shape.max_positions, settings.micro_batch_tokens)
    what = f"template {template.name}, {prompt_format.described}"
    say(f"ptst.audit: {len(source.conversations)} rows of {source.name}, {what}")
    size = settings.micro_batch_tokens
    report = audit(
        source,
        Setup(prompt_format, settings.train_on, limit, settings.too_long),
        References(folder, run, test, _asked_at_test(config, settings, found)),
        micro_batch_tokens=size if size != "auto" else run.micro_batch_tokens if run else limit,
        unreadable=unreadable,
        found_in_files=found,
        show=config.rows,
        allow=config.allow,
    )
    return replace(report, provenance=provenance(config, folder, [source], prompt_format))


def _settings(config: AuditConfig, run: TrainRecord | None) -> TrainConfig:
    """Each setting as given, else as the run had it, else training's default."""
    settings = TrainConfig() if run is None else merge(TrainConfig(), run.settings, f"{config.checkpoint}/run.json")
    own, train = ({f.name for f in fields(kind)} for kind in (AuditConfig, TrainConfig))
    names = (own & train) - {f.name for f in fields(CommandSettings)} - {"allow"}
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    if config.template is not None:
        given.setdefault("template_file", None)
    if config.data is not None:  # a run with a holdout was trained on the rest of its own data
        given["holdout"] = 0.0
    return replace(settings, **given)


def _asked_at_test(config: AuditConfig, settings: TrainConfig, found: list[Finding]) -> dict[str, str]:
    """The texts of the tests (`normalized`). What is wrong with them is added to `found`."""
    sets: dict[str, Iterable[str]] = {
        "the built-in harmful requests": (p.prompt for p in safety_sets.harmful_requests()),
        "the built-in benign look-alikes": (p.prompt for p in safety_sets.look_alikes()),
    }
    if config.safety_data is not None:
        sets[str(config.safety_data)] = (p.prompt for p in read_prompts(config.safety_data, settings.column_rules))
    name = config.test_data or (settings.data if settings.data.startswith(sources.DEFAULT) else None)
    if name is not None:
        questions = sources.load(name, "test", rules=settings.column_rules)
        found += check_source(questions, Request(name, "test", columns=Columns.of(settings)))
        users = (m.content for c in questions.conversations for m in c.messages if m.role == "user")
        sets[f"the test data {name}"] = users
    asked = {normalized(text): name for name, texts in sets.items() for text in texts}
    found += check_asked(asked, config.safety_data, Columns.of(settings))
    return asked


def refuse(findings: Iterable[Finding], allow: Iterable[str] = ()) -> None:
    """Raise UserError for the first finding of error level whose rule is not allowed."""
    allowed = set(allow)
    errors = [f for f in findings if f.level == "error" and f.rule not in allowed]
    if errors:
        first, more = errors[0], len(errors) - 1
        rest = f" ({more} more: python -m ptst.audit lists them)" if more else ""
        remedy = (f"{RULES[first.rule].remedy}, or allow it with ", Setting("allow"), f" {first.rule}{rest}")
        raise UserError(f"{first.rule}: {first.cause}", remedy, first.place)


def check_start(
    source: Source, examples: Sequence[Example], setup: Setup, micro_batch_tokens: int, allow: Iterable[str]
) -> list[str]:
    """Apply all rules to rows and batches before the first step; returns one line for each kind of warning. Raises
    UserError for an error that is not allowed."""
    findings = check_data(source, pack(examples, micro_batch_tokens), setup)
    allowed = set(allow)
    refuse(findings, allowed)
    warnings: dict[str, list[Finding]] = {}
    for f in findings:
        if f.level == "warning" and f.rule not in allowed:
            warnings.setdefault(f.rule, []).append(f)
    return [
        f"warning: {RULES[rule].meaning} in {len(found)} places, the first at {found[0].row}: {found[0].cause}"
        for rule, found in warnings.items()
    ]


def watch(source: Source, allow: Iterable[str]) -> Callable[[Batch], None]:
    """The cheap rules as a check of every batch that training builds. What it returns raises UserError."""
    return lambda batch: refuse(check_shape(batch, source.conversations), frozenset(allow))
