"""An evaluation: helpfulness and safety of a model, or of a finished run and its base model."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ptst.data import sources
from ptst.errors import UserError
from ptst.evaluation import report
from ptst.evaluation.answers import Answerer
from ptst.evaluation.config import EvalConfig
from ptst.evaluation.measure import Measured, check_room, evaluate_model, find_tools
from ptst.evaluation.tasks.table import LoadedTasks, default_tasks, load_tasks
from ptst.evaluation.tasks.task import Defaults, TaskResult, Tools
from ptst.model.config import read_json
from ptst.model.weights import pick_dtype
from ptst.open import CHECKPOINTS, OpenModel, find_run, open_model
from ptst.progress import say
from ptst.settings import to_dict
from ptst.text.template_file import load_template
from ptst.text.templates import find_template
from ptst.training import run_folder
from ptst.training.resume import differences, exclusive_lock, weights_fingerprint

# Settings without effect on what is measured.
_FREE = frozenset({"out", "batch_size", "kv_memory"})
BASE, TUNED = "untouched", "fine-tuned"  # names of the models in results and files


@dataclass(frozen=True)
class EvalResult:
    """Results by model (the base model "untouched", "fine-tuned") and task; `record` is what results.json has."""

    out: Path
    results: Mapping[str, Mapping[str, TaskResult]]
    record: Mapping[str, Any]
    judge: str

    @property
    def title(self) -> str:
        trained = f"trained under {self.record['train_template']}, " if self.record["run"] else ""
        return f"{'PTST: ' * self.record['ptst']}{trained}tested under {self.record['test_template']}"


class IncompleteEvaluation(UserError):
    """Some tasks could not be measured; `result` has the others, as far as every model has them."""

    def __init__(self, failed: list[str], result: EvalResult):
        super().__init__(f"not everything could be measured: {'; '.join(failed)}")
        self.result = result


@dataclass(frozen=True)
class Plan:
    """An evaluation whose prompts, data and tools are known; no weights are loaded."""

    config: EvalConfig
    model: OpenModel
    tasks: LoadedTasks
    tools: Tools
    dtype: torch.dtype
    device: str


def plan(config: EvalConfig) -> Plan:
    """Open everything that an evaluation needs but the weights. Raises UserError for every mistake that can be found
    without them."""
    config.check()
    template = load_template(config.template_file) if config.template_file else find_template(config.template)
    checkpoint, run = find_run(config.checkpoint, config.model)
    trained = f" (trained under {run['template']['name']})" if checkpoint else ""
    subject = f"run {checkpoint}{trained}" if checkpoint else f"model {config.model}"
    say(f"ptst.eval: {subject}, test template {template.name}")
    problems = config.data or run.get("data", {}).get("name", sources.DEFAULT)
    defaults = Defaults(problems, config.data, config.safety_data, config.limit, run.get("flags", {}).get("holdout", 0))
    names = config.tasks
    if names is None:
        names, reason = default_tasks(defaults)
        say(f"tasks: {', '.join(names)} ({reason})")
    tasks = load_tasks(names, defaults)
    for note in {data.note for _, data in tasks.values()} - {""}:
        say(note)
    family = config.template_family or run.get("family", {}).get("name")
    family = family or next((data.family for _, data in tasks.values() if data.family), None)
    family = family or sources.load(problems, "test", config.limit).family
    model = open_model(config.model, template, checkpoint=checkpoint, family=family, chat_format=config.chat_format)
    say(model.prompt_format.described)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    say(f"encoding the prompts of {len(tasks)} tasks")
    for key, (task, data) in tasks.items():
        check_room(key, task, data, model, config, device)
    tools = find_tools(config, [task for task, _ in tasks.values()], device)
    return Plan(config, model, tasks, tools, pick_dtype(config.dtype), device)


def evaluate(config: EvalConfig) -> EvalResult:
    """Run an evaluation, or the rest of an unfinished one with the same settings; answers, judged rows and results.json
    are in the folder `out` of the result. Raises UserError for a user's mistakes, and IncompleteEvaluation."""
    began = time.monotonic()
    p = plan(config)
    settings = _settings(p)
    with _claim(config, p.model.checkpoint, settings) as out:
        measured = _measure_models(p, out)
        run = p.model.run
        record = {
            "kind": "eval",
            **settings,
            "train_template": run.get("template", {}).get("name"),
            "test_template": p.model.prompt_format.template.name,
            # The paper's recipe: trained without a safety prompt, tested with one (so with another template).
            "ptst": bool(run) and p.model.prompt_format.template.safety and not run["template"]["safety"],
        }
        results = {name: m.results for name, m in measured.items()}
        if failed := [sentence for m in measured.values() for sentence in m.failed]:
            whole = [key for key in p.tasks if all(key in by_task for by_task in results.values())]
            shown = {name: {key: by_task[key] for key in whole} for name, by_task in results.items()}
            raise IncompleteEvaluation(failed, EvalResult(out, shown, record, p.tools.judge.name))
        record |= {
            "results": {name: {t: r.to_json() for t, r in by_task.items()} for name, by_task in results.items()},
            "remark": report.remark(results, BASE),
            "environment": run_folder.environment(),
            "time": {"seconds": time.monotonic() - began},
        }
        run_folder.write_json(out / "results.json", record)
    return EvalResult(out, results, record, p.tools.judge.name)


def _measure_models(p: Plan, out: Path) -> dict[str, Measured]:
    """The base model, unless a run is measured without it, then the run."""
    measured: dict[str, Measured] = {}
    decoder = None
    for name in (BASE, TUNED):
        if (name == BASE and p.model.checkpoint and not p.config.baseline) or (
            name == TUNED and not p.model.checkpoint
        ):
            continue
        say(f"loading the {'base model' if name == BASE else 'run'}")
        if name == BASE:
            decoder = p.model.load_base(p.dtype, p.device)
        else:
            decoder = p.model.load(p.dtype, p.device, decoder)
        answerer = Answerer(decoder, p.model.prompt_format, p.config)
        measured[name] = evaluate_model(name, answerer, p.tasks, p.config, p.tools, out, p.config.decode_seeds)
    return measured


def _settings(p: Plan) -> dict[str, Any]:
    """What makes two evaluations the same."""
    model, checkpoint = p.model, p.model.checkpoint
    return {
        "flags": to_dict(p.config),
        "model": str(model.folder.resolve()),
        "weights": weights_fingerprint(model.folder),
        "run": str(checkpoint) if checkpoint else None,
        "run_weights": weights_fingerprint(checkpoint) if checkpoint else None,
        "template": dataclasses.asdict(model.prompt_format.template),
        "family": model.prompt_format.family.name,
        "chat_format": model.prompt_format.chat_format,
        "data": {
            key: {"name": data.name, "fingerprint": data.fingerprint, "items": len(data.items)}
            for key, (_, data) in p.tasks.items()
        },
        "dtype": str(p.dtype).removeprefix("torch."),
    }


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
