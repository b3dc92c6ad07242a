"""Reports of several runs laid over each other: what they differ in, their figures side by side, and one set of plots."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pocketfed.simulations.charts import clean
from pocketfed.simulations.plots import LINE_NAMES, plots
from pocketfed.simulations.report import ReportError, Table, figure, figures, write_page
from pocketfed.simulations.resuming import flat

MOST_NAMED, MOST_LONG = 3, 60  # settings and characters in a run's name
DATA = "data, SHA-256"


def write_comparison(runs: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """A page of what `read_run` has read.

    Raises:
        ReportError: fewer than two runs.
    """
    if len(runs) < 2:
        raise ReportError(f"{len(runs)} run cannot be compared with anything; give at least two")
    names = names_of(runs)
    tables = {
        "Over devices": _served(runs, names),
        "Final figures": figures(runs, names),
        "What differs": _differences(runs, names),
    }
    title = f"{len(runs)} runs compared"
    if len({_digest(run) for run in runs}) > 1:  # no one experiment, least of all where the path is the same
        same_path = len({str(run["config"].get("data")) for run in runs}) == 1
        title += ": the data changed between them" if same_path else ", not on the same data"
    write_page(folder, title, plots(runs, names), tables, {})


def names_of(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Titles, where no two have the same; else the settings that differ; a number where that is not enough."""
    titles = [clean(run["title"], MOST_LONG) for run in runs]
    if len(set(titles)) == len(titles):
        return titles
    differing = [name for name in _differing(runs) if name not in ("name", "data")][:MOST_NAMED]
    told = [", ".join(f"{name.rpartition('.')[2]} {_value(run, name)}" for name in differing) for run in runs]
    told = [clean(name, MOST_LONG) or title for name, title in zip(told, titles, strict=True)]
    return [f"{i} {name}" if told.count(name) > 1 else name for i, name in enumerate(told, 1)]


def _value(run: Mapping[str, Any], name: str) -> str:
    value = _settings(run).get(name)
    return f"{value:g}" if isinstance(value, float) else clean(value)


def _settings(run: Mapping[str, Any]) -> dict[str, Any]:
    return flat(run["config"])


def _differing(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    settings = [_settings(run) for run in runs]
    names = sorted({name for found in settings for name in found})
    return [name for name in names if len({json.dumps(s.get(name), default=str) for s in settings}) > 1]


def _digest(run: Mapping[str, Any]) -> str:
    return str((run.get("data") or {}).get("sha256", ""))


def _served(runs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Table:
    """How well devices are served: by each run, and by the lines beside it."""
    rows = []
    for run, name in zip(runs, names, strict=True):
        lines = run.get("lines") or {}
        found = {"federated": run.get("devices")} | {
            LINE_NAMES[k]: lines[k].get("own") for k in LINE_NAMES if k in lines
        }
        for whose, spread in found.items():
            if spread:
                rows.append([name, whose, *(figure(spread.get(key)) for key in ("mean", "p10", "worst_decile"))])
    return ["run", "model", "mean", "10th percentile", "worst decile"], rows


def _differences(runs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Table:
    settings = [_settings(run) for run in runs]
    rows = [[clean(name), *(figure(found.get(name)) for found in settings)] for name in _differing(runs)]
    if len({_digest(run) for run in runs}) > 1:
        rows.append([DATA, *(_digest(run)[:16] for run in runs)])
    return ["setting", *names], rows
