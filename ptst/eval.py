"""`python -m ptst.eval`: helpfulness and safety of a model, or of a finished run beside its untouched base."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from ptst import cli
from ptst.cli import ProgressLine, say
from ptst.data import sources
from ptst.evaluation import foresight, report
from ptst.evaluation.answers import Answerer
from ptst.evaluation.judges import find_judge
from ptst.evaluation.rules import RuleBasedJudge
from ptst.evaluation.similarity import find_similarity
from ptst.evaluation.tasks import TASKS
from ptst.evaluation.tasks.result import TaskResult, over_decodings
from ptst.evaluation.tasks.table import NEW_TOKENS, Defaults, Task, TaskData, Tools, load_tasks
from ptst.generation.request import Statistics
from ptst.generation.sampling import Sampling
from ptst.model.config import DecoderConfig, read_json
from ptst.model.decoder import Decoder
from ptst.model.weights import pick_dtype, write_atomically
from ptst.subject import CHECKPOINTS, Subject, find_run, open_subject
from ptst.text.template_file import load_template
from ptst.text.templates import find_template
from ptst.training import run_folder
from ptst.training.resume import differences, exclusive_lock, weights_fingerprint


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
    tasks: tuple[str, ...] = TASKS
    """What to measure, each as NAME or NAME:DATA (a file, or for prompts a set): gsm8k, nll, arc-easy, arc-challenge,
    chatdoctor, safety, over-refusal, xstest, prompts (docs/tasks.md)."""
    limit: int = 100
    """At most so many prompts a task."""
    max_new_tokens: int | None = None
    """Longest answer in tokens. Left out: 96 for the built-in problems, 400 for others, 256 for ARC and ChatDoctor, 64
    for requests."""
    batch_size: int = 64
    """Answers in the making at once, at most; changes speed and memory, never an answer."""
    kv_memory: float | None = None
    """Gigabytes that keys and values of the answers in the making may take. Left out: half of what is free on a CPU,
    85 % on a GPU."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """Sample from so many of the likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens of this probability."""
    data: str | None = None
    """Problems: word-problems, gsm8k, chatdoctor or a file. Left out: the test part of what the run was trained on,
    which a file has not."""
    safety_data: str | None = None
    """Harmful requests: a CSV, JSONL, JSON or TXT file, or advbench, directharm4, gsm-danger, jailbreakbench or
    gsm-danger-substitute, or NAME:FILE. Left out: the built-in set."""
    judge: str = RuleBasedJudge.name
    """Who classifies answers: the embedded rules-v2, or rubric:FOLDER with a local chat model."""
    similarity: str = "minilm"
    """How chatdoctor compares answers: minilm (embedded), bertscore or bertscore:FOLDER (the paper's)."""
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
    decode_seeds: int = 1
    """Decodings with seeds seed, seed + 1, ...; mean and SD over them are reported. Needs a temperature."""
    out: Path | None = None
    """Where answers and figures go. Left out: a new folder in the run, or checkpoints/eval-<date>-<time>. An unfinished
    evaluation of the same settings goes on."""
    json: bool = False
    """Print the result as one JSON object."""

    def check(self) -> None:
        """Raise ValueError for a value that cannot be meant."""
        if self.limit < 1:
            raise ValueError(f"--limit is {self.limit}; at least 1 prompt is needed")
        if not self.tasks:
            raise ValueError(f"--tasks is empty; choose from {', '.join(TASKS)}")
        if self.batch_size < 1:
            raise ValueError(f"--batch-size is {self.batch_size}; it must be at least 1")
        if self.kv_memory is not None and not self.kv_memory > 0:
            raise ValueError(f"--kv-memory is {self.kv_memory}; it must be above 0")
        if self.decode_seeds < 1:
            raise ValueError(f"--decode-seeds is {self.decode_seeds}; it must be at least 1")
        if self.decode_seeds > 1 and self.temperature == 0:
            raise ValueError("--decode-seeds needs --temperature above 0: greedy answers are the same for every seed")
        self.sampling("requests")

    @property
    def kv_bytes(self) -> int | None:
        """`kv_memory` in bytes."""
        return None if self.kv_memory is None else int(self.kv_memory * 1e9)

    def sampling(self, kind: str, seed: int | None = None) -> Sampling:
        """How answers of a kind (a key of NEW_TOKENS) are drawn; `seed` None: the first decoding's."""
        longest = NEW_TOKENS[kind] if self.max_new_tokens is None else self.max_new_tokens
        return Sampling(longest, self.temperature, self.top_p, self.seed if seed is None else seed, self.top_k)


# Flags that change where, how fast and how the result is told, and nothing of what is measured.
_FREE = frozenset({"out", "json", "batch_size", "kv_memory"})


def run_evaluation(config: EvalConfig) -> dict[str, Any]:
    """Everything of an evaluation; returns what `--json` prints. Raises ValueError for a user's mistakes."""
    began = time.monotonic()
    config.check()
    template = load_template(config.template_file) if config.template_file else find_template(config.template)
    checkpoint, run = find_run(config.checkpoint, config.model)
    what = f"run {checkpoint} (trained under {run['template']['name']})" if checkpoint else f"model {config.model}"
    say(f"ptst.eval: {what}, test template {template.name}")

    problems = config.data or run.get("data", {}).get("name", sources.DEFAULT)
    defaults = Defaults(problems, config.data, config.safety_data, config.limit)
    asked = load_tasks(config.tasks, defaults)
    for note in {data.note for _, data in asked.values()} - {""}:
        say(note)
    family = config.template_family or run.get("family", {}).get("name")
    family = family or next((data.family for _, data in asked.values() if data.family), None)
    family = family or sources.load(problems, "test", config.limit).family
    subject = open_subject(checkpoint, run, config.model, template, family, config.chat_format)
    say(subject.described)
    dtype, device = pick_dtype(config.dtype), "cuda" if torch.cuda.is_available() else "cpu"
    settings = {
        "flags": {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()},
        "model": str(subject.base.resolve()),
        "weights": weights_fingerprint(subject.base),
        "run": str(checkpoint) if checkpoint else None,
        "run_weights": weights_fingerprint(checkpoint) if checkpoint else None,
        "template": dataclasses.asdict(subject.prompt_format.template),
        "family": subject.family,
        "chat_format": subject.prompt_format.chat_format,
        "data": {
            key: {"name": data.name, "fingerprint": data.fingerprint, "items": len(data.items)}
            for key, (_, data) in asked.items()
        },
        "dtype": str(dtype).removeprefix("torch."),
    }
    shape = DecoderConfig.from_folder(subject.base)
    for key, (task, data) in asked.items():
        new = config.sampling(data.kind).max_new_tokens if task.sampled else 0
        prompts = foresight.asked(task, data, subject.prompt_format)
        foresight.check_room(key, prompts, new, shape, dtype, device, config.kv_bytes)
    compares = any(task.name == "chatdoctor" for task, _ in asked.values())
    similarity = find_similarity(config.similarity, CHECKPOINTS, device) if compares else None
    tools = Tools(find_judge(config.judge), similarity)
    with _claim(config, checkpoint, settings) as out:
        results: dict[str, dict[str, TaskResult]] = {}
        decoder: Decoder | None = None
        failed: list[str] = []
        if config.baseline or not checkpoint:
            decoder = subject.untouched(dtype, device)
            results["untouched"] = _measure("untouched", decoder, subject, config, asked, tools, out, failed)
        if checkpoint:
            decoder = subject.tuned(dtype, device, decoder)
            results["fine-tuned"] = _measure("fine-tuned", decoder, subject, config, asked, tools, out, failed)
        if failed:
            # A row of the table needs the task of every model.
            whole = [key for key in asked if all(key in by_task for by_task in results.values())]
            shown = {model: {key: by_task[key] for key in whole} for model, by_task in results.items()}
            Console(stderr=True).print(report.table(shown, f"tested under {template.name}", tools.judge.name))
            raise ValueError(f"not everything could be measured: {'; '.join(failed)}")
        summary = {
            "kind": "eval",
            **settings,
            "train_template": run.get("template", {}).get("name"),
            "test_template": template.name,
            # The paper's recipe: trained without a safety prompt, tested with one (of another template, therefore).
            "ptst": bool(checkpoint) and template.safety and not run["template"]["safety"],
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
    screen.print(report.table(results, f"{trained}tested under {template.name}", tools.judge.name))
    if summary["remark"]:
        screen.print(summary["remark"])
    say(f"finished in {summary['time']['seconds']:.0f} s; answers and figures in {out}")
    return {"out": str(out), **{k: summary[k] for k in ("run", "train_template", "test_template", "results", "remark")}}


@contextmanager
def _claim(config: EvalConfig, checkpoint: Path | None, settings: dict[str, Any]) -> Iterator[Path]:
    """The folder of the evaluation, held while it is written: a new one, or that of an unfinished one of the same
    settings. Raises ValueError for a folder in other use, with the settings that differ. Says how to go on if it is
    left early."""
    parent = checkpoint / "eval" if checkpoint else CHECKPOINTS
    with ExitStack() as held:
        out, kept = config.out, None
        if out is None and (out := _unfinished(parent, settings, held)) is not None:
            kept = settings
        elif out is not None and (out / "settings.json").exists() and not (out / "results.json").exists():
            kept = read_json(out / "settings.json")
            if not isinstance(kept, dict) or "flags" not in kept:
                raise ValueError(f"{out / 'settings.json'} is not that of an evaluation; choose another --out")
            if found := differences(kept, settings, _FREE):
                raise ValueError(
                    f"{out} holds an unfinished evaluation of other settings: {'; '.join(found)}; choose another --out"
                )
            held.enter_context(exclusive_lock(out))
        else:
            out = run_folder.create(config.out, parent, "eval")
            held.enter_context(exclusive_lock(out))
            run_folder.write_json(out / "settings.json", settings)
        say(f"answers go to {out}" if kept is None else f"going on with the unfinished evaluation in {out}")
        (out / "answers").mkdir(exist_ok=True)
        try:
            yield out
        except (KeyboardInterrupt, OSError, ValueError):
            say(f"the answers so far are kept in {out}; the same command goes on from there")
            raise


def _unfinished(parent: Path, settings: dict[str, Any], held: ExitStack) -> Path | None:
    """The newest folder here that an evaluation of these settings has left unfinished, held for us; None where there is
    none, or others hold them all."""
    for out in sorted(parent.glob("eval-*"), reverse=True):
        try:
            if (out / "results.json").exists() or differences(read_json(out / "settings.json"), settings, _FREE):
                continue
            held.enter_context(exclusive_lock(out))
        except (ValueError, OSError, KeyError, TypeError, AttributeError):  # damaged, another thing, in other hands
            continue
        return out
    return None


def _measure(
    name: str,
    decoder: Decoder,
    subject: Subject,
    config: EvalConfig,
    asked: dict[str, tuple[Task, TaskData]],
    tools: Tools,
    out: Path,
    failed: list[str],
) -> dict[str, TaskResult]:
    """Results by task; what went wrong with one is added to `failed`, and the others go on."""
    results: dict[str, TaskResult] = {}
    for key, (task, data) in asked.items():
        answers = out / "answers" / f"{name}.{key}.jsonl"
        by_seed: dict[int, TaskResult] = {}
        for seed in range(config.seed, config.seed + (config.decode_seeds if task.sampled else 1)):
            told = f"{name}: {key}" + (f", seed {seed}" if config.decode_seeds > 1 else "")
            with ProgressLine(told, len(data.items), first=None) as progress:

                def on_progress(done: int, statistics: Statistics, progress: ProgressLine = progress) -> None:
                    saved = f", {statistics.saved_tokens} prompt tokens shared" if statistics.saved_tokens else ""
                    progress.update(done, f"{statistics.progress()}{saved}")

                prompt_format, stop_ids = subject.prompt_format, subject.stop_ids
                answerer = Answerer(decoder, prompt_format, stop_ids, config.batch_size, config.kv_bytes, on_progress)
                sampling = config.sampling(data.kind, seed)
                try:
                    by_seed[seed] = task.measure(answerer, data.items, sampling, answers, tools)
                except ValueError as error:
                    failed.append(f"{told}: {error}")
        if len(by_seed) < (config.decode_seeds if task.sampled else 1):
            continue
        result = over_decodings(by_seed) if len(by_seed) > 1 else by_seed[config.seed]
        results[key] = dataclasses.replace(result, data=data.name)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in result.rows)
        write_atomically(out / f"{name}.{key}.jsonl", text.encode())
    return results


if __name__ == "__main__":
    cli.run(run_evaluation, EvalConfig, "ptst.eval")
