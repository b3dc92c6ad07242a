"""Reading a fleet's trace: a CSV file of when devices were there, and what they are."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pocketfed.simulations.fleet import MOST, FleetError

NEEDED = ("device", "active", "inactive")
# What a device is stands in each of its rows, or in the first; else it is this.
DEFAULTS = {"computation": 1.0, "communication": 20_000.0, "download": math.nan, "upload": math.nan,
            "battery_wh": 15.0, "watts": 4.0}  # fmt: skip
OPTIONAL = (*DEFAULTS, "tier", "charging", "metered", "battery")


@dataclass(frozen=True)
class TracedRow:
    """begin, end: seconds since the trace began."""

    begin: float
    end: float
    charging: bool
    metered: bool
    battery: float


@dataclass(frozen=True)
class TracedDevice:
    name: str
    tier: str
    ms_per_token: float
    down_bps: float
    up_bps: float
    rows: tuple[TracedRow, ...]
    battery_wh: float
    watts: float


def read_trace(path: Path) -> list[TracedDevice]:
    """The devices of a trace, in the order in which they first appear; docs/simulations.md has the columns.

    Raises:
        FleetError: the file cannot be read, has unknown columns or values, or a device is there twice at one time.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, strict=True, restkey="?", restval="")
            columns = [name.strip().lower() for name in reader.fieldnames or []]
            reader.fieldnames = columns
            lines = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FleetError(f"{path} cannot be read as CSV ({error}); save it as UTF-8 with commas") from None
    _check_columns(path, columns)
    of_device: dict[str, list[tuple[str, dict[str, str]]]] = {}
    for number, row in lines:
        where = f"{path}, line {number}"
        if "?" in row or not (row["device"] or "").strip():
            raise FleetError(f"{where} has more cells than columns, or no device; mend the line")
        of_device.setdefault(row["device"].strip(), []).append((where, row))
    if not of_device:
        raise FleetError(f"{path} has no device; give one line for each time that one is there")
    return [_device(name, rows) for name, rows in of_device.items()]


def _check_columns(path: Path, columns: list[str]) -> None:
    unknown = [name for name in columns if name not in (*NEEDED, *OPTIONAL)]
    missing = [name for name in NEEDED if name not in columns]
    if unknown or missing or len(set(columns)) < len(columns):
        what = f"has the unknown column {unknown[0]!r}" if unknown else "has a column twice"
        what = f"lacks the column {missing[0]!r}" if missing else what
        raise FleetError(f"{path} {what}; it needs {', '.join(NEEDED)} and may have {', '.join(OPTIONAL)}")


def _device(name: str, found: list[tuple[str, dict[str, str]]]) -> TracedDevice:
    rows = sorted(((_row(where, cells), where) for where, cells in found), key=lambda item: item[0].begin)
    for (before, _), (after, where) in itertools.pairwise(rows):
        if after.begin < before.end:
            raise FleetError(
                f"{where}: device {name!r} comes at {after.begin:g} s, before it has gone at {before.end:g} s; "
                "make one interval of the two"
            )
    where, first = found[0]
    values = {column: _number(where, first, column, 1e-9, MOST, default) for column, default in DEFAULTS.items()}
    for column in (*DEFAULTS, "tier"):
        other = next((w for w, cells in found if cells.get(column) not in (None, "", first.get(column))), None)
        if other is not None:
            raise FleetError(f"{other}: device {name!r} has another {column!r} than before; a device has one")
    both = values["communication"]
    down, up = (both if math.isnan(values[c]) else values[c] for c in ("download", "upload"))
    tier = (first.get("tier") or "").strip() or "trace"
    return TracedDevice(
        name, tier, values["computation"], 1000 * down, 1000 * up, tuple(row for row, _ in rows), values["battery_wh"],
        values["watts"],
    )  # fmt: skip


def _row(where: str, cells: Mapping[str, str]) -> TracedRow:
    begin = _number(where, cells, "active", 0.0, MOST)
    end = _number(where, cells, "inactive", 0.0, MOST)
    if end <= begin:
        raise FleetError(f"{where}: it goes at {end:g} s, and comes at {begin:g} s; an interval ends after it begins")
    charging = _number(where, cells, "charging", 0.0, 1.0, 1.0)
    metered = _number(where, cells, "metered", 0.0, 1.0, 0.0)
    return TracedRow(begin, end, charging >= 0.5, metered >= 0.5, _number(where, cells, "battery", 0.0, 1.0, 1.0))


def _number(
    where: str, cells: Mapping[str, str], column: str, low: float, high: float, default: float | None = None
) -> float:
    text = (cells.get(column) or "").strip()
    if not text and default is not None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise FleetError(f"{where}: {column} is {text!r}; it is a number between {low:g} and {high:g}")
    return value
