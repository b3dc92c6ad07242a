"""A sweep: many runs from one folder, which any number of processes may work through, and a table of what came out."""

from __future__ import annotations

import hashlib
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketfed.coordinator.leadership import holding
from pocketfed.model.rows import append_row, whole_rows
from pocketfed.simulations.charts import UNITS, Series, chart, unit_of
from pocketfed.simulations.experiment import Cell, canonical, config_of, settings_of
from pocketfed.simulations.fleet_files import load_fleet
from pocketfed.simulations.prefix import PrefixCaches
from pocketfed.simulations.report import describe, quoted, write_page, write_report
from pocketfed.simulations.resuming import digest_of, digest_of_fleet, digest_of_model, forget, plain
from pocketfed.simulations.run import SimulationConfig, SimulationResult, simulate

RESULTS = "results.jsonl"
# What a table has, and how it is headed; those that no run has are left out.
COLUMNS = {
    "accuracy": "accuracy", "loss": "loss", "central": "central", "local": "local", "previous": "before",
    "devices_mean": "devices", "devices_p10": "p10", "worst_decile": "worst decile", "local_p10": "local p10",
    "bytes_up": "B up", "bytes_down": "B down", "device_seconds": "training s", "worked_seconds": "all phases s",
    "virtual_h": "fleet's",  # and a unit
}  # fmt: skip
LEGEND = {
    "central": "accuracy of training in one place",
    "local": "of each device alone, the mean",
    "before": "of the model that the run started from",
    "devices": "the final model's accuracy over devices, the mean",
    "p10": "their 10th percentile",
    "worst decile": "the mean of their worst tenth",
    "local p10": "the 10th percentile of each device alone",
    "B up": "bytes a device sends in a round that it takes part in",
    "B down": "that it is sent, the artifact left out",
    "training s": "a device's training in the whole run, the mean over all devices",
    "all phases s": "its downloads and uploads too",
    **{f"fleet's {unit.name}": "the whole run on the fleet's clock" for unit in UNITS},
}


@dataclass(frozen=True)
class Task:
    """One run of a sweep: its cell, its settings as resolved, and their digest, which names it."""

    cell: Cell
    config: SimulationConfig
    key: str


def tasks_of(cells: Sequence[Cell], data_root: Path | None = None) -> list[Task]:
    """Checked before the first begins.

    Raises:
        ExperimentError, RunConfigError, DataError, FleetError: a cell that cannot be run.
    """
    from pocketfed.model.shipped import located, starts_untrained
    from pocketfed.model.tasks import read_dataset

    digests: dict[Path, str] = {}  # of data and models
    tasks = []
    for cell in cells:
        config = config_of(cell.values, data_root)
        if config.data not in digests:
            digests[config.data] = digest_of(read_dataset(config.data))
        model = located(config.model)
        if not starts_untrained(config.model) and model not in digests:
            digests[model] = digest_of_model(model)
        # What the data, the model and the fleet are counts, not where they lie.
        made_of = settings_of(config) | {"data": digests[config.data], "name": ""}
        made_of["model"] = digests.get(model, config.model)
        if config.fleet:
            made_of["fleet"] = digest_of_fleet(load_fleet(config.fleet, config.devices, config.run.seed))
        tasks.append(Task(cell, config, hashlib.sha256(canonical(made_of).encode()).hexdigest()[:16]))
    return tasks


def run_sweep(
    folder: Path,
    tasks: Sequence[Task],
    lines: Sequence[str] = (),
    on_row: Callable[[Task, Mapping[str, Any]], None] = lambda task, row: None,
    on_begin: Callable[[Task], None] = lambda task: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> int:
    """Do what is not done yet; returns how many runs other processes are at. A run that was killed goes on.

    Args:
        folder: made where it is not there; RESULTS in it has a line a finished run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    elsewhere = 0
    with tempfile.TemporaryDirectory(prefix="pocketfed-") as scratch, closing(PrefixCaches(Path(scratch))) as caches:
        done = {row["key"] for row in read_rows(folder)}
        for task in tasks:
            if task.key in done:
                continue
            with holding(folder / f"{task.key}.lock") as mine:  # a lock ends with its process, however that ends
                if mine:
                    done = {
                        row["key"] for row in read_rows(folder)
                    }  # another may have done it before the lock was ours
                    if task.key in done:
                        continue
                else:
                    elsewhere += 1
                    continue
                on_begin(task)
                place = folder / "runs" / task.key
                place.mkdir(parents=True, exist_ok=True)
                database = place / "run.db"
                result = simulate(
                    task.config,
                    str(database),
                    should_stop=should_stop,
                    lines=lines,
                    resume="any",
                    kept=folder / "lines",
                    caches=caches,
                )
                title = ", ".join(f"{k} {v}" for k, v in task.cell.labels.items()) or task.config.run.name
                run = describe(result, settings_of(task.config), title)
                write_report(run, place, result.partition_svg)
                row = {"key": task.key, "labels": dict(task.cell.labels), **row_of(result, run)}
                append_row(folder / RESULTS, plain(row))
                forget(database)
                on_row(task, row)
    return elsewhere


def row_of(result: SimulationResult, run: Mapping[str, Any]) -> dict[str, Any]:
    """A run in one line; bytes are those of a device in a round, the artifact's download left out."""
    served, lines, costs = run.get("devices") or {}, run.get("lines") or {}, run.get("costs") or {}
    virtual = costs.get("virtual_s")
    return {
        "seed": result.seed,
        "accuracy": run["final"]["accuracy"],
        "loss": run["final"]["loss"],
        **{name: line["accuracy"] for name, line in lines.items()},
        "local_p10": ((lines.get("local") or {}).get("on_test") or {}).get("p10"),
        "devices_mean": served.get("mean"),
        "devices_p10": served.get("p10"),
        "worst_decile": served.get("worst_decile"),
        "bytes_up": costs.get("round_bytes_up", 0.0),
        "bytes_down": costs.get("round_bytes_down", 0.0),
        "device_seconds": costs.get("device_seconds"),
        "worked_seconds": costs.get("worked_seconds"),
        "virtual_h": None if virtual is None else virtual / 3600,
        "wall_s": round(costs.get("wall_s") or 0.0, 3),
        "parameters": run["model"]["trainable_parameters"],
        "parameters_sha256": run["final"]["parameters_sha256"],
        "pocketfed": run["environment"]["packages"].get("pocketfed", ""),
    }


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Finished runs; a line that a killed process left unfinished is none."""
    return [
        row
        for row in whole_rows(folder / RESULTS)
        if isinstance(row, dict) and isinstance(row.get("key"), str) and isinstance(row.get("labels"), dict)
    ]


# ---- the table ------------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and lines: `mean [smallest, largest]` over the seeds of each cell, in the order of the first seed."""
    groups: dict[tuple[tuple[str, str], ...], dict[str, Mapping[str, Any]]] = {}
    for row in rows:  # the same run twice counts once
        cell = tuple((k, str(v)) for k, v in row["labels"].items() if k != "seed")
        groups.setdefault(cell, {})[row["key"]] = row
    axes = list(dict.fromkeys(axis for cell in groups for axis, _ in cell))
    shown = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    if "accuracy" in shown:
        shown = [key for key in shown if key != "loss"]
    unit, in_hours = unit_of(3600 * max((row.get("virtual_h") or 0.0 for row in rows), default=0.0)), 3600.0
    scales = {"virtual_h": in_hours / unit.seconds}
    lines = []
    for cell, members in groups.items():
        labels = dict(cell)
        values = [[m[key] * scales.get(key, 1) for m in members.values() if m.get(key) is not None] for key in shown]
        lines.append([*(labels.get(a, "") for a in axes), str(len(members)), *map(spread, values)])
    return [*axes, "seeds", *(f"fleet's {unit.name}" if key == "virtual_h" else COLUMNS[key] for key in shown)], lines


def legend(columns: Sequence[str]) -> list[tuple[str, str]]:
    """What the columns of a table are that are not clear from their names."""
    return [(name, LEGEND[name]) for name in columns if name in LEGEND]


def spread(values: Sequence[float]) -> str:
    """
    >>> spread([0.9, 0.96, 0.93]), spread([1500]), spread([])
    ('0.9300 [0.9000, 0.9600]', '1,500', '')
    """
    if not values:
        return ""
    numbers = [_short(v) for v in (statistics.fmean(values), min(values), max(values))]
    return numbers[0] if len(set(numbers)) == 1 else f"{numbers[0]} [{numbers[1]}, {numbers[2]}]"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4f}" if abs(value) < 2 else f"{value:.3g}"


def markdown(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """The same as text; labels are quoted, the figures are ours."""
    labels = columns.index("seeds")
    told = [[*map(quoted, line[:labels]), *line[labels:]] for line in [columns, *lines]]
    told.insert(1, ["---"] * len(columns))
    return "\n".join(f"| {' | '.join(line)} |" for line in told)


def write_sweep(rows: Sequence[Mapping[str, Any]], folder: Path, title: str) -> None:
    """The table as a page, with accuracy by bytes: the last axis names the points, the one before it the series."""
    columns, lines = table(rows)
    axes = columns[: columns.index("seeds")]
    panels: dict[str, dict[str, list[tuple[float, float, str]]]] = {}
    for line in lines:
        labels = dict(zip(axes, line, strict=False))
        members = [r for r in rows if all(str(r["labels"].get(a, "")) == labels[a] for a in axes)]
        seen = [(r["bytes_up"] + r["bytes_down"], r["accuracy"]) for r in members if r.get("accuracy") is not None]
        if seen:
            panel, series = " ".join(labels[a] for a in axes[:-2]), labels[axes[-2]] if len(axes) > 1 else "runs"
            point = (statistics.fmean(b for b, _ in seen) / 1e3, statistics.fmean(a for _, a in seen))
            panels.setdefault(panel, {}).setdefault(series, []).append((*point, labels[axes[-1]] if axes else ""))
    pictures = {}
    for number, (panel, found) in enumerate(panels.items()):
        series_ = [Series(name, [p[:2] for p in ps], "marks", [p[2] for p in ps]) for name, ps in found.items()]
        name = f"Accuracy by bytes {panel}".strip()
        x = "kB up and down a device and round, the artifact left out"
        pictures[f"bytes-{number}"] = chart(name, x, "accuracy on the test", series_, log_x=True)
    meanings = [list(pair) for pair in legend(columns)]
    tables = {
        "Mean [smallest, largest] over the seeds": (columns, lines),
        "What the columns are": (["column", ""], meanings),
    }
    write_page(folder, title, pictures, tables, {})
