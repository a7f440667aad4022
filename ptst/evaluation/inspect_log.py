"""An evaluation, a grid or judged answers as logs of inspect_ai: one `.eval` file per model, test template and task.

Its viewer, scorers and data frames then read our results. The logs are made from the long table's lines, so that they
hold the same answers, verdicts and rates, and are written anew as judges are added. A log that has been changed since,
by `inspect score` say, is not overwritten.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptst.api.names import hosted_model
from ptst.defense_names import NONE, WEIGHT_SPACE, asked_under
from ptst.errors import Setting, UserError
from ptst.evaluation.inspect_scores import sample_scores, task_scores
from ptst.evaluation.long_table import Line, file_lines, long_lines
from ptst.evaluation.stored_answers import BASE, VERDICTS, AnswerSet
from ptst.evaluation.stored_verdicts import stored_judges
from ptst.packages import check_package
from ptst.records import FILE, read_json
from ptst.storage import refuse_link

if TYPE_CHECKING:
    from inspect_ai.log import EvalLog, EvalSample, EvalSpec
    from inspect_ai.model import ChatMessage

FOLDER = "inspect"
# What tells the logs of a folder apart.
_CELL: tuple[str, ...] = ("kind", "model", "run", "adapter", "train_template", "train_seed", "defense", "epochs")
_CELL += ("test_template", "task")
_ABOUT_SAMPLE: tuple[str, ...] = (
    "prompt_index",
    "prompt_id",
    "category",
    "family",
    "request",
    "decode_seed",
    "finish_reason",
)
_ABOUT_SAMPLE += ("finish_reason", "num_tokens", "truncated")
_FINGERPRINTS = ("weights", "run_weights", "adapter_weights", "tokenizer", "dtype")


def check_inspect() -> None:
    """Raise UserError where inspect_ai is not installed."""
    check_package("inspect_ai", (Setting("inspect_log"), " needs"), "inspect")


def write_inspect_logs(folder: Path, verdicts: Path | None = None) -> list[Path]:
    """Write the logs of a finished evaluation's or grid's folder, with the verdicts of all judges so far; returns them.
    `verdicts`: the verdicts' folder, which then gets the logs, where that is another than the folder's own.

    Raises UserError where inspect_ai is missing, for files that are not as they were written, and for a log that
    somebody else has changed."""
    check_inspect()
    verdicts = verdicts or folder / VERDICTS
    table = folder if verdicts == folder / VERDICTS else verdicts
    record = read_json(folder / FILE)
    if record.get("status") != "finished":
        raise UserError(f"{folder} has not finished", "the same command goes on from there")
    results = read_json(folder / "results.json") if (folder / "results.json").exists() else {}
    judges = stored_judges(verdicts)
    if isinstance(first := results.get("judge"), dict) and "name" in first:
        judges = {first["name"]: first} | judges
    lines = long_lines(folder, verdicts, table)
    return _write(table / FOLDER, (_log(cell, each, record, judges, table) for cell, each in _cells(lines)))


def write_judged_logs(found: AnswerSet, verdicts: Path) -> list[Path]:
    """The same after judging; of answers from a file, into the folder of the verdicts."""
    if found.source.is_dir():
        return write_inspect_logs(found.source, verdicts)
    check_inspect()
    record = {"finished_at": found.source.stat().st_mtime}
    lines = sorted(file_lines(found, verdicts), key=lambda line: [str(line.get(name)) for name in _CELL])
    judges = stored_judges(verdicts)
    return _write(verdicts / FOLDER, (_log(cell, each, record, judges, verdicts) for cell, each in _cells(lines)))


def _cells(lines: Iterable[Line]) -> Iterator[tuple[Line, list[Line]]]:
    for _, group in groupby(lines, lambda line: [line.get(name) for name in _CELL]):
        each = list(group)
        yield each[0], each


def _write(out: Path, logs: Iterable["EvalLog"]) -> list[Path]:
    from inspect_ai.log import write_eval_log

    out.mkdir(parents=True, exist_ok=True)
    refuse_link(out)
    written = []
    for log in logs:
        stamp = datetime.fromisoformat(log.eval.created).strftime("%Y-%m-%dT%H-%M-%S+00-00")
        task = "".join(c if c.isalnum() or c in ".-" else "-" for c in log.eval.task)
        path = out / f"{stamp}_{task}_{log.eval.task_id}.eval"  # as inspect_ai itself names them
        if path.exists():
            _check_own(path, log)
        new = path.with_name(f".{path.stem}.part.eval")
        write_eval_log(log, str(new), format="eval")
        os.replace(new, path)
        written.append(path)
    return written


def _check_own(path: Path, log: "EvalLog") -> None:
    """Raise UserError for a log with scores or edits that are not ours."""
    from inspect_ai.log import read_eval_log

    found = read_eval_log(str(path), header_only=True)
    own = {score.name for score in log.results.scores} if log.results else set()
    foreign = {score.name for score in found.results.scores} - own if found.results else set()
    if foreign or found.log_updates or found.invalidated:
        what = f"scores of {min(foreign)}" if foreign else "edits"
        raise UserError(f"holds {what} that writing it anew would lose", "move the file away", path)


def _log(
    cell: Line, lines: Sequence[Line], record: Mapping[str, Any], judges: Mapping[str, Any], table: Path
) -> "EvalLog":
    """The log of a cell."""
    from inspect_ai.log import EvalLog, EvalPlan, EvalPlanStep, EvalResults, EvalStats

    spec = _spec(cell, lines, record, table)
    samples = _samples(lines, spec.model, spec.eval_id)
    spec.dataset.sample_ids = [sample.id for sample in samples if sample.epoch == 1]
    spec.dataset.samples = len(spec.dataset.sample_ids)
    scores = task_scores(spec.task, lines, judges)
    return EvalLog(
        status="success",
        eval=spec,
        plan=EvalPlan(name="ptst", steps=[EvalPlanStep(solver="ptst/answer")], config=spec.model_generate_config),
        results=EvalResults(total_samples=len(samples), completed_samples=len(samples), scores=scores),
        stats=EvalStats(completed_at=spec.created),
        samples=samples,
    )


def _spec(cell: Line, lines: Sequence[Line], record: Mapping[str, Any], table: Path) -> "EvalSpec":
    """What was measured, and how."""
    from inspect_ai.log import EvalConfig, EvalDataset, EvalSpec
    from inspect_ai.model import GenerateConfig

    settings = record.get("settings") or {}
    settings = settings.get("eval") or settings if cell["kind"] == "grid" else settings
    model, arguments = _model(cell, record, settings, table)
    when = datetime.fromtimestamp(record.get("finished_at") or 0, UTC).isoformat()
    # A log that is written anew keeps its names, also where the folder has been moved.
    named = [name for name in _CELL[1:] if name != "run" and (name != "defense" or cell.get(name) not in (None, NONE))]
    mark = _digest(when, *[cell.get(name) for name in named])
    drawn = {name: settings.get(name) for name in ("temperature", "top_p", "seed")}
    config = GenerateConfig(max_tokens=settings.get("max_new_tokens"), top_k=settings.get("top_k") or None, **drawn)
    return EvalSpec(
        created=when,
        eval_id=mark,
        run_id=_digest(when),
        task=cell.get("task") or "answers",
        task_id=mark,
        dataset=EvalDataset(name=cell.get("data")),
        model=model,
        model_args=arguments,
        model_base_url=record.get("endpoint"),
        model_generate_config=config,
        config=EvalConfig(limit=settings.get("limit"), epochs=max(1, len(_seeds(lines)))),
        packages={"ptst-lab": ((record.get("environment") or {}).get("versions") or {}).get("ptst", "")},
        metadata=_metadata(cell, record),
    )


def _seeds(lines: Sequence[Line]) -> list[int]:
    """The decoding seeds, in order."""
    return sorted({line["decode_seed"] for line in lines if line.get("decode_seed") is not None})


def _model(
    cell: Line, record: Mapping[str, Any], settings: Mapping[str, Any], table: Path
) -> tuple[str, dict[str, Any]]:
    """The model as inspect_ai names it, so that it answers again where the folders are still there."""
    if cell["kind"] == "judge":  # anybody's answers
        return f"none/{cell.get('model') or 'unknown'}", {}
    if cell.get("defense") in WEIGHT_SPACE:  # its weights are in no folder
        return f"none/{cell.get('model')}", {}
    base = str(record.get("model") or cell.get("base_model"))
    if record.get("endpoint"):
        run = table / cell["run"] / FILE if cell.get("run") else None
        tuned = read_json(run).get("tuned_model") if run is not None and run.exists() else None
        return f"openai/{tuned or hosted_model(base)}", {}
    given: dict[str, Any] = {"lazy": True}
    given |= {key: settings[key] for key in ("chat_format", "dtype") if settings.get(key)}
    if cell.get("model") != BASE and record.get("adapter"):
        given["adapter"] = record["adapter"]
    family = cell.get("template_family")
    given |= {"template_family": family} if family else {}
    place = (table / cell["run"]).resolve() if cell.get("run") else base
    return f"ptst/{place}@{_asked(cell)}", given


def _asked(cell: Line) -> str:
    """The name of the template in whose words a cell is asked."""
    return asked_under(str(cell.get("test_template")), str(cell.get("defense")))


def _metadata(cell: Line, record: Mapping[str, Any]) -> dict[str, Any]:
    """What the answers depend on: templates with their words, prompt format, run and fingerprints."""
    found = {key: value for key, value in cell.items() if key in (*_CELL, "base_model", "step", "data", "chat_format")}
    words = record.get("template") or (record.get("templates") or {}).get(_asked(cell))
    found |= {"template_family": cell.get("template_family"), "template": words}
    found |= {key: record[key] for key in _FINGERPRINTS if record.get(key) is not None}
    data = (record.get("data") or {}).get(cell.get("task"))
    found |= {"data_fingerprint": data["fingerprint"]} if isinstance(data, dict) and "fingerprint" in data else {}
    return {**{k: v for k, v in found.items() if v is not None}, "environment": record.get("environment")}


def _samples(lines: Sequence[Line], model: str, mark: str) -> list["EvalSample"]:
    """One for each prompt and decoding seed, which is an epoch."""
    seeds = _seeds(lines)
    names: dict[int, str] = {}
    for line in lines:
        names.setdefault(line["prompt_index"], str(line.get("prompt_id") or line["prompt_index"]))
    twice = {name for name in names.values() if list(names.values()).count(name) > 1}
    found = []
    for (seed, index), group in groupby(lines, lambda line: (line.get("decode_seed"), line["prompt_index"])):
        name = f"{names[index]}#{index}" if names[index] in twice else names[index]
        sample = _sample(name, 1 + seeds.index(seed) if seed is not None else 1, list(group), model)
        sample.uuid = _digest(mark, name, sample.epoch)
        found.append(sample)
    return sorted(found, key=lambda sample: sample.epoch)


def _sample(name: str, epoch: int, lines: Sequence[Line], model: str) -> "EvalSample":
    from inspect_ai.log import EvalSample
    from inspect_ai.model import ChatMessageAssistant, ModelOutput

    line = lines[0]
    asked = _messages(line)
    output, messages = ModelOutput(model=model), list(asked)
    if line.get("answer") is not None:
        cut = line.get("finish_reason") == "length"
        output = ModelOutput.from_content(model, line["answer"], "max_tokens" if cut else "stop")
        messages.append(ChatMessageAssistant(content=line["answer"], model=model, source="generate"))
    metadata = {key: line[key] for key in _ABOUT_SAMPLE if line.get(key) is not None}
    metadata |= json.loads(line["other"]) if line.get("other") else {}
    return EvalSample(
        id=name,
        epoch=epoch,
        input=asked or str(line.get("prompt") or name),
        target=str(line.get("reference") or ""),
        messages=messages,
        output=output,
        scores=sample_scores(lines),
        metadata=metadata,
    )


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:22]


def _messages(line: Line) -> list["ChatMessage"]:
    """The conversation up to the answer, without the template's words."""
    from inspect_ai.model import ChatMessageAssistant, ChatMessageSystem, ChatMessageUser

    kinds = {"system": ChatMessageSystem, "user": ChatMessageUser, "assistant": ChatMessageAssistant}
    messages = line.get("messages") or []
    if not messages and line.get("prompt") is not None:
        messages = [{"role": "user", "content": line["prompt"]}]
    return [kinds[m["role"]](content=m["content"]) for m in messages]
