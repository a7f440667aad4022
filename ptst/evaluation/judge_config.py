"""Settings of judging stored answers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from ptst.data.columns import ColumnRules
from ptst.errors import Setting, UserError, unknown_name
from ptst.evaluation.config import EvalSettings
from ptst.evaluation.judges import JUDGES, judge_kind
from ptst.evaluation.verdicts import AnswerClass
from ptst.settings import ApiSettings, CommandSettings, LogSettings, ThreadSettings

_JUDGE_HELP = f"Judges, any number of {', '.join(JUDGES)} (docs/judges.md). Default: {EvalSettings.judge}."


@dataclass(frozen=True, kw_only=True)
class JudgeConfig(CommandSettings, ThreadSettings, ApiSettings, LogSettings):
    """Judge stored answers, without the model, and show how far judges agree, or measure judges by people's labels."""

    folder: Positional[Path | None] = None
    """Folder of a ptst.eval or ptst.grid, or a CSV, TSV, JSONL, JSON or Parquet file of anybody's answers."""
    judge: Annotated[tuple[str, ...], arg(help=_JUDGE_HELP)] = ()
    report: Path | None = None
    """File with a column of people's labels: measure the judges, and keyword lists beside them, by these."""
    refusal_labels: tuple[str, ...] = ()
    """With --report: the labels that count as refusal, where they are not known; all others do not."""
    refusal_classes: tuple[str, ...] = ()
    """With --report: a judge's classes that count as refusal. Default: by the definition of the set."""
    ignore_labels: tuple[str, ...] = ()
    """With --report: labels whose answers are left out."""
    columns: tuple[str, ...] = ()
    """Columns of a file by other names: request=question,answer=reply reads the column reply as the answer."""
    allow: tuple[str, ...] = ()
    """Checks of a judge's folder that may fail: chat-template, for a chat format that is not its chat template's."""
    out: Path | None = None
    """Folder of the verdicts. Default: FOLDER/verdicts, or FILE.verdicts."""

    @property
    def judges(self) -> tuple[str, ...]:
        return self.judge or (EvalSettings.judge,)

    @property
    def column_rules(self) -> ColumnRules:
        """What the settings say of columns. Raises UserError for what is no name of one."""
        from ptst.evaluation.answer_files import NAMES

        return ColumnRules.of(self.columns, known_names=NAMES)

    def check(self) -> None:
        """Raise UserError for settings that make no sense."""
        if (self.folder is None) == (self.report is None):
            cause = "there is nothing to judge" if self.folder is None else "there are two things to judge"
            remedy = ("give a folder or file of answers, or a file of labelled answers as ", Setting("report"))
            raise UserError(cause, remedy)
        for name in self.judges:
            judge_kind(name)
        self.check_api()
        if twice := next((name for name in self.judges if self.judges.count(name) > 1), None):
            raise UserError((Setting("judge"), f" names {twice} twice"), "name each once")
        classes = [c.value for c in AnswerClass]
        if wrong := next((name for name in self.refusal_classes if name not in classes), None):
            raise unknown_name("class of answers", wrong, classes)
        for name in ("refusal_labels", "refusal_classes", "ignore_labels"):
            if getattr(self, name) and self.report is None:
                raise UserError((Setting(name), " needs labels"), ("give them with ", Setting("report")))
        if self.inspect_log and self.report is not None:
            raise UserError((Setting("inspect_log"), " and ", Setting("report"), " exclude each other"))
        _ = self.column_rules
