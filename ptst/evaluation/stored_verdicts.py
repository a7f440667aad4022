"""Verdicts on stored answers, kept as they come: nothing that was judged is lost, nothing is judged twice.

    FOLDER/<judge>/judge.json      the judge: name, version, definition of success, prompt and model
    FOLDER/<judge>/<answers>.jsonl a line for each verdict, by a digest of request and answer

An answer whose text changes after it was judged is noticed by its name; verdicts of another version of a judge are
never mixed with those of this one.
"""

import json
import os
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ptst.errors import Setting, UserError
from ptst.evaluation.answers import cut_torn_line
from ptst.evaluation.judges import judge_each, none_judged
from ptst.evaluation.stored_answers import AnswerSet, StoredAnswer, read_verdict
from ptst.evaluation.verdicts import UNJUDGED, Judge, Verdict, judge_name_in_files
from ptst.reading import parse_json
from ptst.records import read_json
from ptst.storage import exclusive_lock, refuse_link, write_json

RECORD = "judge.json"
_FIRST, _MOST = 16, 1024  # answers that are judged at once
_SECONDS = 5.0  # that a kill may cost, about


class VerdictFile:
    """The verdicts of a judge on the answers of one file. Raises UserError for a line that is no verdict; an incomplete
    last one is left out."""

    def __init__(self, path: Path):
        self.path = path
        self.known: dict[str, Verdict] = {}  # by digest
        self._digests: dict[str, str] = {}  # by identity
        if not path.exists():
            return
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
            where = f"{path}:{number}"
            try:
                row = parse_json(line.decode())
                identity, digest = row["identity"], row["digest"]
                self._digests[identity] = digest
            except (ValueError, KeyError, TypeError):
                raise UserError("is not a verdict", "delete the line to judge the answer again", where) from None
            self.known[digest] = read_verdict(row, where)

    def check(self, answers: Sequence[StoredAnswer]) -> None:
        """Raise UserError for an answer that has changed since it was judged."""
        for answer in answers:
            if answer.identity and self._digests.get(answer.identity, answer.digest) != answer.digest:
                name = answer.file.removesuffix(".jsonl")
                cause = f"the answer to {answer.id} in {name} has changed since it was judged"
                raise UserError(cause, f"put it back, or remove {self.path} to judge its answers anew")

    def add(self, judged: Sequence[tuple[StoredAnswer, Verdict]]) -> None:
        """Keep verdicts; they are on the disk when this returns."""
        lines = [json.dumps(_row(*pair), ensure_ascii=False) + "\n" for pair in judged]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        refuse_link(self.path.parent)
        refuse_link(self.path)
        with open(self.path, "ab") as file:
            file.write("".join(lines).encode(errors="backslashreplace"))
            file.flush()
            os.fsync(file.fileno())


def _row(answer: StoredAnswer, verdict: Verdict) -> dict[str, Any]:
    row = {"identity": answer.identity, "id": answer.id, "digest": answer.digest}
    told = {"class": verdict.label or UNJUDGED, "reason": verdict.reason}
    return row | told | {"success": verdict.success, "score": verdict.score}


class Store:
    """All verdicts of one judge, by digest. `own`: with those of the judge of this name that came with the answers."""

    def __init__(self, folder: Path, answers: Sequence[StoredAnswer], own: str = ""):
        self.folder = folder
        self.files = {name: VerdictFile(folder / name) for name in dict.fromkeys(a.file for a in answers)}
        came = ((a.digest, a.own) for a in answers if own and a.own_judge == own)
        self.known = {digest: verdict for digest, verdict in came if verdict is not None and verdict.judged}
        for name, file in self.files.items():
            file.check([a for a in answers if a.file == name])
            self.known |= file.known

    def add(self, judged: Sequence[tuple[StoredAnswer, Verdict]]) -> None:
        """Keep verdicts, each in the file of its answer."""
        for name in dict.fromkeys(a.file for a, _ in judged):
            self.files[name].add([pair for pair in judged if pair[0].file == name])
        self.known |= {a.digest: verdict for a, verdict in judged}


def stored_judges(verdicts: Path) -> dict[str, dict[str, Any]]:
    """The records of the judges whose verdicts are in a folder, by name."""
    records = [read_json(path) for path in sorted(verdicts.glob(f"*/{RECORD}"))]
    return {str(record["name"]): record for record in records}


def store_folder(verdicts: Path, judge: str) -> Path:
    return verdicts / judge_name_in_files(judge)


@contextmanager
def opened(verdicts: Path, record: Mapping[str, Any]) -> Iterator[Path]:
    """The folder of the verdicts of the judge with this record, held by this process. Raises UserError where another
    process holds it, where its verdicts are those of another version of the judge, and for a symbolic link."""
    folder = store_folder(verdicts, record["name"])
    refuse_link(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(folder):
        path = folder / RECORD
        was = read_json(path) if path.exists() else None
        if was is not None and was != record:
            raise UserError(
                f"holds verdicts of another version of judge {record['name']}: {record_change(was, record)}",
                ("move the folder away to judge all answers anew, or choose another ", Setting("out")),
                folder,
            )
        if was is None:
            write_json(path, record)
        yield folder


def keep_own(found: AnswerSet, files: Container[str]) -> None:
    """Keep the verdicts that came with the answers in these files, which are about to be judged by another judge.
    Raises UserError as `opened`."""
    for name, record in found.judges.items():
        own = [a for a in found.answers if a.own_judge == name and a.own is not None and a.file in files]
        if own:
            with opened(found.verdicts, record) as folder:
                store = Store(folder, own)
                store.add([(a, a.own) for a in own if a.own is not None and a.digest not in store.known])


def record_change(was: Any, now: Mapping[str, Any]) -> str:
    """In what a judge's record differs from another, in words."""
    was = was if isinstance(was, Mapping) else {}
    changed = [key for key in {**now, **was} if was.get(key) != now.get(key)]
    return "; ".join(f"{key} was {str(was.get(key))[:60]}, now {str(now.get(key))[:60]}" for key in changed)


def judge_stored(
    judge: Judge, answers: Sequence[StoredAnswer], store: Store, on_progress: Callable[[int], None] = lambda _done: None
) -> None:
    """Judge what is not judged yet, a chunk at a time, each as large as a few seconds allow. Answers that are the same
    are judged once; unjudged ones are tried again. Raises UserError where the judge judges none of all answers."""
    for file in store.files.values():
        if file.path.exists():
            cut_torn_line(file.path)
    alike: dict[str, list[StoredAnswer]] = {}
    for answer in answers:
        alike.setdefault(answer.digest, []).append(answer)
    left = [same for digest, same in alike.items() if (v := store.known.get(digest)) is None or not v.judged]
    if keep_in := getattr(judge, "keep_in", None):
        keep_in(store.folder)
    done, size = len(alike) - len(left), _FIRST
    on_progress(done)
    while left:
        chunk, left = left[:size], left[size:]
        began = time.monotonic()
        verdicts = judge_each(judge, [(same[0].request, same[0].answer) for same in chunk])
        judged = ((a, v) for same, v in zip(chunk, verdicts, strict=True) for a in same)
        store.add([(a, v) for a, v in judged if v != store.known.get(a.digest)])
        on_progress(done := done + len(chunk))
        seconds = time.monotonic() - began
        if seconds < _SECONDS / 2:
            size = min(2 * size, _MOST)
        elif seconds > _SECONDS:
            size = max(size // 2, _FIRST)
    if alike and all(store.known[digest].failed for digest in alike):
        raise none_judged(judge.name, len(alike), store.known[answers[0].digest].reason)
