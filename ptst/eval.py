"""`python -m ptst.eval`: helpfulness and safety of a model, or of a finished run beside its untouched base."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from ptst import command
from ptst.command import ProgressLine, say
from ptst.data import safety_sets, sources
from ptst.evaluation import report, tasks
from ptst.evaluation.anchored import AnchoredJudge
from ptst.evaluation.judges import find_judge
from ptst.evaluation.tasks import TASKS, Answerer, TaskResult
from ptst.evaluation.verdict import Judge
from ptst.generation.sampler import Sampling
from ptst.model.config import DecoderConfig
from ptst.model.decoder import Decoder
from ptst.model.locate import locate_model
from ptst.model.lora import load_adapter, merge_lora
from ptst.model.weights import load_decoder, pick_dtype
from ptst.text.encode import Prompting
from ptst.text.formats import detect_format, stops
from ptst.text.own_template import with_default_system
from ptst.text.template_file import load_template
from ptst.text.templates import find_family, find_template
from ptst.text.tokenizer import load_tokenizer
from ptst.training import run_folder

CHECKPOINTS = Path("checkpoints")
# Enough for the built-in problems' short answers and for the opening of an answer, where a refusal shows.
NEW_TOKENS = {"word-problems": 96, "gsm8k": 400, "requests": 64}


@dataclass(frozen=True)
class EvalConfig:
    """Measure helpfulness and safety under a test template. Without --checkpoint and --model: the latest run."""

    template: str = "chat:llama"
    """Words round each prompt: text:vanilla, text:alpaca, chat:plain, chat:vanilla, chat:alpaca,
    chat:llama, chat:llama-short, chat:mpt, chat:self-reminder, chat:in-context-defense. A bare name means chat:."""
    template_file: Path | None = None
    """A template of your own, in TOML, instead of --template (docs/templates.md)."""
    checkpoint: Path | None = None
    """Run folder of ptst.train; its untouched base model is measured beside it."""
    model: str | None = None
    """An untouched model: the embedded smollm2-135m-instruct, a Hugging Face folder, or a hub id."""
    tasks: tuple[Literal["gsm8k", "safety", "over-refusal", "nll"], ...] = TASKS
    """What to measure."""
    limit: int = 100
    """At most so many prompts a task."""
    max_new_tokens: int | None = None
    """Longest answer in tokens. Left out: 96 for the built-in problems, 400 for others, 64 for requests."""
    batch_size: int = 50
    """Answers in the making at once."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens of this probability."""
    data: str | None = None
    """Problems: word-problems, gsm8k or a file. Left out: what the run was trained on, its test part."""
    safety_data: Path | None = None
    """Improper requests, CSV, JSONL or TXT. Left out: the built-in set."""
    judge: str = AnchoredJudge.name
    """Of requests: anchored-v2, or rubric:FOLDER for a score of 1 to 5 by a local chat model (docs/judges.md)."""
    template_family: str | None = None
    """How a prompt is wrapped: gsm8k, chatdoctor, openorca or plain. Left out: the run's, or the problems' own."""
    chat_format: str | None = None
    """How roles are spelled: chatml, llama2, llama3, mistral-v1 or mistral-v3. Left out: the run's, or the folder's
    own."""
    baseline: bool = True
    """Measure the untouched base model beside a run."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on a GPU, float32 on a CPU."""
    seed: int = 0
    """Of sampled answers."""
    out: Path | None = None
    """Where answers and figures go. Left out: a new folder in the run, or checkpoints/eval-<date>-<time>."""
    json: bool = False
    """Print the result as one JSON object."""

    def check(self) -> None:
        """Raise ValueError for a value that cannot be meant."""
        if self.limit < 1:
            raise ValueError(f"--limit is {self.limit}; at least 1 prompt is needed")
        if not self.tasks:
            raise ValueError(f"--tasks is empty; choose from {', '.join(TASKS)}")
        if self.checkpoint is not None and self.model is not None:
            raise ValueError("--checkpoint and --model exclude each other: a run knows its base model")
        Sampling(self.max_new_tokens or 1, self.temperature, self.top_p, self.seed)


def run_evaluation(config: EvalConfig) -> dict[str, Any]:
    """Everything of an evaluation; returns what `--json` prints. Raises ValueError for a user's mistakes."""
    began = time.monotonic()
    config.check()
    template = load_template(config.template_file) if config.template_file else find_template(config.template)
    checkpoint = config.checkpoint
    if checkpoint is None and config.model is None:
        checkpoint = run_folder.latest_run(CHECKPOINTS)
    run = run_folder.read_run(checkpoint) if checkpoint else {}
    what = f"run {checkpoint} (trained under {run['template']['name']})" if checkpoint else f"model {config.model}"
    say(f"ptst.eval: {what}, test template {template.name}")

    problems = sources.load(config.data or run.get("data", {}).get("name", sources.DEFAULT), "test", config.limit)
    improper = _improper(config)
    family = find_family(config.template_family or run.get("family", {}).get("name") or problems.family)
    base = locate_model(run["model_name"] if checkpoint else str(config.model), CHECKPOINTS)
    folder = checkpoint if checkpoint and run["full"] else base
    shape = DecoderConfig.from_folder(base)
    tokenizer = load_tokenizer(base, shape.vocab_size)
    chat_format = config.chat_format or run.get("chat_format") or detect_format(base, tokenizer)
    template = with_default_system(template, base)
    # A test prompt with forged role marks is an attack to be measured, not a row to be mended.
    prompting = Prompting(template, family, chat_format, tokenizer, allow_marks=True)
    stop_ids = stops(base, None if template.is_text else chat_format, tokenizer)
    say(f"chat format {'none (text template)' if template.is_text else chat_format}, family {family.name}")

    dtype, device = pick_dtype(config.dtype), "cuda" if torch.cuda.is_available() else "cpu"
    judge = find_judge(config.judge)
    out = run_folder.create(config.out, checkpoint / "eval" if checkpoint else CHECKPOINTS, "eval")
    results: dict[str, dict[str, TaskResult]] = {}
    decoder: Decoder | None = None
    if config.baseline or not checkpoint:
        decoder = load_decoder(base, dtype, device)
        results["untouched"] = _measure(
            "untouched", decoder, prompting, stop_ids, config, judge, problems, improper, out
        )
    if checkpoint:
        if run["full"] or decoder is None:
            decoder = load_decoder(folder, dtype, device)
        if not run["full"]:
            load_adapter(decoder, checkpoint)
            if dtype == torch.float32:
                merge_lora(decoder)  # exact enough in float32, and faster; a bfloat16 base keeps it apart
        results["fine-tuned"] = _measure(
            "fine-tuned", decoder, prompting, stop_ids, config, judge, problems, improper, out
        )

    summary = {
        "kind": "eval",
        "flags": {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()},
        "run": str(checkpoint) if checkpoint else None,
        "model": str(base.resolve()),
        "train_template": run.get("template", {}).get("name"),
        "test_template": template.name,
        # The paper's recipe: trained without a safety prompt, tested with one (of another template, therefore).
        "ptst": bool(checkpoint) and template.safety and not run["template"]["safety"],
        "family": family.name,
        "chat_format": chat_format,
        "data": {"name": problems.name, "fingerprint": problems.fingerprint},
        "results": {m: {t: r.to_json() for t, r in by_task.items()} for m, by_task in results.items()},
        "remark": report.remark(results),
        "environment": run_folder.environment(),
        "time": {"seconds": time.monotonic() - began},
    }
    run_folder.write_json(out / "results.json", summary)
    trained = f"trained under {summary['train_template']}, " if checkpoint else ""
    if summary["ptst"]:
        trained = f"PTST: {trained}"
    screen = Console(stderr=config.json)  # with --json, standard output carries the object alone
    screen.print(report.table(results, f"{trained}tested under {template.name}", judge.name))
    if summary["remark"]:
        screen.print(summary["remark"])
    say(f"finished in {summary['time']['seconds']:.0f} s; answers and figures in {out}")
    return {"out": str(out), **{k: summary[k] for k in ("run", "train_template", "test_template", "results", "remark")}}


def _improper(config: EvalConfig) -> list[safety_sets.SafetyPrompt]:
    if config.safety_data is None:
        return safety_sets.improper(config.limit)
    return safety_sets.read_prompts(config.safety_data)[: config.limit]


def _measure(
    name: str,
    decoder: Decoder,
    prompting: Prompting,
    stop_ids: frozenset[int],
    config: EvalConfig,
    judge: Judge,
    problems: sources.Source,
    improper: list[safety_sets.SafetyPrompt],
    out: Path,
) -> dict[str, TaskResult]:
    kind = "word-problems" if problems.name.startswith(sources.DEFAULT) else "gsm8k"
    worked, short = (
        Sampling(config.max_new_tokens or NEW_TOKENS[k], config.temperature, config.top_p, config.seed)
        for k in (kind, "requests")
    )
    results: dict[str, TaskResult] = {}
    for task in config.tasks:
        harmless = safety_sets.look_alikes(config.limit) if task == "over-refusal" else []
        total = {"safety": len(improper), "over-refusal": len(harmless)}.get(task, len(problems.conversations))
        start = time.monotonic()
        with ProgressLine(f"{name}: {task}", total) as progress:

            def on_done(done: int, tokens: int, progress: ProgressLine = progress, start: float = start) -> None:
                progress.update(done, f"{tokens / (time.monotonic() - start):.0f} tokens/s")

            answerer = Answerer(decoder, prompting, stop_ids, config.batch_size, on_done)
            if task == "gsm8k":
                result = tasks.gsm8k(answerer, problems.conversations, worked)
            elif task == "nll":
                result = tasks.nll(answerer, problems.conversations)
            else:
                result = tasks.requests(task, answerer, improper if task == "safety" else harmless, short, judge)
        for row in result.rows:
            run_folder.append_jsonl(out / f"{name}.{task}.jsonl", row)
        results[task] = result
    return results


if __name__ == "__main__":
    command.run(run_evaluation, EvalConfig, "ptst.eval")
