"""Plots of runs: by round, by bytes and by the fleet's clock, with the lines that each is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from pocketfed.simulations.charts import GREY, Series, chart, unit_of

LINE_NAMES = {"central": "all data in one place", "local": "each device alone, mean", "previous": "the model before"}
DASH_OF = {"central": 1, "local": 2, "previous": 3}  # where several runs are drawn, a run is a colour and a line a dash


def plots(runs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, str]:
    """By round with the lines, by bytes, and by the fleet's clock where there is one: file name -> SVG."""
    metric = "accuracy" if any(r["accuracy"] is not None for run in runs for r in run["rounds"]) else "loss"
    share, y = metric == "accuracy", f"{metric} on the test"
    by_round = [
        _series(run, name, metric, [r["round"] for r in run["rounds"]]) for run, name in zip(runs, names, strict=True)
    ]
    by_bytes = [_series(run, name, metric, _megabytes(run)) for run, name in zip(runs, names, strict=True)]
    by_clock = [(run, name, _seconds(run)) for run, name in zip(runs, names, strict=True) if _seconds(run)]
    unit = unit_of(max((seconds[-1] for _, _, seconds in by_clock), default=0.0))
    timed = [_series(run, name, metric, [s / unit.seconds for s in seconds]) for run, name, seconds in by_clock]
    title, spent = metric.title(), "MB up and down a device, the artifact's download included"
    lines = _lines(runs, names, metric)
    made = {
        "rounds": chart(f"{title} by round", "round", y, [*by_round, *lines], unit_y=share, whole_x=True),
        "bytes": chart(f"{title} by bytes", spent, y, by_bytes, unit_y=share),
        "clock": chart(f"{title} by the fleet's clock", unit.word, y, timed, unit_y=share),
    }
    return {name: svg for name, svg in made.items() if svg}


def _series(run: Mapping[str, Any], name: str, metric: str, places: Sequence[float]) -> Series:
    measured = zip(places, run["rounds"], strict=True)
    return Series(name, [(place, r[metric]) for place, r in measured if r[metric] is not None], dash=0)


def _megabytes(run: Mapping[str, Any]) -> list[float]:
    devices = (run.get("costs") or {}).get("devices") or 1
    return list(accumulate((r["bytes_up"] + r["bytes_down"]) / devices / 1e6 for r in run["rounds"]))


def _seconds(run: Mapping[str, Any]) -> list[float]:
    """Of the fleet's clock at the end of each round; empty without a fleet."""
    if all(r.get("virtual_s") is None for r in run["rounds"]):
        return []
    return list(accumulate(r.get("virtual_s") or 0.0 for r in run["rounds"]))


def _lines(runs: Sequence[Mapping[str, Any]], names: Sequence[str], metric: str) -> list[Series]:
    """What is the same for all runs is drawn once, in grey; else a line has its run's colour."""
    if len(runs) == 1:
        return [Series(LINE_NAMES[kind], points, shape) for kind, (points, shape) in _lines_of(runs[0], metric).items()]
    found = [_lines_of(run, metric) for run in runs]
    made = []
    for kind, told in LINE_NAMES.items():
        theirs = [lines.get(kind) for lines in found]
        if None not in theirs and all(line == theirs[0] for line in theirs):
            theirs, colours, whose = theirs[:1], [GREY], [told]
        else:
            colours, whose = list(range(len(runs))), [f"{name}: {told}" for name in names]
        for line, colour, name in zip(theirs, colours, whose, strict=True):
            if line is not None:
                made.append(Series(name, *line, colour=colour, dash=DASH_OF[kind]))
    return made


def _lines_of(run: Mapping[str, Any], metric: str) -> dict[str, tuple[list[tuple[float, float]], str]]:
    """Kind of line -> points and shape."""
    found: dict[str, tuple[list[tuple[float, float]], str]] = {}
    rounds = run["rounds"][-1]["round"]
    for kind, line in (run.get("lines") or {}).items():
        if kind not in LINE_NAMES or line[metric] is None:
            continue
        curve = sorted((int(epoch), value) for epoch, value in line.get("curve", {}).items())
        if metric == "accuracy" and len(curve) > 1:
            # An epoch there is set beside the rounds that go through as much data.
            scale = rounds / (line["epochs"] or 1)
            found[kind] = [(epoch * scale, value) for epoch, value in curve], "line"
        else:
            found[kind] = [(0, line[metric]), (rounds, line[metric])], "level"
    return found
