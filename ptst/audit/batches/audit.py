"""The audit of what any trainer is about to feed its model: a file of batches, with or without the conversations that
they were made from."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ptst.audit.batches.check import CONVENTIONS, Known
from ptst.audit.batches.compare import Comparison, renamed
from ptst.audit.batches.documents import ForeignDocument, ForeignFile
from ptst.audit.batches.recognized import Recognizer
from ptst.audit.batches.rows import ExpectedRows
from ptst.audit.batches.token_bytes import TokenBytes
from ptst.audit.batches.turns import Grammar
from ptst.audit.config import AuditConfig
from ptst.audit.findings import LEVELS, Finding, Findings
from ptst.audit.output.provenance import provenance
from ptst.audit.setup import Setup
from ptst.audit.view import TokenView
from ptst.data import sources
from ptst.data.columns import ColumnRules
from ptst.errors import Setting, UserError
from ptst.hub.locate import locate_model
from ptst.model.config import DecoderConfig
from ptst.progress import say
from ptst.records import CHECKPOINTS
from ptst.text.added_tokens import token_config, token_name
from ptst.text.chat_template import open_chat_template
from ptst.text.prompt_format import PromptFormat, open_prompt_format
from ptst.text.templates import find_template, load_template

# Rules on a batch alone that hold whatever its rows are.
_SHAPE = frozenset(("labels", "boundaries", "position-ids", "padding-trained", "padding-inside", "attention-mask"))
_SHAPE |= {"token-ids", "dtype", "crosses-documents", "too-long", "left-padding"}


@dataclass(frozen=True)
class BatchesAudit(Findings):
    """The report. `not_checked`: what could not be judged, and why. `rows`: (document, its tokens) of those shown."""

    model: str
    data: str
    messages: str
    prompt_format: PromptFormat
    findings: list[Finding]
    counts: dict[str, Any]
    not_checked: dict[str, str]
    rows: list[tuple[str, list[TokenView]]] = field(default_factory=list)
    comparison: None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "verdict": self.verdict,
            "model": self.model,
            "batches": self.data,
            "messages": self.messages,
            "template": self.prompt_format.template.name,
            "family": self.prompt_format.family.name,
            "chat_format": self.prompt_format.format_name,
            "found": self.found,
            "findings": [f.to_json() for f in self.findings],
            "counts": self.counts,
            "not_checked": self.not_checked,
            "provenance": dict(self.provenance),
            "rows": [{"row": row, "tokens": [asdict(t) for t in tokens]} for row, tokens in self.rows],
        }


def audit_batches(config: AuditConfig) -> BatchesAudit:
    """The audit of a file of batches, as the settings describe it. Raises UserError for mistakes."""
    config.check()
    assert config.batches is not None
    if config.model is None:
        cause = (Setting("batches"), " needs the ", Setting("model"), " that the ids are for")
        raise UserError(cause, "give its folder, for its tokenizer and chat template")
    folder = locate_model(config.model, CHECKPOINTS)
    size = DecoderConfig.from_folder(folder).vocab_size
    source = None
    if config.messages is not None:
        rules = ColumnRules.of(config.columns or (), config.ignore_columns or (), bool(config.use_chosen))
        source = sources.load(config.messages, "train", config.limit, rules=rules)
        if not source.conversations:
            raise UserError("there are no messages", where=config.messages)
        _refuse_empty_system_prompts(source)
    template = load_template(config.template_file) if config.template_file else None
    template = template or find_template(config.template or "chat:plain")
    family = config.template_family or "plain"
    prompt_format = open_prompt_format(
        folder, template, family, config.chat_format, vocab_size=size, allow_chat_template=True
    )
    prompt_format = replace(prompt_format, allow_role_markers=True)
    setup = Setup(prompt_format, config.train_on or "all", template_file=config.template_file)
    what = f"template {template.name}, {prompt_format.described}"
    say(f"ptst.audit: {config.batches}, {what}")
    shifted = {"aligned": False, "shifted": True}.get(config.labels)
    file = ForeignFile(config.batches, known_of(folder, prompt_format, size, config.max_length), shifted)
    if source is None:
        findings, not_checked, counts = _without_messages(file, setup, folder)
    else:
        findings, not_checked, counts = _with_messages(file, setup, folder, source, config)
    allowed = set(config.allow)
    findings = [replace(f, allowed=f.rule in allowed) for f in findings]
    findings.sort(key=lambda f: -LEVELS.index(f.level))
    counts = _counts(file) | counts
    named = (folder.name, str(config.batches), config.messages or "")
    rows = _shown(file, setup, {f.row.partition(" (")[0] for f in findings if f.level != "info"}, config.rows)
    read = {source.name: source} if source else {}
    origin = provenance(config, folder, read, prompt_format, [config.batches])
    return BatchesAudit(*named, prompt_format, findings, counts, not_checked, rows, provenance=origin)


def known_of(folder: Path, prompt_format: PromptFormat, size: int, max_length: int | None) -> Known:
    """What a model folder says of ids."""
    tokenizer = prompt_format.tokenizer
    bos = tokenizer.control_id(tokenizer.bos) if tokenizer.bos and tokenizer.has_control(tokenizer.bos) else None
    stops = frozenset(i for i in prompt_format.stop_ids)
    name = token_name(token_config(folder).get("pad_token"), folder)
    pad = tokenizer.tokens.get(name) if name else None
    return Known(bos, stops, pad, size, max_length)


def _refuse_empty_system_prompts(source: sources.Source) -> None:
    for conversation in source.conversations:
        if conversation.system is not None and not conversation.system.strip():
            cause = "the system prompt is empty, which some trainers leave out and others write"
            raise UserError(cause, "remove the message, or give it a text", conversation.source)


def _with_messages(
    file: ForeignFile, setup: Setup, folder: Path, source: sources.Source, config: AuditConfig
) -> tuple[list[Finding], dict[str, str], dict[str, Any]]:
    """Every document against its conversation."""
    template = open_chat_template(folder, setup.prompt_format.tokenizer.implied)
    if template is not None:
        template = replace(template, switches=setup.prompt_format.chat_format.switches)
    rows = ExpectedRows(renamed(source.conversations, source.name), setup, template)
    comparison = Comparison(rows, setup, config.train_on == "all", config.max_length)
    for document in file.read():
        comparison.take(document)
    own = list(comparison.end())
    places = comparison.compared
    findings = [f for f in file.findings if f.rule in _SHAPE or f.row not in places]
    # What a batch alone shows in a document that has a finding of its own is the same fault.
    told = {(f.rule, f.row.partition(" (")[0]) for f in own}
    findings = [f for f in findings if (f.rule, f.row) not in told] + own
    counts: dict[str, Any] = {"messages": len(source.conversations), "documents_matched": len(places)}
    if own and all(f.level == "info" for f in own) and not findings:
        counts["all_rows_found"] = True
    not_checked = {k: why for k, why in file.not_checked.items() if k not in _COMPARED}
    if file.parted - {""}:
        not_checked["order"] = "documents are packed, and packing may put rows in any order"
    return findings, not_checked, counts


_COMPARED = ("double-bos", "missing-bos", "terminator-untrained", "unfinished-answer")


def _without_messages(
    file: ForeignFile, setup: Setup, folder: Path
) -> tuple[list[Finding], dict[str, str], dict[str, Any]]:
    """Every document by the chat format that its tokens show."""
    recognizer = Recognizer(setup)
    for document in file.read():
        recognizer.take(document)
    own = list(recognizer.end())
    told = {(f.rule, f.row) for f in own}
    findings = [f for f in file.findings if (f.rule, f.row) not in told and not recognizer.knows_better(f)] + own
    return findings, file.not_checked | recognizer.not_checked, recognizer.counts


def _counts(file: ForeignFile) -> dict[str, Any]:
    shapes = {"": "one document per row"}
    named = sorted(shapes.get(name, f"documents parted by {name}") for name in file.parted)
    return {
        "batches_read": file.batches,
        "rows": file.rows,
        "documents": file.documents,
        "tokens": file.tokens,
        "trained_tokens": file.trained_tokens,
        "trained_share": file.trained_tokens / file.tokens if file.tokens else 0.0,
        "labels": "; ".join(CONVENTIONS[c] for c in sorted(file.conventions)) or "none",
        "layout": "; ".join(named),
    }


def _shown(file: ForeignFile, setup: Setup, flagged: set[str], number: int) -> list[tuple[str, list[TokenView]]]:
    """The first documents with their tokens, those with findings first. The file is read once more for them."""
    grammar = None if setup.prompt_format.template.is_text else Grammar.of(setup.prompt_format)
    spelling = TokenBytes(setup.prompt_format.tokenizer)
    kept: list[ForeignDocument] = []
    if number:
        again = ForeignFile(file.path, file.known, file.shifted)
        for document in again.read():
            kept.append(document)
            kept = sorted(kept, key=lambda d: d.place not in flagged)[:number]
            if len(kept) == number and (not flagged or all(d.place in flagged for d in kept)):
                break
    return [(d.place, _view(d, grammar, spelling)) for d in kept]


def _view(d: ForeignDocument, grammar: Grammar | None, spelling: TokenBytes) -> list[TokenView]:
    text, starts = spelling.document(d.ids)
    ends = [*starts[1:], len(text)]
    authors = dict.fromkeys(range(len(text)), "scaffold")
    for begin, end, author in grammar.regions(text) if grammar is not None else ():
        authors.update(dict.fromkeys(range(begin, end), author))
    views = []
    for i, token in enumerate(d.ids):
        name = spelling.tokenizer.control_names.get(token)
        words = name or text[starts[i] : ends[i]].decode(errors="replace")
        author = "control" if name else authors.get(starts[i], "scaffold")
        label = d.ids[i + 1] if i + 1 < len(d.ids) and d.trained[i + 1] else None
        views.append(TokenView(i, token, words, author, 0, i, d.trained[i], label, token_boundary=False))
    return views
