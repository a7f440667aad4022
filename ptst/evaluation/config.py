"""Settings of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ptst.errors import Setting, UserError
from ptst.settings import (
    CommandSettings,
    EngineSettings,
    FormatSettings,
    ModelName,
    Precision,
    SamplingSettings,
    TemplateSettings,
    check_above_zero,
    check_at_least,
)

DEFAULT_TASKS = ("gsm8k", "safety", "over-refusal", "nll")


@dataclass(frozen=True, kw_only=True)
class EvalSettings(FormatSettings, SamplingSettings, EngineSettings):
    """How a model is evaluated: what a grid takes under `eval.`."""

    limit: int = 100
    """Maximum number of prompts per task."""
    max_new_tokens: int | None = None
    """Maximum length of an answer in tokens. Default: 96 for the built-in problems, 400 for others, 256 for ARC and
    ChatDoctor, 64 for requests."""
    data: str | None = None
    """Problems to solve: word-problems, gsm8k, chatdoctor or a file. Default: the test part of what the run was trained
    on."""
    safety_data: str | None = None
    """Harmful requests: a CSV, JSONL, JSON or TXT file, advbench, directharm4, gsm-danger, jailbreakbench or
    gsm-danger-substitute, or NAME:FILE. Default: the built-in set."""
    judge: str = "rules-v2"
    """Judge that classifies answers: rules-v2 (embedded), or rubric:FOLDER with a local chat model."""
    similarity: str = "minilm"
    """How chatdoctor compares answers: minilm (embedded), bertscore or bertscore:FOLDER (the paper's)."""
    dtype: Precision = "auto"
    """Data type of weights and computation. auto: bfloat16 on a GPU, float32 on a CPU."""
    seed: int = 0
    """Seed of sampled answers (decoding seed)."""

    def check(self) -> None:
        """Raise UserError for a value that makes no sense."""
        check_at_least(self, 1, "limit", "batch_size")
        check_above_zero(self, "kv_memory")


@dataclass(frozen=True, kw_only=True)
class EvalConfig(CommandSettings, EvalSettings, TemplateSettings):
    """Measure helpfulness and safety under a test template. Without --checkpoint and --model: the latest run."""

    checkpoint: Path | None = None
    """Run folder of ptst.train; its base model is measured, too."""
    model: ModelName | None = None
    tasks: tuple[str, ...] = DEFAULT_TASKS
    """What to measure, each as NAME or NAME:DATA (a file, or for prompts a set): gsm8k, nll, arc-easy, arc-challenge,
    chatdoctor, safety, over-refusal, xstest, prompts (docs/tasks.md)."""
    baseline: bool = True
    """Measure the base model beside a run."""
    decode_seeds: int = 1
    """Number of decodings, with seeds seed, seed + 1, ...; mean and SD over them are reported. Needs a temperature."""
    out: Path | None = None
    """Folder for answers and figures. Default: a new folder in the run, or checkpoints/eval-<date>-<time>. An
    unfinished evaluation with the same settings is resumed."""

    def check(self) -> None:
        """Raise UserError for a value that makes no sense."""
        super().check()
        check_at_least(self, 1, "decode_seeds")
        if not self.tasks:
            raise UserError((Setting("tasks"), " is empty"), f"the default is {', '.join(DEFAULT_TASKS)}")
        if self.decode_seeds > 1 and self.temperature == 0:
            raise UserError(
                (Setting("decode_seeds"), " needs ", Setting("temperature"), " above 0"),
                "greedy answers are the same for every seed",
            )
