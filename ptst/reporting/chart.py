"""What a chart shows, apart from how it is drawn: inline SVG (ptst/reporting/svg.py) and matplotlib (plot.py)."""

from collections.abc import Sequence
from dataclasses import dataclass

Ends = tuple[float, float]
# Okabe and Ito (2008), which differ for every reader; yellow is left out, being too light on white.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f7f7f", "#8a7000", "#7f3c8d")
MARKERS = ("circle", "square", "triangle", "diamond", "cross")
NOT_A_SERIES = -1  # the colour of what is compared with: grey


@dataclass(frozen=True)
class Point:
    """`x_ends`, `y_ends`: 95 % intervals; `label`: all of it in words; `ringed`: a PTST cell."""

    x: float
    y: float
    x_ends: Ends | None = None
    y_ends: Ends | None = None
    label: str = ""
    marker: int = 0
    ringed: bool = False


@dataclass(frozen=True)
class Series:
    """`color`: its place in COLORS, or NOT_A_SERIES; `line`: whether points are joined, `dots`: whether they are
    drawn."""

    name: str
    points: Sequence[Point]
    color: int
    line: bool = True
    dots: bool = True
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    title: str
    series: Sequence[Series]


@dataclass(frozen=True)
class Chart:
    """`key`: of its files; `markers`: what each marker means, where that is not the series; `best`: where on the chart
    it is good to be, in words; `words`: what a reader is told under it."""

    key: str
    title: str
    x_label: str
    y_label: str
    panels: Sequence[Panel]
    x_range: Ends
    y_range: Ends
    markers: Sequence[str] = ()
    words: str = ""
    best: str = ""
    rings: bool = False

    @property
    def legend(self) -> list[Series]:
        """Every series once, in the order of their first panel."""
        return list({s.name: s for panel in self.panels for s in panel.series}.values())


def span(values: Sequence[float], least: float | None = None, most: float | None = None) -> Ends:
    """A range around values, with room; `least` and `most`: what it must not pass."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    low, high = low - room, high + room
    return (low if least is None else max(least, low), high if most is None else min(most, high))


def ticks(ends: Ends, about: int = 5) -> list[float]:
    """Round numbers within a range."""
    low, high = ends
    raw = (high - low) / about
    if raw <= 0:
        return [low]
    size = 10.0 ** _floor_log10(raw)
    step = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= raw * 0.999)
    first = -(-low // step)
    found = list[float]()
    while (first + len(found)) * step <= high + 1e-9 * step:
        found.append(round((first + len(found)) * step, 10))
    return found


def _floor_log10(value: float) -> int:
    from math import floor, log10

    return floor(log10(value))
