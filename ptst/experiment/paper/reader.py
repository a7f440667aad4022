"""Reading the paper's figures from JSON. Whatever is not exactly of the form is refused, with its key."""

import math
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from ptst.errors import UserError
from ptst.experiment.paper.cells import METRICS, SAFETY_DATA, Curve, CurvePoint, FigurePoint, Paper, PaperCell
from ptst.reading import parse_json, read_text
from ptst.text.templates import TEMPLATES

_FILE = resources.files("ptst.experiment.paper").joinpath("tables.json")


@cache
def load_paper() -> Paper:
    """The paper's figures, as this package has them."""
    return parse_paper(parse_json(_FILE.read_text(encoding="utf-8")), str(_FILE))


def read_paper(path: Path) -> Paper:
    """The figures in a file of the same form. Raises UserError, with file and key, for one that is not of it."""
    try:
        raw = parse_json(read_text(path))
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", "check the path", path) from None
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"is not valid JSON ({error})", where=path) from None
    return parse_paper(raw, str(path))


def parse_paper(raw: Any, where: str) -> Paper:
    """The figures of a JSON value. Raises UserError, with the key, for a missing or unknown key, a value of another
    type or out of range, an unknown template, a cell that is there twice, and a flag without a cell."""
    top = _Object(raw, where)
    about = _Object(top.get("paper", dict, "an object"), f"{where}: paper")
    source = {key: about.text(key) for key in ("title", "authors", "venue", "arxiv")}
    about.end()
    left_out: dict[int, str] = {}
    for line in top.each("left_out"):
        left_out[line.whole("table")] = line.text("reason")
        line.end()
    reasons: dict[tuple[Any, ...], str] = {}
    for line in top.each("inconsistent"):
        place = line.text("block"), line.template("train", True), line.text("mixed", ""), line.template("test")
        reasons[place] = line.text("reason")
        line.end()
    cells, notes = list[PaperCell](), dict[str, str]()
    for block in top.each("blocks"):
        cells += _block(block, reasons)
        if note := block.text("note", ""):
            notes[block.text("id")] = note
        block.end()
    places = [cell.place for cell in cells]
    if twice := next((place for place in places if places.count(place) > 1), None):
        raise UserError(f"has the cell {twice} twice", where=where)
    if lost := reasons.keys() - set(places):
        raise UserError(f"flags a cell that is not there: {lost.pop()}", where=f"{where}: inconsistent")
    curves, points = tuple(map(_curve, top.each("curves"))), tuple(map(_point, top.each("points")))
    top.end()
    return Paper(source, tuple(cells), curves, points, left_out, notes)


def _block(block: "_Object", reasons: Mapping[tuple[Any, ...], str]) -> Iterator[PaperCell]:
    name, metric, unit = block.text("id"), block.text("metric"), block.text("unit")
    if METRICS.get(metric) != unit:
        raise UserError(f"metric {metric} in {unit} is not one of {METRICS}", where=block.where)
    table, seeds, prompts = block.whole("table"), block.whole("seeds"), block.whole("prompts")
    shared: dict[str, Any] = {"model": block.text("model"), "data": block.text("data"), "set": block.text("set")}
    over = block.text("sd", "")
    if over not in ("", "training", "decoding"):
        raise UserError(f"sd is over {over!r}", "it is training or decoding", block.where)
    bound = block.number("sd_below", 1) if "sd_below" in block.raw else None  # in words of the paper, not in its cells
    tests = [_template(test, f"{block.where}: tests") for test in block.items("tests")]
    for row in block.each("rows"):
        train, mixed, own = row.template("train", True), row.text("mixed", ""), row.whole("seeds", seeds)
        values = row.items("values")
        if len(values) != len(tests) or mixed not in ("", SAFETY_DATA):
            raise UserError(f"{len(values)} values of {len(tests)} columns, mixed {mixed!r}", where=row.where)
        for test, value in zip(tests, values, strict=True):
            mean, sd = _value(value, 1.0 if unit == "F1" else 100.0, row.where)
            spread = over if sd is not None or bound is not None else ""
            place = (name, train, mixed, test)
            figures: dict[str, Any] = {"value": mean, "sd": sd, "sd_over": spread, "seeds": own, "prompts": prompts}
            figures |= {"metric": metric, "unit": unit, "inconsistent": reasons.get(place, "")}
            yield PaperCell(table, name, train=train, mixed=mixed, test=test, **shared, **figures)
        row.end()


def _value(value: Any, most: float, where: str) -> tuple[float, float | None]:
    """Mean and SD of [mean] or [mean, SD]."""
    numbers: list[Any] = value if isinstance(value, list) and len(value) in (1, 2) else [None]
    if not all(_is_number(n) and 0 <= n <= most for n in numbers):
        raise UserError(f"{value!r} is no [mean] or [mean, SD] from 0 to {most:g}", where=where)
    return float(numbers[0]), float(numbers[1]) if len(numbers) == 2 else None


def _curve(line: "_Object") -> Curve:
    points = []
    for point in line.each("points"):
        at = None if point.raw.get("at", 0) is None else point.number("at", math.inf)
        points.append(CurvePoint(at, point.number("helpfulness"), point.number("asr")))
        point.used.add("at")
        point.end()
    names = {key: line.text(key) for key in ("figure", "model", "data", "unit")}
    curve = Curve(**names, **_templates(line), points=tuple(points), note=line.text("note", ""))
    line.end()
    return curve


def _point(line: "_Object") -> FigurePoint:
    names = {key: line.text(key) for key in ("figure", "model", "data")}
    asr, helpfulness = line.number("asr"), line.number("helpfulness")
    point = FigurePoint(**names, **_templates(line), asr=asr, helpfulness=helpfulness)
    line.end()
    return point


def _templates(line: "_Object") -> dict[str, str]:
    return {key: line.template(key) or "" for key in ("train", "test")}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _template(name: Any, where: str) -> str:
    if isinstance(name, str) and name in TEMPLATES:
        return name
    raise UserError(f"{name!r} is no template", f"there are: {', '.join(TEMPLATES)}", where)


_REQUIRED: Any = object()


class _Object:
    """A JSON object that is read key by key; every key must be read in the end."""

    def __init__(self, raw: Any, where: str):
        if not isinstance(raw, dict):
            raise UserError(f"must be an object, not {type(raw).__name__}", where=where)
        self.raw, self.where, self.used = raw, where, set[str]()

    def end(self) -> None:
        if unknown := self.raw.keys() - self.used:
            raise UserError(f"has the unknown key {min(unknown)}", where=self.where)

    def items(self, key: str) -> list[Any]:
        found: list[Any] = self.get(key, list, "a list")
        return found

    def each(self, key: str) -> list["_Object"]:
        return [_Object(value, f"{self.where}: {key}[{i}]") for i, value in enumerate(self.items(key))]

    def text(self, key: str, default: str = _REQUIRED) -> str:
        found: str = self.get(key, str, "a text", default)
        return found

    def whole(self, key: str, default: int = _REQUIRED) -> int:
        found = self.get(key, int, "a whole number above 0", default)
        if isinstance(found, bool) or found < 1:
            raise UserError(f"{key} is {found}, not a whole number above 0", where=self.where)
        return int(found)

    def number(self, key: str, most: float = 100.0) -> float:
        found = self.get(key, (int, float), "a number")
        if not _is_number(found) or not 0 <= found <= most:
            raise UserError(f"{key} is {found}, not a number from 0 to {most:g}", where=self.where)
        return float(found)

    def template(self, key: str, optional: bool = False) -> str | None:
        self.used.add(key)
        name = self.raw.get(key, "")
        return None if name is None and optional else _template(name, f"{self.where}: {key}")

    def get(self, key: str, kind: type | tuple[type, ...], words: str, default: Any = _REQUIRED) -> Any:
        self.used.add(key)
        if key not in self.raw and default is not _REQUIRED:
            return default
        if not isinstance(self.raw.get(key), kind):
            problem = "is missing" if key not in self.raw else f"must be {words}"
            raise UserError(f"{key} {problem}", where=self.where)
        return self.raw[key]
