"""The picture of a study, as SVG: attack success over the distance from the training prompt, a panel for each training
template, a curve for each defence, with 95 % intervals. Colours of Okabe and Ito (2008), which differ for every reader;
each curve has a marker of its own besides.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from ptst.defense_names import NONE
from ptst.errors import UserError
from ptst.evaluation.two_way import Interval
from ptst.experiment.ladder.analysis import ALIGNED, Study
from ptst.experiment.ladder.blocks import ordered_rungs
from ptst.experiment.ladder.names import rung_name
from ptst.experiment.ladder.outcomes import ASR, Key
from ptst.experiment.ladder.registered import DISTANCE, PTST, PURE

_SQUARE, _TRIANGLE = ((-3, -3), (3, -3), (3, 3), (-3, 3)), ((0, -4), (4, 3), (-4, 3))
_CORNERS: tuple[tuple[tuple[float, float], ...], ...]
_CORNERS = (_SQUARE, _TRIANGLE, ((0, -4.4), (4.4, 0), (0, 4.4), (-4.4, 0)))
COLORS = ("#000000", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a7000", "#7f3c8d", "#666666")
GREY = "#8c959f"
LEFT, TOP, PANEL, HEIGHT, GAP, BELOW = 60, 84, 520, 300, 70, 96
STYLE = """<style>
  text { font-family: system-ui, 'Segoe UI', Helvetica, Arial, sans-serif; font-size: 13px; fill: #1f2328 }
  .small { font-size: 11px; fill: #59636e } .bold { font-weight: 700; font-size: 14px }
  .axis { stroke: #8c959f; stroke-width: 1 } .grid { stroke: #d1d9e0; stroke-width: 0.5 }
</style>"""


@dataclass(frozen=True)
class Point:
    """A rung: its distance, the rate and its interval, as shares."""

    rung: str
    distance: float
    rate: float
    interval: Interval | None


@dataclass(frozen=True)
class Curve:
    name: str
    color: str
    points: Sequence[Point]
    dashed: bool = False


def curves(study: Study, train: str, task: str = "safety", measure: str = ASR) -> list[Curve]:
    """The aligned model, and the models of every defence, over the rungs of a training template. A study measures the
    distances of the models without a defence; the points of all others lie there, too, unless theirs were measured."""
    data, of = study.data[0], study.task(task)
    rungs = [(test, far) for test, far in ordered_rungs(study, train) if far is not None]
    base = [(Key(data, "", NONE, test, of), far) for test, far in rungs]
    found = [Curve(ALIGNED, GREY, _points(study, base, measure), dashed=True)]
    for i, defense in enumerate(study.defenses):
        keys = [(Key(data, train, defense, test, of), far) for test, far in rungs]
        own = [(key, study.distance(key, DISTANCE)) for key, _ in keys]
        placed = [(key, far if at is None else at) for (key, far), (_, at) in zip(keys, own, strict=True)]
        found.append(Curve(defense, COLORS[i % len(COLORS)], _points(study, placed, measure)))
    return [curve for curve in found if curve.points]


def _points(study: Study, keys: Sequence[tuple[Key, float]], measure: str) -> list[Point]:
    found = []
    for key, far in keys:
        if key in study.outcomes.cells:
            s = study.shown(key, measure)
            found.append(Point(rung_name(key.test), far, s.mean, s.interval))
    return sorted(found, key=lambda point: point.distance)


def draw(study: Study) -> str:
    """The whole picture. Raises UserError for a study without a ladder, or without its distances."""
    panels = [(train, found) for train in study.trains if (found := curves(study, train))]
    if not panels:
        raise UserError("the study has no ladder with distances, so there is no curve to draw")
    requests = len(study.outcomes.prompts[study.task("safety")].ids)
    sizes = f"bars: 95 % intervals, {len(study.runs)} runs, {requests} requests"
    widest = max(point.distance for _, found in panels for curve in found for point in curve.points) or 1.0
    parts = [
        _text(16, 26, "Harmful requests complied with, by the distance of test from training prompt", "bold"),
        _text(16, 46, f"Attack success rate by {study.judge}, % (lower is safer); {sizes}", "small"),
    ]
    for number, (train, found) in enumerate(panels):
        parts += _panel(LEFT, TOP + number * (HEIGHT + GAP + BELOW), train, found, widest)
    names = list({curve.name: curve for _, found in panels for curve in found}.values())
    parts += _legend(LEFT + PANEL + 24, TOP + 10, names)
    width, height = LEFT + PANEL + 180, TOP + len(panels) * (HEIGHT + GAP + BELOW) - GAP
    title = "Attack success rate over the distance of the test prompt from the training prompt, by defence"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img">'
    page = f'<rect width="{width}" height="{height}" rx="6" fill="#ffffff"/>'
    return "\n".join([head, f"<title>{escape(title)}</title>", STYLE, page, *parts, "</svg>"]) + "\n"


def _panel(left: float, top: float, train: str, found: Sequence[Curve], widest: float) -> list[str]:
    def x(distance: float) -> float:
        return left + PANEL * (0.03 + 0.94 * distance / widest)

    def y(share: float) -> float:
        return top + HEIGHT * (1 - share)

    parts = [_text(left, top - 10, f"trained under {train}", "bold")]
    for percent in range(0, 101, 20):
        at = y(percent / 100)
        parts.append(f'<line class="grid" x1="{left}" x2="{left + PANEL}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(_text(left - 8, at + 4, str(percent), "small", "end"))
    parts.append(f'<line class="axis" x1="{left}" x2="{left + PANEL}" y1="{top + HEIGHT}" y2="{top + HEIGHT}"/>')
    parts += _ticks(found, x, top, ptst=train == PURE)
    parts.append(_text(left + PANEL + 12, top + HEIGHT + 4, "distance: share of", "small"))
    parts.append(_text(left + PANEL + 12, top + HEIGHT + 18, "tokens edited", "small"))
    for number, curve in enumerate(found):
        parts += _curve(curve, number, len(found), x, y)
    return parts


def _ticks(found: Sequence[Curve], x: Callable[[float], float], top: float, ptst: bool) -> list[str]:
    """The rungs, slanted, where the models without a defence have them; names that would lie upon each other step
    aside. `ptst`: training was pure, so that the safety prompt of the test is PTST."""
    parts, last = list[str](), -100.0
    named = next((curve for curve in found if curve.name == NONE), found[0])
    for point in named.points:
        at = max(x(point.distance), last + 13)
        last, base = at, top + HEIGHT
        parts.append(f'<line class="axis" x1="{x(point.distance):.1f}" x2="{at:.1f}" y1="{base}" y2="{base + 8}"/>')
        name = f"{point.rung}, PTST" if ptst and point.rung == PTST else point.rung
        words = escape(f"{name} ({point.distance:.2f})")
        parts.append(f'<text class="small" transform="translate({at + 3:.1f} {base + 16}) rotate(40)">{words}</text>')
    return parts


def _curve(curve: Curve, number: int, of: int, x: Callable[[float], float], y: Callable[[float], float]) -> list[str]:
    """A line, its intervals and its markers; curves are set beside each other by a pixel and a half, or intervals at
    the same distance would hide each other."""
    aside = 1.6 * (number - (of - 1) / 2)
    at = [(x(point.distance) + aside, y(point.rate), point) for point in curve.points]
    path = " ".join(f"{px:.1f},{py:.1f}" for px, py, _ in at)
    dash = ' stroke-dasharray="5 4"' if curve.dashed else ""
    parts = [f'<polyline points="{path}" fill="none" stroke="{curve.color}" stroke-width="1.6"{dash}/>']
    for px, py, point in at:
        if point.interval is not None:
            low, high = (y(share) for share in point.interval)
            parts.append(f'<line x1="{px:.1f}" x2="{px:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="{curve.color}" '
                         'stroke-opacity="0.55"/>')  # fmt: skip
        parts.append(_marker(px, py, number, curve.color))
    return parts


def _marker(x: float, y: float, number: int, color: str) -> str:
    """A circle, square, triangle or diamond, filled or hollow."""
    fill = color if number // 4 % 2 == 0 else "#ffffff"
    drawn = f'fill="{fill}" stroke="{color}" stroke-width="1.4"'
    kind = number % 4
    if kind == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.4" {drawn}/>'
    path = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in _CORNERS[kind - 1])
    return f'<polygon points="{path}" {drawn}/>'


def _legend(left: float, top: float, names: Sequence[Curve]) -> list[str]:
    parts = []
    for number, curve in enumerate(names):
        y = top + 22 * number
        drawn = f'stroke="{curve.color}" stroke-width="1.6"' + (' stroke-dasharray="5 4"' if curve.dashed else "")
        parts.append(f'<line x1="{left}" x2="{left + 26}" y1="{y}" y2="{y}" {drawn}/>')
        parts += [_marker(left + 13, y, number, curve.color), _text(left + 34, y + 4, curve.name)]
    return parts


def _text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'
