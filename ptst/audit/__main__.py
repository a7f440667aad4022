"""Show and check what training would hand to the loss: every token, its author, its target, and what is wrong.

    python -m ptst.audit --template vanilla --test-template chat:llama

Exit code: 0 nothing but notes, 1 warnings or errors, 2 wrong usage.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from ptst import cli
from ptst.audit.config import AuditConfig
from ptst.audit.findings import Finding, by_rule
from ptst.audit.page import page
from ptst.audit.report import Audit, asked_at_test, audit
from ptst.audit.rules import Setup
from ptst.audit.view import table
from ptst.data import safety_sets, sources
from ptst.data.prepare import length_limit
from ptst.errors import UserError
from ptst.hub.locate import locate_model
from ptst.model.config import DecoderConfig
from ptst.model.weights import write_atomically
from ptst.progress import say
from ptst.records import TrainRecord, read_finished
from ptst.text.prompt_format import PromptFormat, open_prompt_format
from ptst.text.template_file import load_template
from ptst.text.templates import Template, find_template, with_default_system_prompt

CHECKPOINTS = Path("checkpoints")
LISTED = 20  # findings of one rule that are written out; all are counted


def run_audit(config: AuditConfig) -> dict[str, Any]:
    """Raises UserError for a user's mistakes."""
    config.check()
    run = read_finished(config.checkpoint) if config.checkpoint else None
    flags = _flags(config, run)
    folder = locate_model(flags["model"], CHECKPOINTS)
    if run is not None and Path(run.model_folder).name != folder.resolve().name:
        raise UserError(f"{config.checkpoint} is a run of {run.model}, not of {flags['model']}")
    bad: list[str] = []
    source = sources.load(flags["data"], "train", flags["limit"], bad)
    if not source.conversations and not bad:
        raise UserError(f"{flags['data']} has no rows to audit")
    shape = DecoderConfig.from_folder(folder)
    family = flags["template_family"] or source.family
    prompt_format = open_prompt_format(
        folder, _template(config, run), family, flags["chat_format"], vocab_size=shape.vocab_size
    )
    test = None
    if config.test_template is not None:
        test = dataclasses.replace(
            prompt_format, template=with_default_system_prompt(find_template(config.test_template), folder)
        )
    limit = length_limit(flags["max_length"], shape.max_positions, flags["micro_batch_tokens"])
    what = f"template {prompt_format.template.name}, {prompt_format.described}"
    say(f"ptst.audit: {len(source.conversations)} rows of {source.name}, {what}")
    result = audit(
        source,
        Setup(prompt_format, flags["train_on"], limit, flags["too_long"]),
        bad_rows=bad,
        micro_batch_tokens=flags["micro_batch_tokens"],
        test=test or prompt_format,
        asked=asked_at_test(_test_sets(config, flags["data"])),
        folder=folder,
        run=run,
        show=config.rows,
        allow=config.allow,
    )
    listed = _listed(result.findings)
    report = _report(result, listed, prompt_format, test or prompt_format, source.name, str(folder.name))
    if config.html is not None:
        try:
            write_atomically(config.html, page(report, listed, result.rows).encode())
        except OSError as error:
            raise UserError(f"--html {config.html} cannot be written ({error.strerror}); choose another path") from None
    if not config.json:
        _print(result, listed, report)
    return report


def _flags(config: AuditConfig, run: TrainRecord | None) -> dict[str, Any]:
    """Each flag as given, else as the run had it, else training's default."""
    from ptst.training.config import TrainConfig

    base = dataclasses.asdict(TrainConfig()) | (run.settings if run else {})
    names = (
        "model",
        "data",
        "template_family",
        "chat_format",
        "max_length",
        "too_long",
        "train_on",
        "micro_batch_tokens",
    )
    given = {name: getattr(config, name) for name in (*names, "limit")}
    return {name: base.get(name) if value is None else value for name, value in given.items()}


def _template(config: AuditConfig, run: TrainRecord | None) -> Template:
    if config.template_file is not None:
        return load_template(config.template_file)
    if config.template is None and run is not None:
        if run.settings.get("template_file"):
            return load_template(Path(run.settings["template_file"]))
        return find_template(run.settings["template"])
    return find_template(config.template or "chat:vanilla")


def _test_sets(config: AuditConfig, data: str) -> dict[str, Any]:
    sets: dict[str, Any] = {
        "the built-in harmful requests": [p.prompt for p in safety_sets.harmful_requests()],
        "the built-in look-alikes": [p.prompt for p in safety_sets.look_alikes()],
    }
    if config.safety_data is not None:
        sets[str(config.safety_data)] = [p.prompt for p in safety_sets.read_prompts(config.safety_data)]
    name = config.test_data or (data if data.startswith(sources.DEFAULT) else None)
    if name is not None:
        questions = sources.load(name, "test").conversations
        sets[f"the test data {name}"] = [m.content for c in questions for m in c.messages if m.role == "user"]
    return sets


def _listed(findings: list[Finding]) -> list[Finding]:
    """The first findings of every rule, so that one rule cannot hide the others."""
    seen: dict[str, int] = {}
    out = []
    for finding in findings:
        seen[finding.rule] = seen.get(finding.rule, 0) + 1
        if seen[finding.rule] <= LISTED:
            out.append(finding)
    return out


def _report(
    result: Audit, listed: list[Finding], prompt_format: PromptFormat, test: PromptFormat, data: str, model: str
) -> dict[str, Any]:
    found = by_rule(result.findings)
    report: dict[str, Any] = {
        "verdict": result.verdict,
        "model": model,
        "data": data,
        "template": prompt_format.template.name,
        "test_template": test.template.name,
        "family": prompt_format.family.name,
        "chat_format": prompt_format.format_name,
        "found": found,
        "findings": [dataclasses.asdict(f) | {"level": f.level} for f in listed],
        "counts": result.counts,
        "rows": [{"row": place, "tokens": [dataclasses.asdict(t) for t in tokens]} for place, tokens in result.rows],
    }
    if result.comparison:
        row, pair = result.comparison
        names = {"row": row, "train_template": prompt_format.template.name, "test_template": test.template.name}
        report["comparison"] = names | dataclasses.asdict(pair)
    return report


def _print(result: Audit, listed: list[Finding], report: dict[str, Any]) -> None:
    out = Console(highlight=False, emoji=False)
    colour = {"error": "red", "warning": "yellow", "info": "blue"}
    for place, tokens in result.rows:
        marked = {f.token: f.rule for f in listed if f.row == place and f.token is not None and f.level != "info"}
        out.print(table(tokens, place, marked))
        out.print()
    if "comparison" in report:
        pair = report["comparison"]
        out.print(f"{pair['row']} in training, {pair['train_template']}:", markup=False)
        out.print(pair["training"], markup=False, style="dim")
        out.print(f"its prompt at test time, {pair['test_template']}:", markup=False)
        out.print(pair["prompt"], markup=False, style="dim")
        whole = pair["same"] == pair["prompt_tokens"]
        out.print("the prompt is the beginning of training\n" if whole else f"they part at token {pair['same']}\n")
    for key, value in result.counts.items():
        out.print(f"{key:>16}  {value:.3f}" if isinstance(value, float) else f"{key:>16}  {value}", markup=False)
    out.print()
    for finding in listed:
        out.print(str(finding), style=colour[finding.level], markup=False, soft_wrap=True)
    for rule, number in report["found"].items():
        if number > LISTED:
            out.print(f"{rule}: {number} in all, the first {LISTED} shown", markup=False)
    words = {"error": "errors found", "warning": "warnings found", "info": "clean"}[result.verdict]
    out.print(f"verdict: {words}", style=f"bold {colour[result.verdict]}")


def main() -> None:
    report = cli.run(run_audit, AuditConfig, "audit")
    sys.exit(0 if report is None or report["verdict"] == "info" else 1)


if __name__ == "__main__":
    main()
