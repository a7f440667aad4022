"""Settings of an evaluation."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from ptst.data import prompt_sets, sources
from ptst.errors import Setting, UserError
from ptst.evaluation.judges import JUDGES, judge_kind
from ptst.evaluation.similarity import SIMILARITIES
from ptst.evaluation.tasks.table import TASKS, find_task
from ptst.generation.request import Sampling
from ptst.settings import (
    NO_EFFECT,
    AdapterName,
    ApiSettings,
    ColumnSettings,
    CommandSettings,
    EndpointSettings,
    EngineSettings,
    FormatSettings,
    LogSettings,
    OptionalModel,
    Precision,
    Quantize,
    RevisionSettings,
    SamplingSettings,
    TemplateSettings,
    ThreadSettings,
    check_above_zero,
    check_at_least,
    content,
)
from ptst.text.templates import find_template

_DATA_HELP = (
    f"Problems to solve: {sources.DEFAULT}, {', '.join(sources.NAMED)}, org/name:split@revision (hub) or a file. "
    "Default: the test part of the training data."
)
_SAFETY_HELP = (
    f"Harmful requests: a CSV, TSV, JSONL, JSON, Parquet or TXT file, {', '.join(prompt_sets.SETS)}, NAME:FILE, or "
    f"org/name:split@revision (hub). Default: "
    f"{prompt_sets.BUILT_IN}."
)
_JUDGES = ", ".join(f"{name} ({meaning})" for name, meaning in JUDGES.items())
_JUDGE_HELP = f"Judge that classifies answers; a model as KIND:FOLDER or KIND:api:MODEL. There are: {_JUDGES}."
_SIMILARITIES = ", ".join(f"{name} ({meaning})" for name, meaning in SIMILARITIES.items())
_TASKS_HELP = (
    f"What to measure, each as NAME or NAME:DATA (a file, or the name of a set): {', '.join(TASKS)} (docs/tasks.md). "
    "Default: safety, over-refusal and, where the data have a test part, nll and gsm8k."
)


@dataclass(frozen=True, kw_only=True)
class EvalSettings(FormatSettings, ColumnSettings, SamplingSettings, EngineSettings, ApiSettings):
    """How a model is evaluated: what a grid takes under `eval.`."""

    limit: int = 100
    """Maximum number of prompts per task."""
    max_new_tokens: int | None = None
    """Maximum length of an answer in tokens. Default: 96 for the built-in problems, 400 for others, 256 for ARC and
    ChatDoctor, 64 for requests."""
    data: Annotated[str | None, arg(help=_DATA_HELP)] = field(default=None, metadata=content("data"))
    safety_data: Annotated[str | None, arg(help=_SAFETY_HELP)] = field(default=None, metadata=content("data"))
    judge: Annotated[str, arg(help=_JUDGE_HELP)] = field(default="rules-v3", metadata=NO_EFFECT)  # judged anew
    similarity: Annotated[str, arg(help=f"How the task chatdoctor compares answers: {_SIMILARITIES}.")] = "minilm"
    dtype: Precision = "auto"
    """Data type of weights and computation. auto: bfloat16 on a GPU, float32 on a CPU."""
    quantize: Quantize | None = None
    """Round the base model's projections to the values of nf4 or int8, or none. Default: as the run was trained
    (docs/quantized.md)."""
    seed: int = 0
    """Seed of sampled answers (decoding seed)."""
    decode_seeds: int = 1
    """Number of decodings, with seeds seed, seed + 1, ...; mean and SD over them are reported. Needs a temperature."""

    def check(self) -> None:
        """Raise UserError for a value out of range."""
        from ptst.audit.findings import check_names

        if self.quantize not in (None, "none"):
            from ptst.model.quantized import check_library

            check_library()
        check_names(self.allow)
        check_at_least(self, 1, "limit", "batch_size", "max_new_tokens", "decode_seeds")
        if self.decode_seeds > 1 and self.temperature == 0:
            cause = (Setting("decode_seeds"), " needs ", Setting("temperature"), " above 0")
            raise UserError(cause, "greedy answers are the same for every seed")
        check_above_zero(self, "kv_memory")
        Sampling(self.max_new_tokens or 1, self.temperature, self.top_p, self.seed, self.top_k)  # checks its values
        judge_kind(self.judge)
        self.check_api()
        _ = self.column_rules  # checks the names


@dataclass(frozen=True, kw_only=True)
class EvalConfig(
    CommandSettings, RevisionSettings, EndpointSettings, ThreadSettings, EvalSettings, TemplateSettings, LogSettings
):
    """Measure helpfulness and safety under a test template. Without --checkpoint and --model: the latest run."""

    checkpoint: Path | None = field(default=None, metadata=content("run_weights"))
    """Run folder of ptst.train, or a step of it (RUN/state/step-00000050); its base model is measured, too."""
    model: OptionalModel = field(default=None, metadata=content("weights"))
    adapter: AdapterName = field(default=None, metadata=content("adapter_weights"))
    tasks: Annotated[tuple[str, ...] | None, arg(help=_TASKS_HELP)] = field(default=None, metadata=content("data"))
    baseline: bool = True
    """Measure the base model of a run or an adapter, too."""
    out: Path | None = field(default=None, metadata=NO_EFFECT)
    """Folder for answers and figures. Default: a new folder in the run, or checkpoints/eval-<date>-<time>. An
    unfinished evaluation with the same settings is resumed."""

    def check(self) -> None:
        """Raise UserError for a value out of range."""
        super().check()
        check_at_least(self, 1, "threads")
        self.check_endpoint(self.model)
        if self.tasks is not None and not self.tasks:
            raise UserError((Setting("tasks"), " is empty"), "name at least one task, or leave it out")
        for spec in self.tasks or ():
            find_task(spec)
        if self.template_file is None:
            find_template(self.template)
