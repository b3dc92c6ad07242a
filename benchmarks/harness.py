"""Measuring processes fairly: a fresh one for every run, variants in turn, medians with their spread.

A measured command prints one JSON object as the last line of its output. Light on purpose (numpy and nothing of ours),
so that a measured process may import it for `peak_rss_mb` and `chosen` without being measured itself.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Rows = list[dict[str, Any]]
LABELS = 7  # of made-up examples


class BenchmarkError(RuntimeError):
    """A measurement that could not be made; one sentence."""


# ---- inside a measured process -------------------------------------------------------------------------------------


def peak_rss_mb() -> float:
    """The most memory this process has held, in MB of 10^6 bytes.

    Linux: VmHWM, not ru_maxrss, which a child inherits from a larger parent. Elsewhere ru_maxrss, in KiB (macOS: bytes).
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most * (1 if os.uname().sysname == "Darwin" else 1024) / 1e6


def chosen(count: int, wanted: int, seed: int) -> list[int]:
    """Which of a data set's training examples a device holds: `wanted` of `count`, the same for every variant; 0: all.

    >>> chosen(5, 2, seed=0), len(chosen(5, 0, seed=0))
    ([2, 4], 5)
    """
    order = np.random.Generator(np.random.PCG64(seed)).permutation(count)
    return [int(i) for i in (order[:wanted] if wanted else order)]


def made_up(
    count: int, length: int, vocabulary: int, seed: int, mixed: bool = False
) -> tuple[list[list[int]], list[int]]:
    """Examples for timing where there is no data: rows of ids and labels below LABELS.

    Every row has `length` tokens; with `mixed`, from 4 to `length`, all equally likely.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    lengths = generator.integers(4, length + 1, count) if mixed else np.full(count, length)
    rows = [[int(i) for i in generator.integers(5, vocabulary, n)] for n in lengths]  # 0 to 4 are special
    return rows, [int(i) for i in generator.integers(0, LABELS, count)]


# ---- around it -----------------------------------------------------------------------------------------------------


def run_once(command: Sequence[str], threads: int = 1) -> dict[str, Any]:
    """Run a command in a fresh process and read the JSON object that it ends with.

    Raises:
        BenchmarkError: it failed, or ended with something else.
    """
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait would count as CPU time
        "TOKENIZERS_PARALLELISM": "false",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "ORT_DISABLE_TELEMETRY": "1",
    }
    done = subprocess.run(list(command), env=environment, capture_output=True, text=True, check=False)
    shown = " ".join(command)
    if done.returncode:
        why = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
        raise BenchmarkError(f"`{shown}` ended with {done.returncode}: {why}; run it alone to see all it says")
    last = (done.stdout.strip().splitlines() or [""])[-1]
    try:
        row = json.loads(last)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise BenchmarkError(f"`{shown}` ended its output with {last[:80]!r}; it has to print one JSON object last")
    return row


def interleaved(
    commands: Mapping[str, Sequence[str]],
    repeats: int,
    threads: int = 1,
    on_row: Callable[[str, dict[str, Any]], None] = lambda name, row: None,
) -> dict[str, Rows]:
    """Run the commands A B C, A B C, ..., so that what else the machine does falls on all of them alike."""
    rows: dict[str, Rows] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            rows[name].append(run_once(command, threads))
            on_row(name, rows[name][-1])
    return rows


def spread(rows: Rows, key: str) -> tuple[float, float, float] | None:
    """Median, smallest and largest of a number over the runs; None where no run has it.

    >>> spread([{"s": 3.0}, {"s": 1.0}, {"s": 2.0}], "s")
    (2.0, 1.0, 3.0)
    """
    values = [row[key] for row in rows if row.get(key) is not None]
    return (statistics.median(values), min(values), max(values)) if values else None


def ratio(rows: Rows, others: Rows, key: str) -> tuple[float, float, float]:
    """How many times as much the others need, run by run (they ran side by side): median, smallest, largest.

    >>> ratio([{"s": 1.0}, {"s": 2.0}], [{"s": 10.0}, {"s": 30.0}], "s")
    (12.5, 10.0, 15.0)
    """
    ratios = [theirs[key] / ours[key] for ours, theirs in zip(rows, others, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def table(results: Mapping[str, Rows], columns: Mapping[str, str]) -> str:
    """Markdown: a line a variant, `median [smallest, largest]` a cell; columns maps a row's key to its heading."""
    lines = ["| | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, rows in results.items():
        cells = []
        for key in columns:
            values = spread(rows, key)
            cells.append("" if values is None else "{} [{}, {}]".format(*map(_short, values)))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _short(value: float) -> str:
    """
    >>> _short(98312456), _short(12.3456), _short(0.9714)
    ('98,312,456', '12.35', '0.9714')
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
