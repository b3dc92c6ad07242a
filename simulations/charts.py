"""Plots as SVG, written here: no script, no font and no address from elsewhere, readable in light and dark and without colours."""

from __future__ import annotations

import dataclasses
import html
import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# Okabe & Ito's colours, told apart with any colour vision; the second of each pair is for dark backgrounds.
COLOURS = (
    ("#0072b2", "#56b4e9"), ("#d55e00", "#ff8c42"), ("#009e73", "#2fd6a3"), ("#cc79a7", "#e79fc9"),
    ("#8a6d00", "#f0e442"), ("#444444", "#cccccc"), ("#56b4e9", "#0096ff"), ("#a65300", "#e69f00"),
)  # fmt: skip
DASHES = ("", "6 3", "2 3", "9 3 2 3", "4 4", "1 4", "8 2", "3 2")
MARKS = ("circle", "square", "triangle", "diamond")
WIDTH, HEIGHT = 640, 340
LEFT, TOP, RIGHT, BOTTOM = 64, 34, 18, 52
DIGIT = 7.5  # how wide one is, at most, in the font of the labels
GREY = 5  # of COLOURS: what belongs to all
SHORT, LONG = 36, 90  # characters of a name in the legend: two to a row, or one

STYLE = (
    "svg.plot{color:#24292f;background:#fff;font:13px system-ui,sans-serif;max-width:100%;height:auto}"
    "svg.plot .grid{stroke:#d0d7de}svg.plot text{fill:currentColor}"
    + "".join(f"svg.plot .c{i}{{stroke:{a};fill:{a}}}" for i, (a, _) in enumerate(COLOURS))
    + "@media(prefers-color-scheme:dark){svg.plot{color:#e6edf3;background:#0d1117}svg.plot .grid{stroke:#30363d}"
    + "".join(f"svg.plot .c{i}{{stroke:{b};fill:{b}}}" for i, (_, b) in enumerate(COLOURS))
    + "}svg.plot .line{fill:none;stroke-width:2}svg.plot .band{stroke:none;opacity:.18}"
)


@dataclass(frozen=True)
class Series:
    """points: (x, y). kind: line, level (a dashed horizontal at the last point's y), marks. names: of points, shown beside.

    colour, dash: places in COLOURS and DASHES; by default those of the series' own place.
    """

    name: str
    points: Sequence[tuple[float, float]]
    kind: str = "line"
    names: Sequence[str] = ()
    colour: int | None = None
    dash: int | None = None


@dataclass(frozen=True)
class Unit:
    """Of time, on an axis or in a table."""

    name: str
    word: str
    seconds: float


UNITS = (Unit("s", "seconds", 1.0), Unit("min", "minutes", 60.0), Unit("h", "hours", 3600.0))


def unit_of(longest_s: float) -> Unit:
    """What so long a time, and shorter ones beside it, are best told in.

    >>> unit_of(99).name, unit_of(1800).name, unit_of(86400).name
    ('s', 'min', 'h')
    """
    return UNITS[0] if longest_s < 120 else UNITS[1] if longest_s < 7200 else UNITS[2]


def clean(text: object, most: int = 200) -> str:
    """A label as it may be shown: without characters that no file may hold, or that turn the text around.

    >>> clean("a\\x00b\\u202ec"), clean("x" * 5, most=3)
    ('a\\ufffdb\\ufffdc', 'xx…')
    """
    shown = "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn") else c for c in str(text))
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def escape(text: object, most: int = 200) -> str:
    """For HTML and SVG, in texts and attributes."""
    return html.escape(clean(text, most))


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers that reach from low to high.

    >>> ticks(0, 1), ticks(3, 47)
    ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [0.0, 10.0, 20.0, 30.0, 40.0, 50.0])
    """
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(s * power for s in (1, 2, 5, 10) if s * power * count >= span * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def chart(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    log_x: bool = False,
    unit_y: bool = False,
    whole_x: bool = False,
) -> str:
    """Lines, levels and marks over one pair of axes; labels are escaped here.

    Args:
        log_x: logarithmic; points at 0 or below are left out.
        unit_y: y reaches from 0 to 1, whatever the points are.
        whole_x: x counts something, such as rounds: no tick between two of them, wherever points are.
    """
    drawn = [_usable(s, log_x) for s in series]
    xs = [x for s in drawn for x, _ in s.points]
    ys = [y for s in drawn for _, y in s.points] + ([0.0, 1.0] if unit_y else [])
    if not xs:
        return ""
    x_ticks = _powers(min(xs), max(xs)) if log_x else ticks(min(xs), max(xs))
    if whole_x or all(float(x).is_integer() for x in xs):
        x_ticks = [tick for tick in x_ticks if tick.is_integer()]
        x_ticks += [float(math.ceil(max(xs)))] * (x_ticks[-1] < max(xs))
    y_ticks = ticks(min(ys), max(ys))
    places = _places(drawn)
    height = HEIGHT + 18 * (places[-1][1] + 1)
    left = max(LEFT, 28 + DIGIT * max(len(f"{tick:g}") for tick in y_ticks))
    right = WIDTH - max(RIGHT, 4 + DIGIT / 2 * len(f"{x_ticks[-1]:g}"))

    def place_x(value: float) -> float:
        low, high, at = x_ticks[0], x_ticks[-1], value
        if log_x:
            low, high, at = math.log10(low), math.log10(high), math.log10(value)
        return left + (right - left) * (at - low) / ((high - low) or 1)

    def place_y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (value - y_ticks[0]) / ((y_ticks[-1] - y_ticks[0]) or 1))

    name = escape(title)
    out = [
        f'<svg class="plot" role="img" aria-label="{name}" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}">',
        f'<text x="{left:g}" y="20" font-weight="600">{name}</text>',
    ]
    for tick in y_ticks:
        y = place_y(tick)
        out.append(f'<path class="grid" d="M{left:g} {y:.1f}H{right:g}"/>')
        out.append(f'<text x="{left - 7:g}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in x_ticks:
        x = place_x(tick)
        out.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:g}</text>')
    out.append(f'<text x="{(left + right) / 2:g}" y="{HEIGHT - 14}" text-anchor="middle">{escape(x_label)}</text>')
    turned = f"translate(15 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)"
    out.append(f'<text transform="{turned}" text-anchor="middle">{escape(y_label)}</text>')
    strokes = _strokes(drawn, place_y)
    for number, one in enumerate(drawn):
        look = _Look(_colour(number, one), number % len(MARKS), strokes[number])
        out += _draw(look, one, place_x, place_y, (left, right))
        out += _legend(look, one, places[number])
    return "".join([*out, "</svg>"])


@dataclass(frozen=True)
class _Look:
    """stroke: attributes of a path."""

    colour: str
    mark: int
    stroke: str


def _colour(number: int, series: Series) -> str:
    return f"c{(number if series.colour is None else series.colour) % len(COLOURS)}"


def _strokes(drawn: Sequence[Series], y: Callable[[float], float]) -> list[str]:
    """The dashes of each; levels that lie on each other share the line, dash by dash in turn: none hides another."""
    found = []
    for number, series in enumerate(drawn):
        dash = DASHES[(number if series.dash is None else series.dash) % len(DASHES)]
        found.append(f'stroke-dasharray="{dash or ("1 2" if series.kind == "level" else "")}"')
    levels: dict[int, list[int]] = {}
    for number, series in enumerate(drawn):
        if series.kind == "level" and series.points:
            levels.setdefault(round(y(series.points[-1][1])), []).append(number)
    for members in levels.values():
        for turn, number in enumerate(members if len(members) > 1 else ()):
            found[number] = f'stroke-dasharray="6 {6 * len(members) - 6}" stroke-dashoffset="{-6 * turn}"'
    return found


def _usable(series: Series, log_x: bool) -> Series:
    whole = [(i, p) for i, p in enumerate(series.points) if all(map(math.isfinite, p)) and (p[0] > 0 or not log_x)]
    names = [series.names[i] for i, _ in whole] if series.names else ()
    return dataclasses.replace(series, points=[p for _, p in whole], names=names)


def _powers(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return [10.0**i for i in range(first, max(last, first + 1) + 1)]


def _draw(
    look: _Look,
    series: Series,
    x: Callable[[float], float],
    y: Callable[[float], float],
    between: tuple[float, float],
) -> list[str]:
    if not series.points:
        return []
    line = f'<path class="line {look.colour}" {look.stroke}'
    if series.kind == "level":
        return [f'{line} d="M{between[0]:g} {y(series.points[-1][1]):.1f}H{between[1]:g}"/>']
    out = []
    if series.kind == "line":
        path = "L".join(f"{x(px):.1f} {y(py):.1f}" for px, py in series.points)
        out.append(f'{line} d="M{path}"/>')
    if series.kind == "marks" or len(series.points) <= 30:
        out += [_mark(look, x(px), y(py)) for px, py in series.points]
    for (px, py), name in zip(series.points, series.names, strict=False):
        shown, at = clean(name, 40), x(px)
        beside = f'x="{at + 7:.1f}"' if at + 7 + 6.5 * len(shown) < WIDTH else f'x="{at - 7:.1f}" text-anchor="end"'
        out.append(f'<text {beside} y="{y(py) + 4:.1f}" font-size="11">{escape(shown)}</text>')
    return out


def _mark(look: _Look, x: float, y: float) -> str:
    kind = MARKS[look.mark]
    if kind == "circle":
        return f'<circle class="{look.colour}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>'
    shapes = {"square": "m-3 -3h6v6h-6z", "triangle": "m0 -4l4 7h-8z", "diamond": "m0 -4l4 4l-4 4l-4 -4z"}
    return f'<path class="{look.colour}" d="M{x:.1f} {y:.1f}{shapes[kind]}"/>'


def _places(drawn: Sequence[Series]) -> list[tuple[int, int]]:
    """Column and row of each in the legend: two to a row where both names are short."""
    found: list[tuple[int, int]] = []
    for number, series in enumerate(drawn):
        column, row = found[-1] if found else (1, -1)
        beside = column == 0 and len(series.name) <= SHORT and len(drawn[number - 1].name) <= SHORT
        found.append((1, row) if beside else (0, row + 1))
    return found


def _legend(look: _Look, series: Series, place: tuple[int, int]) -> list[str]:
    """Below the axes."""
    x, y = LEFT + place[0] * 290, HEIGHT + 4 + 18 * place[1]
    line = f'<path class="line {look.colour}" {look.stroke} d="M{x} {y - 4}h26"/>'
    mark = "" if series.kind == "level" else _mark(look, x + 13, y - 4)
    return [
        ("" if series.kind == "marks" else line) + mark,
        f'<text x="{x + 33}" y="{y}">{escape(series.name, LONG)}</text>',
    ]
