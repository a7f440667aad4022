"""Judging stored answers from settings to a report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ptst.errors import UserError
from ptst.evaluation import judge_report, yardstick
from ptst.evaluation.answer_files import read_answer_file, read_labelled
from ptst.evaluation.inspect_log import check_inspect, write_judged_logs
from ptst.evaluation.judge_config import JudgeConfig
from ptst.evaluation.judge_report import Judged
from ptst.evaluation.judges import find_judges, judge_each
from ptst.evaluation.keywords import KEYWORD_JUDGES
from ptst.evaluation.labels import read_scheme
from ptst.evaluation.long_table import write_judged
from ptst.evaluation.stored_answers import AnswerSet, read_folder
from ptst.evaluation.stored_verdicts import Store, judge_stored, opened, store_folder, stored_judges
from ptst.evaluation.verdicts import AnswerClass, Judge, Verdict, record_of
from ptst.progress import ProgressLine, say
from ptst.runs import check_writable
from ptst.storage import refuse_link, write_atomically, write_json


def judge_answers(config: JudgeConfig) -> dict[str, Any]:
    """Add the judges' verdicts to stored answers; what report.json in the folder of the verdicts has, with the tables
    in Markdown as `markdown`. Raises UserError for a user's mistakes; verdicts given until then are kept."""
    config.check()
    if config.inspect_log:
        check_inspect()
    judges = find_judges(config.judges, config.allow, config)
    if config.report is not None:
        return _measure(config, config.report, judges)
    assert config.folder is not None, "check() wants one of the two"
    path = _existing(config.folder)
    found = read_folder(path) if path.is_dir() else read_answer_file(path, config.column_rules)
    for note in found.notes:
        say(note)
    verdicts = config.out or found.verdicts
    for one in judges:
        add_verdicts(found, verdicts, one)
    write_judged(found, verdicts)
    if config.inspect_log:
        write_judged_logs(found, verdicts)
    report = all_verdicts(found, verdicts, judges).to_json()
    return _write(verdicts, "report", report, judge_report.to_markdown(report), judge_report.to_markdown(report, 20))


def _existing(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"there is no folder or file {path}", "give a folder of a ptst.eval or ptst.grid, or a file")
    return path


def add_verdicts(found: AnswerSet, verdicts: Path, judge: Judge) -> dict[str, Verdict]:
    """Judge what this judge has not judged yet, into the folder `verdicts`; its verdicts by the answers' digests.
    Raises UserError as `opened` and `judge_stored`."""
    check_writable(verdicts)
    if verdicts == found.verdicts:
        refuse_link(verdicts)
    record, total = record_of(judge), len(found.answers)
    own = judge.name if found.judges.get(judge.name) == record else ""
    with opened(verdicts, record) as folder, ProgressLine(judge.name, total, first=None) as progress:
        store = Store(folder, found.answers, own)
        try:
            judge_stored(judge, found.answers, store, progress.update)
        except (KeyboardInterrupt, OSError, UserError):
            say(f"the verdicts so far are kept in {folder}; the same command goes on from there")
            raise
        finally:
            if close := getattr(judge, "close", None):
                close()  # the next judge needs the memory
    return store.known


def all_verdicts(found: AnswerSet, verdicts: Path, judges: Sequence[Judge] = ()) -> Judged:
    """The answers with the verdicts of these judges, of those that judged them earlier, and of those they came with."""
    records: dict[str, Any] = {judge.name: record_of(judge) for judge in judges}
    stored, given = stored_judges(verdicts), dict[str, list[Verdict | None]]()
    for name, record in {**found.judges, **stored, **records}.items():
        own = name if found.judges.get(name) == record else ""
        records.setdefault(name, dict(record))
        known = Store(store_folder(verdicts, name), found.answers, own).known
        given[name] = [known.get(a.digest) for a in found.answers]
    return Judged(str(found.source), found.answers, records, {name: given[name] for name in records})


def _measure(config: JudgeConfig, path: Path, judges: Sequence[Judge]) -> dict[str, Any]:
    """The judges by people's labels, keyword lists beside them."""
    counted = [AnswerClass(name) for name in config.refusal_classes]
    labelled = read_labelled(_existing(path), config.column_rules)
    scheme = read_scheme(labelled.labels, path, config.refusal_labels, config.ignore_labels, counted)
    answers = labelled.answers.answers
    verdicts = config.out or labelled.answers.verdicts
    given = {}
    for one in judges:
        known = add_verdicts(labelled.answers, verdicts, one)
        given[one.name] = [known[a.digest] for a in answers]
    peers = [peer for name, peer in KEYWORD_JUDGES.items() if name not in given]
    for peer in peers:
        given[peer.name] = judge_each(peer, [(a.request, a.answer) for a in answers])
    told: dict[str, Any] = {"source": str(path), "judges": {j.name: record_of(j) for j in (*judges, *peers)}}
    told |= {
        "peers": [peer.name for peer in peers],
        **yardstick.measure_judges(answers, labelled.labels, scheme, given),
    }
    markdown = yardstick.to_markdown(told)
    return _write(verdicts, "yardstick", told, markdown, markdown)


def _write(folder: Path, name: str, report: dict[str, Any], whole: str, short: str) -> dict[str, Any]:
    write_json(folder / f"{name}.json", report)
    write_atomically(folder / f"{name}.md", whole.encode(errors="backslashreplace"))
    return {"out": str(folder), **report, "markdown": short}
