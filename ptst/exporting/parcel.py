"""What of a run, or of an exported folder, may be given away: an allow-list of files, each checked.

Answers stay: those of evaluations and of judges, samples of training, logs and tables of answers are on no list, and a
non-refusing answer to a request that is found in any file stops the upload. So does a key of this environment, or a
path of this machine. Of a run's record only what others need is written, with names of files instead of paths.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptst.errors import Setting, UserError
from ptst.evaluation.evaluate import EvalRecord
from ptst.evaluation.stored_answers import read_folder
from ptst.evaluation.verdicts import AnswerClass
from ptst.exporting.base_name import find_base_name
from ptst.exporting.card import README, run_card
from ptst.exporting.data_names import data_name
from ptst.fingerprints import Fingerprint, weights_fingerprint
from ptst.hub.push import Upload
from ptst.model.adapter_files import CONFIG as ADAPTER_CONFIG
from ptst.model.adapter_files import read_lora_config
from ptst.open import find_run, run_folder
from ptst.reading import check_header, check_regular, parse_json
from ptst.records import EXPORT, FILE, HOSTED_TRAIN, bare, find_record, read_json, record_kind
from ptst.weight_files import ADAPTER, INDEX, find_weight_files

RESULTS = "results.json"
_VOCABULARY = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")  # may hold any text
_MODEL = {"config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"}
_MODEL |= {"added_tokens.json", "chat_template.jinja", INDEX, *_VOCABULARY}
_TERMS = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md")
_WEIGHTS = re.compile(r"(model|model-\d{5}-of-\d{5}|adapter_model)\.safetensors")
_TEMPLATES = "additional_chat_templates"
_RECORD = {"version", "kind", "status", "finished_at", "steps", "weights", "tokenizer", "template", "family"}
_RECORD |= {"chat_format", "data", "mix", "validation", "dtype", "full", "micro_batch_tokens", "recipe", "trained"}
_RECORD |= {"account", "validation_loss", "model", "settings", "environment", "time"}
_KEYS = re.compile(r"(?i)(_key|token|secret|password)$")
_KEY_FORMS = re.compile(r"\b(sk-[\w-]{20,}|hf_[A-Za-z0-9]{20,})")
_SHORTEST = 24  # characters of an answer or a key that can be told from ordinary text


@dataclass(frozen=True)
class Parcel:
    """`kind`: adapter, model or export. `left`: names of what stays."""

    name: str
    kind: str
    uploads: tuple[Upload, ...]
    left: tuple[str, ...]


def pack(folder: Path, base_name: str | None = None, license: str | None = None) -> Parcel:
    """What goes up of the folder of a finished run, or of an export; nothing is written. Raises UserError for any other
    folder, for an adapter whose base has no name on the hub, and for a file that holds what must stay."""
    if (folder / EXPORT).is_file():
        parcel, planted, paths = _of_export(folder, base_name, license), list[str](), list[str]()
    else:
        kind = record_kind(folder)
        if kind == HOSTED_TRAIN:
            raise UserError("was trained at an endpoint, which keeps the weights", "there is nothing to upload", folder)
        parcel, paths = _of_run(folder, base_name, license)
        planted = [*_answers(run_folder(folder))]
    check = _Check([str(folder.resolve()), *paths], planted)
    for upload in parcel.uploads:
        check(upload)
    return parcel


def _of_export(folder: Path, base_name: str | None, license: str | None) -> Parcel:
    for setting, value in (("base_name", base_name), ("license", license)):
        if value is not None:
            cause = (Setting(setting), f" has no effect: {folder} has its card already")
            raise UserError(cause, ("give it to ptst export, or edit README.md in the folder"))
    files = [path for path in _model_files(folder) if path.name not in (FILE, RESULTS)]
    for name in (README, EXPORT):
        files += [folder / name] if (folder / name).is_file() else []
    if not any(_WEIGHTS.fullmatch(path.name) or path.name == "chat_template.jinja" for path in files):
        raise UserError("has no weights and no chat template", "export it again", folder)
    uploads = tuple(Upload(str(path.relative_to(folder)), path) for path in sorted(files))
    return Parcel(folder.resolve().name, "export", uploads, _left(folder, uploads))


def _of_run(folder: Path, base_name: str | None, license: str | None) -> tuple[Parcel, list[str]]:
    """A run's files, and the paths that its record names."""
    checkpoint, run = find_run(folder, None)
    assert checkpoint is not None and run is not None
    if run_folder(checkpoint) != checkpoint:
        remedy = f"export it, and push what is written: ptst export --checkpoint {folder} --out DIR"
        raise UserError("is a step to resume from, in no layout that others read", remedy, folder)
    base = find_base_name(run.model, Path(run.model_folder), base_name)
    uploads = [_text(README, run_card(checkpoint, base_name, license)), _json(FILE, _record(checkpoint))]
    if results := [*_results(checkpoint)]:
        uploads.append(_json(RESULTS, {"evaluations": results}))
    if run.full:
        files = [path for path in _model_files(checkpoint) if path.name not in ADAPTER]
        uploads += [_model_file(checkpoint, path) for path in files]
    else:
        read_lora_config(checkpoint)  # or it says what is wrong
        named = base.in_adapter_config()
        uploads.append(_json(ADAPTER_CONFIG, {**read_json(checkpoint / ADAPTER_CONFIG), **named}))
        own = [path for path in _model_files(checkpoint) if path.name in (ADAPTER[0], "chat_template.jinja")]
        uploads += [Upload(path.name, path) for path in own]
    if not any(_WEIGHTS.fullmatch(upload.path) for upload in uploads):
        raise UserError("has no weights", "put back the files that were taken away, or train again", folder)
    uploads.sort(key=lambda upload: upload.path)
    kind = "model" if run.full else "adapter"
    raw = read_json(checkpoint / FILE)
    parcel = Parcel(checkpoint.resolve().name, kind, tuple(uploads), _left(checkpoint, uploads))
    return parcel, [*_paths(raw)]


def _model_file(folder: Path, path: Path) -> Upload:
    """A file of fully fine-tuned weights; config.json without the name of a folder."""
    name = str(path.relative_to(folder))
    if name != "config.json":
        return Upload(name, path)
    values = read_json(path)
    own = str(values.get("_name_or_path", ""))
    return _json(name, {k: v for k, v in values.items() if k != "_name_or_path" or bare(own) == own})


def _model_files(folder: Path) -> Iterator[Path]:
    """The files of a model or an adapter that are on the list. Raises UserError for a link or a device among them, and
    for weights that are not whole."""
    weights = {*find_weight_files(folder), folder / ADAPTER[0]}
    for path in sorted([*folder.iterdir(), *folder.glob(f"{_TEMPLATES}/*.jinja")]):
        listed = path.name in {*_MODEL, *_TERMS, ADAPTER_CONFIG} or path in weights
        if listed or path.parent.name == _TEMPLATES:
            if path.is_symlink():
                raise UserError(f"{path} is a symbolic link", "put the file itself there")
            check_regular(path)
            yield path


def _left(folder: Path, uploads: Iterable[Upload]) -> tuple[str, ...]:
    """What is in the folder and stays."""
    sent = {upload.path.partition("/")[0] for upload in uploads}
    return tuple(sorted(path.name for path in folder.iterdir() if path.name not in sent and path.name[0] != "."))


def _record(folder: Path) -> dict[str, Any]:
    """run.json without paths; of data, no text."""
    raw = read_json(folder / FILE)
    kept = {key: value for key, value in raw.items() if key in _RECORD}
    words = {key: kept[key] for key in ("template", "family") if key in kept}
    sources = [kept.get("data"), *(kept.get("mix") or ()), kept.get("validation")]
    for source in sources:
        if isinstance(source, dict):
            source.pop("first_lossy", None)
    for name in ("out", "resume"):
        (kept.get("settings") or {}).pop(name, None)
    nameless = _nameless(kept)
    for shown, source in zip(nameless.get("mix") or (), kept.get("mix") or (), strict=True):
        if isinstance(source, dict) and source.get("template") is not None:
            shown["template"] = source["template"]
    return {**nameless, **words}


def _results(checkpoint: Path) -> Iterator[dict[str, Any]]:
    """The figures of the evaluations of just these weights: numbers, and by what they were made."""
    weights: Fingerprint = weights_fingerprint(checkpoint)
    for path in sorted((run_folder(checkpoint) / "eval").glob(f"*/{FILE}")):
        try:
            record = find_record(path.parent, EvalRecord)
            if record is None or record.status != "finished" or not weights.matches(record.run_weights):
                continue
            values = read_json(path.parent / RESULTS)
        except UserError:  # damaged: the card's maker says so, and leaves it out as well
            continue
        if not isinstance(values, Mapping):
            continue
        kept = {key: values.get(key) for key in ("train_template", "test_template", "ptst", "step")}
        data = {key: data_name(found.name) for key, found in record.data.items()}
        found = {**kept, "template_family": record.family.name, "chat_format": record.chat_format, "data": data}
        names = ("limit", "temperature", "top_p", "top_k", "seed", "decode_seeds")
        found |= {"judge": _nameless(values.get("judge")), "sampling": {k: record.settings.get(k) for k in names}}
        yield {**found, "results": _figures(values.get("results"))}


def _figures(value: Any) -> Any:
    """The numbers of a result, and the names that they have."""
    if isinstance(value, Mapping):
        return {key: _figures(v) for key, v in value.items() if not isinstance(v, str)}
    if isinstance(value, list):
        return [_figures(v) for v in value if not isinstance(v, str)]
    return value if value is None or isinstance(value, (int, float)) else None


def _nameless(value: Any) -> Any:
    """A value of JSON with names of files instead of paths."""
    if isinstance(value, Mapping):
        return {key: _nameless(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_nameless(v) for v in value]
    if isinstance(value, str):
        return re.sub(r"(?<![\w./:-])(?:/[^\s/,:;'\"()]+){2,}", lambda path: Path(path[0]).name, data_name(bare(value)))
    return value


def _paths(record: Mapping[str, Any]) -> Iterator[str]:
    """The paths that a record names, and the folders that they are in."""
    for text in _strings(record):
        parts = re.split("[,:]", text)
        named = not re.search(r"\s", text) and any(part.startswith("/") for part in parts)  # NAME:FILE, DATA:1:FILE
        for path in parts if text.startswith("/") or named else ():
            yield from (path, str(Path(path).parent))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for each in value.values():
            yield from _strings(each)
    elif isinstance(value, list):
        for each in value:
            yield from _strings(each)
    elif isinstance(value, str):
        yield value


def _answers(run: Path) -> Iterator[str]:
    """All answers to requests that were measured in a run's folder and are no refusals by the judge of then."""
    for folder in sorted(path for path in (run / "eval").glob("*") if path.is_dir()):
        try:
            found = read_folder(folder).answers
        except UserError:  # no such tasks, or damaged
            yield from _answers_of_any(folder)
        else:
            yield from (a.answer.text for a in found if a.own is None or a.own.label != AnswerClass.REFUSAL)


def _answers_of_any(folder: Path) -> Iterator[str]:
    """The same of a folder that is not as it was written, as far as its lines can be read."""
    for path in sorted(folder.rglob("*.jsonl")):
        for line in path.read_bytes().splitlines():
            try:
                row = parse_json(line.decode())
            except ValueError:
                continue
            if not isinstance(row, dict) or row.get("class") == AnswerClass.REFUSAL:
                continue
            if row.get("request") or "class" in row:
                yield from (text for key in ("text", "answer") if isinstance(text := row.get(key), str))


class _Check:
    """Raises UserError for an upload that holds what must stay."""

    def __init__(self, folders: Iterable[str], answers: Iterable[str]):
        from huggingface_hub import get_token

        home, here = str(Path.home()), str(Path.cwd())
        named = dict.fromkeys((*folders, here))  # of a short one, such as /data, others may speak as well
        self.folders = [path for path in named if path.startswith("/") and path.count("/") > 1] + [home] * (home != "/")
        self.answers = [form for text in answers if len(text.strip()) >= _SHORTEST for form in _forms(text.strip())]
        known = [*(v for k, v in os.environ.items() if _KEYS.search(k)), get_token() or ""]
        self.keys = [value for value in known if len(value) >= 8 and not value.startswith("/")]

    def __call__(self, upload: Upload) -> None:
        text = self._text(upload)
        if any(key in text for key in self.keys) or _KEY_FORMS.search(text):
            self._refuse(upload, "holds what looks like a key")
        if any(answer in text for answer in self.answers):
            self._refuse(upload, "holds an answer to a request that is no refusal")
        if Path(upload.path).name in _VOCABULARY:
            return
        for folder in self.folders:
            if re.search(rf"(?<![\w./-]){re.escape(folder)}(?![\w.-])", text):
                self._refuse(upload, "holds a path of this machine")

    def _text(self, upload: Upload) -> str:
        """All text of a file; of weights the description in their header."""
        if isinstance(upload.content, bytes):
            return upload.content.decode("utf-8", "replace")
        if not upload.path.endswith(".safetensors"):
            return upload.content.read_bytes().decode("utf-8", "replace")
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(upload.content, "pt") as file:
                check_header(upload.content)
                return json.dumps([file.metadata(), [*file.keys()]])
        except (SafetensorError, OSError) as error:
            raise UserError(f"is no file of weights ({error})", "make it again", upload.content) from None

    def _refuse(self, upload: Upload, what: str) -> None:
        remedy = f"take it out of {'the file' if isinstance(upload.content, Path) else 'what the run was made of'}"
        raise UserError(f"{upload.path} {what}, so nothing is uploaded", remedy)


def _forms(text: str) -> set[str]:
    """A text as it is, and as JSON has it, with all characters or ASCII alone."""
    return {text, *(json.dumps(text, ensure_ascii=ascii)[1:-1] for ascii in (False, True))}


def _text(name: str, text: str) -> Upload:
    return Upload(name, text.encode(errors="backslashreplace"))


def _json(name: str, value: Any) -> Upload:
    return _text(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
