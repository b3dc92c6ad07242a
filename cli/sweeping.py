"""simulate over many runs: a sweep, the table of its queue, and reports laid over each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocketfed.cli.output import UsageError

if TYPE_CHECKING:
    from pocketfed.simulations.experiment import Experiment


def sweep(
    experiment: Experiment, queue: Path | None, root: Path | None, lines: Sequence[str], report: Path | None
) -> None:
    from pocketfed.coordinator.strategy import make_strategy
    from pocketfed.simulations.experiment import cells
    from pocketfed.simulations.sweep import read_rows, run_sweep, tasks_of

    if queue is None:
        raise UsageError("a sweep keeps what is done in a folder; give one with --queue")
    tasks = tasks_of(cells(experiment), root)
    for task in tasks:
        make_strategy(task.config.run.strategy, task.config.run.strategy_options)
    done = {row["key"] for row in read_rows(queue)}
    print(f"{len(tasks)} runs, {sum(task.key in done for task in tasks)} of them done", flush=True)

    def told(task: Any, row: Mapping[str, Any]) -> None:
        measure = "" if row["accuracy"] is None else f"accuracy {row['accuracy']:.4f}, "
        labels = ", ".join(task.cell.labels.values()) or task.key
        print(f"{labels}: {measure}{row['wall_s']:.1f} s in rounds", flush=True)

    elsewhere = run_sweep(queue, tasks, lines, told)
    keys = {task.key for task in tasks}
    _print_table([row for row in read_rows(queue) if row["key"] in keys], report)
    if elsewhere:
        print(f"{elsewhere} runs are with other processes; --table shows them once they are done")


def print_queue(queue: Path | None, report: Path | None) -> None:
    """What is done so far."""
    from pocketfed.simulations.sweep import read_rows

    if queue is None:
        raise UsageError("--table shows a queue; give its folder with --queue")
    _print_table(read_rows(queue), report)


def _print_table(rows: Sequence[Mapping[str, Any]], report: Path | None) -> None:
    from pocketfed.simulations.sweep import legend, markdown, table, write_sweep

    if not rows:
        print("no run is done yet")
        return
    columns, lines = table(rows)
    print(markdown(columns, lines))
    print("; ".join(f"{name}: {meaning}" for name, meaning in legend(columns)))
    if report is not None:
        write_sweep(rows, report, "A sweep")
        print(f"read it: {report / 'report.html'}")


def compare(reports: Sequence[Path], into: Path | None) -> None:
    from pocketfed.simulations.comparison import write_comparison
    from pocketfed.simulations.report import read_run

    if into is None:
        raise UsageError("--compare writes a report; say where with --report")
    write_comparison([read_run(path) for path in reports], into)
    print(f"read it: {into / 'report.html'}")
