"""A chart as inline SVG, whose colours are the page's own in light and in dark. No style attribute, which the page's
policy forbids: classes and presentation attributes alone. All text is escaped."""

from collections.abc import Callable

from markupsafe import Markup

from ptst.progress import printable
from ptst.reporting.chart import MARKERS, NOT_A_SERIES, Chart, Panel, Point, Series, ticks

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 440, 320, 56, 12, 30, 46
_Place = Callable[[float], float]


def panel(chart: Chart, of: Panel) -> Markup:
    """One panel."""
    x, y = _scales(chart)
    parts = [_axes(chart, of, x, y)]
    for number, series in enumerate(of.series):
        # Beside each other, so that no interval hides another one.
        bars = series.line and any(p.y_ends for p in series.points)
        aside = 1.6 * (number - (len(of.series) - 1) / 2) if bars else 0.0
        parts.append(_series(chart, series, x, y, aside))
    title = ", ".join(filter(None, (chart.title, of.title)))
    head = Markup('<svg viewBox="0 0 {} {}" role="img" class="chart"><title>{}</title>')
    head = head.format(WIDTH, HEIGHT, printable(title))
    return head + Markup("").join(parts) + Markup("</svg>")


def swatch(series: Series, dots: bool = True) -> Markup:
    """A series in a legend."""
    parts = []
    if series.line:
        dash = Markup(' stroke-dasharray="5 4"') if series.dashed else ""
        parts.append(Markup('<line x1="0" x2="28" y1="7" y2="7" class="line {}"{}/>').format(_color(series), dash))
    if series.dots and dots:
        parts.append(_marker(14, 7, series.color if series.line else 0, _color(series)))
    return Markup('<svg viewBox="0 0 28 14" class="swatch" aria-hidden="true">{}</svg>').format(Markup("").join(parts))


def marker_swatch(number: int) -> Markup:
    """A marker in a legend."""
    drawn = _marker(14, 7, number, "c-grey")
    return Markup('<svg viewBox="0 0 28 14" class="swatch" aria-hidden="true">{}</svg>').format(drawn)


def _scales(chart: Chart) -> tuple[_Place, _Place]:
    (x0, x1), (y0, y1) = chart.x_range, chart.y_range
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    return (
        lambda v: LEFT + wide * (v - x0) / ((x1 - x0) or 1.0),
        lambda v: TOP + high * (1 - (v - y0) / ((y1 - y0) or 1.0)),
    )


def _axes(chart: Chart, of: Panel, x: _Place, y: _Place) -> Markup:
    parts = [Markup('<text x="{}" y="18" class="t-bold">{}</text>').format(LEFT, printable(of.title))]
    bottom = HEIGHT - BOTTOM
    for value in ticks(chart.y_range):
        at = f"{y(value):.1f}"
        parts.append(Markup('<line class="rule" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(LEFT, WIDTH - RIGHT, at, at))
        words = Markup('<text x="{}" y="{:.1f}" class="t-small" text-anchor="end">{:g}</text>')
        parts.append(words.format(LEFT - 6, y(value) + 4, value))
    for value in ticks(chart.x_range, 6):
        words = Markup('<text x="{:.1f}" y="{}" class="t-small" text-anchor="middle">{:g}</text>')
        parts.append(words.format(x(value), bottom + 16, value))
        tick = Markup('<line class="axis" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>')
        parts.append(tick.format(x(value), bottom, bottom + 4))
    parts.append(
        Markup('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(LEFT, WIDTH - RIGHT, bottom, bottom)
    )
    middle = Markup('<text x="{:.1f}" y="{}" class="t-small" text-anchor="middle">{}</text>')
    parts.append(middle.format((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, printable(chart.x_label)))
    turned = Markup('<text transform="translate(13 {:.1f}) rotate(-90)" class="t-small" text-anchor="middle">{}</text>')
    parts.append(turned.format((TOP + bottom) / 2, printable(chart.y_label)))
    return Markup("").join(parts)


def _series(chart: Chart, series: Series, x: _Place, y: _Place, aside: float) -> Markup:
    color = _color(series)
    parts = []
    if series.line and len(series.points) > 1:
        path = " ".join(f"{x(p.x) + aside:.1f},{y(p.y):.1f}" for p in series.points)
        dash = Markup(' stroke-dasharray="5 4"') if series.dashed else ""
        line = Markup('<polyline points="{}" class="line {}"{}><title>{}</title></polyline>')
        parts.append(line.format(path, color, dash, printable(series.name)))
    if series.dots:
        # Of a line, its own marker; of single points, the marker that says what they are.
        parts += [_point(p, series.color if series.line else p.marker, color, x, y, aside) for p in series.points]
    return Markup("").join(parts)


def _point(p: Point, marker: int, color: str, x: _Place, y: _Place, aside: float) -> Markup:
    at_x, at_y = x(p.x) + aside, y(p.y)
    parts = []
    bar = Markup('<line class="bar-line {}" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>')
    if p.y_ends:
        parts.append(bar.format(color, at_x, at_x, y(p.y_ends[0]), y(p.y_ends[1])))
    if p.x_ends:
        parts.append(bar.format(color, x(p.x_ends[0]), x(p.x_ends[1]), at_y, at_y))
    if p.ringed:
        parts.append(Markup('<circle class="ring" cx="{:.1f}" cy="{:.1f}" r="8.5"/>').format(at_x, at_y))
    parts.append(_marker(at_x, at_y, marker, color))
    return Markup("<g><title>{}</title>{}</g>").format(printable(p.label), Markup("").join(parts))


_CORNERS = {
    "square": ((-4, -4), (4, -4), (4, 4), (-4, 4)),
    "triangle": ((0, -5), (5, 4), (-5, 4)),
    "diamond": ((0, -5.5), (5.5, 0), (0, 5.5), (-5.5, 0)),
    "cross": ((-5, -2), (-2, -5), (0, -2.5), (2, -5), (5, -2), (2.5, 0), (5, 2), (2, 5), (0, 2.5), (-2, 5), (-5, 2),
              (-2.5, 0)),
}  # fmt: skip


def _marker(x: float, y: float, number: int, color: str) -> Markup:
    name = MARKERS[number % len(MARKERS)]
    if name == "circle":
        return Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="4.2"/>').format(color, x, y)
    path = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in _CORNERS[name])
    return Markup('<polygon class="dot {}" points="{}"/>').format(color, path)


def _color(series: Series) -> str:
    return "c-grey" if series.color == NOT_A_SERIES else f"c{series.color % 9}"
