"""ptst: fine-tune chat models and measure what it does to their safety, under any pair of prompt templates.

The library's front door. Each name is imported when it is first used, so that `import ptst` costs nothing:

    open_model(model, template)             a model with its prompt format: .prompt_format.encode(conversation), .load()
                                            (`adapter=FOLDER`: with anybody's LoRA adapter over it)
    audit_conversation(model, row)          every token of one training example, its author, whether it is in the loss
    audit_data(AuditConfig(...))            what `ptst audit` does
    fine_tune(TrainConfig(...))             what `ptst train` does; returns the run's folder and record
    generate(model, prompts, Sampling(...)) answers, of several adapters in one batch
    evaluate(EvalConfig(...))               what `ptst eval` does; returns results by model and task
    export_model(ExportConfig(...))         what `ptst export` does; returns the report
    defend_model(DefendConfig(...))         what `ptst defend` does; returns the record
    judge_answers(JudgeConfig(...))         what `ptst judge` does; returns the report
    write_inspect_logs(folder)              .eval logs of an evaluation or a grid, for inspect_ai
    UserError                               a mistake in settings or data: cause, remedy, where
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ptst.audit.config import AuditConfig as AuditConfig
    from ptst.audit.report import audit_data as audit_data
    from ptst.defenses.command_config import DefendConfig as DefendConfig
    from ptst.defenses.write import defend_model as defend_model
    from ptst.errors import UserError as UserError
    from ptst.evaluation.config import EvalConfig as EvalConfig
    from ptst.evaluation.evaluate import evaluate as evaluate
    from ptst.evaluation.inspect_log import write_inspect_logs as write_inspect_logs
    from ptst.evaluation.judge_config import JudgeConfig as JudgeConfig
    from ptst.evaluation.judging import judge_answers as judge_answers
    from ptst.exporting.config import ExportConfig as ExportConfig
    from ptst.exporting.export import export_model as export_model
    from ptst.generation.request import Answer as Answer
    from ptst.generation.request import Sampling as Sampling
    from ptst.notebook import audit_conversation as audit_conversation
    from ptst.notebook import generate as generate
    from ptst.open import OpenModel as OpenModel
    from ptst.open import open_model as open_model
    from ptst.text.segments import Conversation as Conversation
    from ptst.text.segments import Message as Message
    from ptst.training.config import TrainConfig as TrainConfig
    from ptst.training.fine_tune import fine_tune as fine_tune

__version__ = "0.2.0"
_PLACES = {
    "Answer": "ptst.generation.request",
    "AuditConfig": "ptst.audit.config",
    "Conversation": "ptst.text.segments",
    "DefendConfig": "ptst.defenses.command_config",
    "EvalConfig": "ptst.evaluation.config",
    "ExportConfig": "ptst.exporting.config",
    "JudgeConfig": "ptst.evaluation.judge_config",
    "Message": "ptst.text.segments",
    "OpenModel": "ptst.open",
    "Sampling": "ptst.generation.request",
    "TrainConfig": "ptst.training.config",
    "UserError": "ptst.errors",
    "audit_conversation": "ptst.notebook",
    "audit_data": "ptst.audit.report",
    "defend_model": "ptst.defenses.write",
    "evaluate": "ptst.evaluation.evaluate",
    "export_model": "ptst.exporting.export",
    "fine_tune": "ptst.training.fine_tune",
    "generate": "ptst.notebook",
    "judge_answers": "ptst.evaluation.judging",
    "open_model": "ptst.open",
    "write_inspect_logs": "ptst.evaluation.inspect_log",
}
__all__ = [*_PLACES]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'ptst' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
