"""Plots as SVG, written here: no script, no font and no address from elsewhere, readable in light and dark and without colours."""

from __future__ import annotations

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
    """points: (x, y). kind: line, level (a dashed horizontal at the last point's y), marks. names: of points, shown beside."""

    name: str
    points: Sequence[tuple[float, float]]
    kind: str = "line"
    names: Sequence[str] = ()


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
) -> str:
    """Lines, levels and marks over one pair of axes; labels are escaped here.

    Args:
        log_x: logarithmic; points at 0 or below are left out.
        unit_y: y reaches from 0 to 1, whatever the points are.
    """
    drawn = [_usable(s, log_x) for s in series]
    xs = [x for s in drawn for x, _ in s.points]
    ys = [y for s in drawn for _, y in s.points] + ([0.0, 1.0] if unit_y else [])
    if not xs:
        return ""
    x_ticks = _powers(min(xs), max(xs)) if log_x else ticks(min(xs), max(xs))
    y_ticks = ticks(min(ys), max(ys))
    height = HEIGHT + 18 * math.ceil(len(drawn) / 2)

    def place_x(value: float) -> float:
        low, high, at = x_ticks[0], x_ticks[-1], value
        if log_x:
            low, high, at = math.log10(low), math.log10(high), math.log10(value)
        return LEFT + (WIDTH - LEFT - RIGHT) * (at - low) / ((high - low) or 1)

    def place_y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (value - y_ticks[0]) / ((y_ticks[-1] - y_ticks[0]) or 1))

    name = escape(title)
    out = [
        f'<svg class="plot" role="img" aria-label="{name}" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}">',
        f'<text x="{LEFT}" y="20" font-weight="600">{name}</text>',
    ]
    for tick in y_ticks:
        y = place_y(tick)
        out.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        out.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in x_ticks:
        x = place_x(tick)
        out.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    out.append(f'<text x="{middle}" y="{HEIGHT - 14}" text-anchor="middle">{escape(x_label)}</text>')
    turned = f"translate(15 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)"
    out.append(f'<text transform="{turned}" text-anchor="middle">{escape(y_label)}</text>')
    for number, one in enumerate(drawn):
        out += _draw(number, one, place_x, place_y)
        out += _legend(number, one)
    return "".join([*out, "</svg>"])


def _usable(series: Series, log_x: bool) -> Series:
    whole = [(i, p) for i, p in enumerate(series.points) if all(map(math.isfinite, p)) and (p[0] > 0 or not log_x)]
    names = [series.names[i] for i, _ in whole] if series.names else ()
    return Series(series.name, [p for _, p in whole], series.kind, names)


def _powers(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return [10.0**i for i in range(first, max(last, first + 1) + 1)]


def _draw(number: int, series: Series, x: Callable[[float], float], y: Callable[[float], float]) -> list[str]:
    colour, dash = f"c{number % len(COLOURS)}", DASHES[number % len(DASHES)]
    if not series.points:
        return []
    if series.kind == "level":
        level = y(series.points[-1][1])
        return [
            f'<path class="line {colour}" stroke-dasharray="{dash or "1 2"}" d="M{LEFT} {level:.1f}H{WIDTH - RIGHT}"/>'
        ]
    out = []
    if series.kind == "line":
        path = "L".join(f"{x(px):.1f} {y(py):.1f}" for px, py in series.points)
        out.append(f'<path class="line {colour}" stroke-dasharray="{dash}" d="M{path}"/>')
    if series.kind == "marks" or len(series.points) <= 30:
        out += [_mark(number, x(px), y(py)) for px, py in series.points]
    for (px, py), name in zip(series.points, series.names, strict=False):
        out.append(f'<text x="{x(px) + 7:.1f}" y="{y(py) + 4:.1f}" font-size="11">{escape(name, 40)}</text>')
    return out


def _mark(number: int, x: float, y: float) -> str:
    colour, kind = f"c{number % len(COLOURS)}", MARKS[number % len(MARKS)]
    if kind == "circle":
        return f'<circle class="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>'
    shapes = {"square": "m-3 -3h6v6h-6z", "triangle": "m0 -4l4 7h-8z", "diamond": "m0 -4l4 4l-4 4l-4 -4z"}
    return f'<path class="{colour}" d="M{x:.1f} {y:.1f}{shapes[kind]}"/>'


def _legend(number: int, series: Series) -> list[str]:
    """Below the axes, two to a line."""
    x, y = LEFT + (number % 2) * 290, HEIGHT + 4 + 18 * (number // 2)
    dash = DASHES[number % len(DASHES)] or ("1 2" if series.kind == "level" else "")
    line = f'<path class="line c{number % len(COLOURS)}" stroke-dasharray="{dash}" d="M{x} {y - 4}h26"/>'
    mark = "" if series.kind == "level" else _mark(number, x + 13, y - 4)
    return [
        ("" if series.kind == "marks" else line) + mark,
        f'<text x="{x + 33}" y="{y}">{escape(series.name, 36)}</text>',
    ]
