"""`python -m ptst.eval`: helpfulness and safety of a model, or of a finished run beside its untouched base."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ptst import cli
from ptst.data import sources
from ptst.errors import UserError
from ptst.evaluation import foresight, report
from ptst.evaluation.answers import Answerer
from ptst.evaluation.config import EvalConfig
from ptst.evaluation.judges import find_judge
from ptst.evaluation.similarity import find_similarity
from ptst.evaluation.tasks.result import TaskResult, over_decodings
from ptst.evaluation.tasks.table import Defaults, Task, TaskData, Tools, load_tasks, sampling_for
from ptst.generation.request import Statistics
from ptst.model.config import read_json
from ptst.model.decoder import Decoder
from ptst.model.weights import pick_dtype
from ptst.open import CHECKPOINTS, OpenModel, find_run, open_model
from ptst.progress import ProgressLine, say
from ptst.settings import to_dict
from ptst.storage import write_atomically
from ptst.text.template_file import load_template
from ptst.text.templates import find_template
from ptst.training import run_folder
from ptst.training.resume import differences, exclusive_lock, weights_fingerprint

# Settings that change where, how fast and how the result is told, and nothing of what is measured.
_FREE = frozenset({"out", "batch_size", "kv_memory"})


def run_evaluation(config: EvalConfig) -> dict[str, Any]:
    """Everything of an evaluation; returns what `--json` prints. Raises UserError for a user's mistakes."""
    began = time.monotonic()
    config.check()
    sampling_for(config, "requests")
    template = load_template(config.template_file) if config.template_file else find_template(config.template)
    checkpoint, run = find_run(config.checkpoint, config.model)
    what = f"run {checkpoint} (trained under {run.template.name})" if run else f"model {config.model}"
    say(f"ptst.eval: {what}, test template {template.name}")

    problems = config.data or (run.data.name if run else sources.DEFAULT)
    defaults = Defaults(problems, config.data, config.safety_data, config.limit)
    asked = load_tasks(config.tasks, defaults)
    for note in {data.note for _, data in asked.values()} - {""}:
        say(note)
    family = config.template_family or (run.family.name if run else None)
    family = family or next((data.family for _, data in asked.values() if data.family), None)
    family = family or sources.load(problems, "test", config.limit).family
    model = open_model(config.model, template, checkpoint=checkpoint, family=family, chat_format=config.chat_format)
    say(model.prompt_format.described)
    dtype, device = pick_dtype(config.dtype), "cuda" if torch.cuda.is_available() else "cpu"
    settings = {
        "flags": to_dict(config),
        "model": str(model.folder.resolve()),
        "weights": weights_fingerprint(model.folder),
        "run": str(checkpoint) if checkpoint else None,
        "run_weights": weights_fingerprint(checkpoint) if checkpoint else None,
        "template": dataclasses.asdict(model.prompt_format.template),
        "family": model.prompt_format.family.name,
        "chat_format": model.prompt_format.chat_format.name,
        "data": {
            key: {"name": data.name, "fingerprint": data.fingerprint, "items": len(data.items)}
            for key, (_, data) in asked.items()
        },
        "dtype": str(dtype).removeprefix("torch."),
    }
    for key, (task, data) in asked.items():
        new = sampling_for(config, data.kind).max_new_tokens if task.sampled else 0
        prompts = foresight.asked(task, data, model.prompt_format)
        foresight.check_room(key, prompts, new, model.config, dtype, device, config.kv_bytes)
    compares = any(task.name == "chatdoctor" for task, _ in asked.values())
    similarity = find_similarity(config.similarity, CHECKPOINTS, device) if compares else None
    tools = Tools(find_judge(config.judge), similarity)
    with _claim(config, checkpoint, settings) as out:
        results: dict[str, dict[str, TaskResult]] = {}
        decoder: Decoder | None = None
        failed: list[str] = []
        if config.baseline or not checkpoint:
            decoder = model.load_base(dtype, device)
            results["untouched"] = _measure("untouched", decoder, model, config, asked, tools, out, failed)
        if checkpoint:
            decoder = model.load(dtype, device, decoder)
            results["fine-tuned"] = _measure("fine-tuned", decoder, model, config, asked, tools, out, failed)
        if failed:
            # A row of the table needs the task of every model.
            whole = [key for key in asked if all(key in by_task for by_task in results.values())]
            shown = {model: {key: by_task[key] for key in whole} for model, by_task in results.items()}
            Console(stderr=True).print(report.table(shown, f"tested under {template.name}", tools.judge.name))
            raise UserError(f"not everything could be measured: {'; '.join(failed)}")
        summary = {
            "kind": "eval",
            **settings,
            "train_template": run.template.name if run else None,
            "test_template": template.name,
            # The paper's recipe: trained without a safety prompt, tested with one (of another template, therefore).
            "ptst": run is not None and template.safety and not run.template.safety,
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
    settings. Raises UserError for a folder in other use, with the settings that differ. Says how to go on if it is
    left early."""
    parent = checkpoint / "eval" if checkpoint else CHECKPOINTS
    with ExitStack() as held:
        out, kept = config.out, None
        if out is None and (out := _unfinished(parent, settings, held)) is not None:
            kept = settings
        elif out is not None and (out / "settings.json").exists() and not (out / "results.json").exists():
            kept = read_json(out / "settings.json")
            if not isinstance(kept, dict) or "flags" not in kept:
                raise UserError(f"{out / 'settings.json'} is not that of an evaluation; choose another --out")
            if found := differences(kept, settings, _FREE):
                raise UserError(
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
    model: OpenModel,
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
                    saved = f", {statistics.cached_tokens} prompt tokens shared" if statistics.cached_tokens else ""
                    progress.update(done, f"{statistics.progress()}{saved}")

                prompt_format, stop_ids = model.prompt_format, model.stop_ids
                answerer = Answerer(decoder, prompt_format, stop_ids, config.batch_size, config.kv_bytes, on_progress)
                sampling = sampling_for(config, data.kind, seed)
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


def main() -> None:
    cli.run(run_evaluation, EvalConfig, "eval")


if __name__ == "__main__":
    main()
