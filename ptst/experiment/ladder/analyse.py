"""From folders or a file of outcomes to tables and figure; and pages whose tables are computed anew."""

from pathlib import Path
from typing import Any

from ptst.errors import UserError
from ptst.experiment.ladder import blocks, report
from ptst.experiment.ladder.analysis import Study
from ptst.experiment.ladder.gather import Part, gather, parts_of
from ptst.experiment.ladder.outcomes import Outcomes
from ptst.experiment.ladder.study_config import StudyConfig
from ptst.records import FILE, read_json, record_kind, without_folders
from ptst.storage import write_atomically

STUDY = "study.json"  # in the folder of a study: what its parts are


def analyse(config: StudyConfig) -> dict[str, Any]:
    """What `--json` prints, with the tables in Markdown as `markdown`. Raises UserError for a user's mistakes."""
    config.check()
    if config.docs is not None:
        return {"changed": [str(path) for path in write_docs(config.docs)]}
    outcomes, folder = read_source(config.source)
    out = config.out or folder
    markdown, contrasts = report.write(outcomes, out, config.judge)
    return {"out": str(out), "contrasts": contrasts, "markdown": markdown}


def read_source(source: tuple[Path, ...]) -> tuple[Outcomes, Path]:
    """The outcomes, and the folder where what is computed from them goes."""
    first = source[0]
    if first.is_file():
        if len(source) > 1:
            raise UserError("there are several files", "give one file of outcomes, or folders of grids")
        return Outcomes.read(first), first.parent
    if (first / STUDY).exists():
        if len(source) > 1:
            raise UserError(f"{first} is a study, which is not mixed with other folders", "give it alone")
        return gather(study_parts(first), _about(first)), first
    inside = [] if (first / FILE).exists() else sorted(path.parent for path in first.glob(f"*/{FILE}"))
    if grids := [folder.name for folder in inside if record_kind(folder) == "grid"]:
        remedy = f"finish it with the command that began it, or give its grids: {', '.join(grids)}"
        raise UserError("is a study that is not finished, or holds several grids", remedy, first)
    return gather(parts_of(source), _about(first)), first


def study_parts(folder: Path) -> list[Part]:
    """The parts of a study's folder. Raises UserError where the file that names them is damaged."""
    path = folder / STUDY
    try:
        parts = read_json(path)["parts"]
        return [Part(folder / name, alignment, data, tuple(seeds)) for name, alignment, data, seeds in parts]
    except (TypeError, KeyError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            "does not name the parts of a study", "start the study again: it is written anew", path
        ) from None


def _about(folder: Path) -> dict[str, Any]:
    """Of an existing file of outcomes what it says of itself, of a grid its judge."""
    path = folder / report.OUTCOMES
    if path.exists():
        return dict(without_folders(Outcomes.read(path).about))
    record = read_json(folder / FILE) if (folder / FILE).exists() else {}
    settings = record.get("settings") or {}
    about = {"judge": (settings.get("eval") or {}).get("judge", "rules-v3")}
    return about | ({"model": Path(record["model"]).name} if record.get("model") else {})


def write_docs(docs: Path) -> list[Path]:
    """Write the marked tables of all pages, and the figures of all outcomes, anew; returns what changed."""
    changed = blocks.write_pages(docs)
    for path, picture in figures(docs).items():
        if not path.exists() or path.read_text(encoding="utf-8") != picture:
            write_atomically(path, picture.encode())
            changed.append(path)
    return changed


def figures(docs: Path) -> dict[Path, str]:
    """The figure of every file of outcomes with a ladder, by its path."""
    found = {}
    for path in sorted((docs / blocks.FOLDER).glob("*.json")):
        picture = report.drawn(Study.of(Outcomes.read(path)))
        if picture is not None:
            found[path.with_suffix(".svg")] = picture
    return found
