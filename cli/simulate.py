"""simulate: a federated run on this machine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pocketfed.cli.output import (
    UsageError,
    check_database,
    check_json,
    format_bytes,
    format_skipped,
    print_round,
    print_round_header,
    write_json,
)

if TYPE_CHECKING:
    from pocketfed.coordinator.progress import RoundResult
    from pocketfed.simulations.experiment import Experiment
    from pocketfed.simulations.run import SimulationResult


def simulate(
    data: Annotated[Path | None, typer.Option(help="Labelled texts: a file or folder, see the README.")] = None,
    devices: Annotated[int | None, typer.Option(min=1, help="Virtual devices; by default 10.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="By default 10.")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="A model folder, `shipped` for the package's own student (the default), or a preset that starts untrained."
        ),
    ] = None,
    partition: Annotated[
        str | None, typer.Option(help="iid (the default), dirichlet:ALPHA, quantity:ALPHA, shards:K or by:COLUMN.")
    ] = None,
    fleet: Annotated[
        str | None,
        typer.Option(help="When devices are there and how fast: a preset, a TOML model or a CSV trace; see the docs."),
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(help="head, norms, lora:R, last:K or full; by default full for a preset, lora:8 for a folder."),
    ] = None,
    strategy: Annotated[str | None, typer.Option(help="Ours or one of Flower's, by name.")] = None,
    cohort: Annotated[int | None, typer.Option(min=0, help="Devices a round; 0 for all.")] = None,
    local_epochs: Annotated[int | None, typer.Option(min=1)] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0.0)] = None,
    batch_size: Annotated[int | None, typer.Option(min=1)] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Same seed, same result to the last bit; by default 0.")
    ] = None,
    hold_out: Annotated[
        float | None, typer.Option(min=0.0, max=0.9, help="Share of its examples that a device is only measured on.")
    ] = None,
    config: Annotated[str | None, typer.Option(help="A TOML file of settings, or one of ours by its name.")] = None,
    data_root: Annotated[Path | None, typer.Option(help="Where the data that --config names lie.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any setting: NAME=VALUE, local.NAME=VALUE, strategy_options.NAME=VALUE."),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(help="Where devices train: in-process (the default), batched, processes[:COUNT] or ray[:COUNT]."),
    ] = None,
    baselines: Annotated[
        str | None, typer.Option(help="Compare with: central,local,previous, all or none; by default all in a report.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write report.html, report.md and run.json to this folder.")
    ] = None,
    log_to: Annotated[
        list[str] | None, typer.Option(help="tensorboard:DIR, mlflow:URI or wandb:PROJECT; may be given again.")
    ] = None,
    database: Annotated[
        str | None,
        typer.Option(help="Keep the run here, for the dashboard; stopped, the same command goes on with it."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that is in the database.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write rounds and result to this file.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw who holds which labels into this SVG file.")] = None,
    sweep: Annotated[
        list[str] | None, typer.Option(help="KEY=A,B,C: a run for each value; given again, for each combination.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="0,1,2: each run of a sweep with each of these seeds.")] = None,
    queue: Annotated[
        Path | None, typer.Option(help="Folder of a sweep: what is done there is not done again, by no process.")
    ] = None,
    table: Annotated[bool, typer.Option("--table", help="Only print what the queue has so far.")] = False,
    compare: Annotated[
        list[Path] | None, typer.Option(help="Reports (folders) to lay over each other in --report, in place of a run.")
    ] = None,
    more: Annotated[list[Path] | None, typer.Argument(metavar="REPORT", help="Further reports for --compare.")] = None,
) -> None:
    """Run federated fine-tuning with virtual devices, and measure every round on the test split."""
    from pocketfed.simulations.baselines import LINES, parse_lines
    from pocketfed.simulations.experiment import Experiment, axis_of, load, narrowed, put
    from pocketfed.simulations.sweep import read_rows

    if compare or more:
        _compare(compare or [], more or [], report)
        return
    if table:
        if queue is None:
            raise UsageError("--table shows a queue; give its folder with --queue")
        _show_table(read_rows(queue), report)
        return
    given = {
        "devices": devices, "rounds": rounds, "model": model, "partition": partition, "train": train, "strategy": strategy,
        "cohort": cohort, "local.epochs": local_epochs, "local.learning_rate": learning_rate, "seed": seed,
        "local.batch_size": batch_size, "hold_out": hold_out, "fleet": fleet, "backend": backend,
        "data": None if data is None else str(data),
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    check_json(json)
    experiment = load(config) if config else Experiment()
    axes = experiment.axes
    for text in [*(sweep or []), *([f"seed={seeds}"] if seeds is not None else [])]:
        axes = narrowed(axes, axis_of(text))
    experiment = Experiment(
        _with_overrides(put(experiment.values, given), set_ or []),
        {} if resume else {name: axis for name, axis in axes.items() if name not in given},
        parse_lines(baselines) if baselines is not None else experiment.baselines,
    )
    root = None if data is not None else data_root
    if queue is not None or experiment.axes:
        lines = experiment.baselines if experiment.baselines is not None else LINES
        _sweep(experiment, queue, root, lines, report, bool(log_to or database or json))
        return
    lines = experiment.baselines if experiment.baselines is not None else (LINES if report else ("previous",))
    _run(experiment, root, database, resume, lines, report, log_to or [], json, picture)


def _with_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    from pocketfed.coordinator.config import apply_overrides

    return apply_overrides(values, overrides)


def _run(
    experiment: Experiment,
    root: Path | None,
    database: str | None,
    resume: bool,
    lines: Sequence[str],
    report: Path | None,
    log_to: Sequence[str],
    json: Path | None,
    picture: Path | None,
) -> None:
    from pocketfed.coordinator.strategy import make_strategy
    from pocketfed.simulations.experiment import config_of, settings_of
    from pocketfed.simulations.report import describe, write_report
    from pocketfed.simulations.run import simulate as run_simulation
    from pocketfed.simulations.trackers import numbers_of, trackers

    values = dict(experiment.values)
    if resume and database is None:
        raise UsageError("--resume goes on with a run in a database; give it with --database")
    if resume and not values:
        values = _left_in(str(database))
    if not values.get("data"):
        raise UsageError("Missing option '--data' (or '--config'); see pocketfed simulate --help")
    settings = config_of(values, root)
    make_strategy(settings.run.strategy, settings.run.strategy_options)
    check_database(database)
    if report is not None and report.is_file():
        raise UsageError(f"--report {report} is a file; name a folder")
    header = [True]
    with trackers(log_to, settings.run.name, settings_of(settings)) as log:

        def show(result: RoundResult) -> None:
            if header.pop() if header else False:
                print_round_header()
            print_round(result)
            log(result.number, numbers_of(result))

        try:
            with _noted(database, settings.run.name):
                result = run_simulation(
                    settings,
                    database,
                    show,
                    lambda step: print(f"{step} ...", flush=True),
                    lines=lines,
                    resume="must" if resume else "unfinished",
                )
        except KeyboardInterrupt:
            if database is not None:
                print(f"left for later: pocketfed simulate --resume --database {database}", flush=True)
            raise
        log(result.rounds[-1].number, _finally(result))
    if json is not None:
        write_json(json, result.to_dict())
    if picture is not None:
        picture.write_text(result.partition_svg, encoding="utf-8")
    if report is not None:
        described = describe(result, settings_of(settings), settings.run.name)
        write_report(described, report, result.partition_svg)
    _tell(result)
    if report is not None:
        print(f"read it: {report / 'report.html'}")
    if database:
        print(f"watch it: pocketfed dashboard --database {database}")


def _left_in(database: str) -> dict[str, Any]:
    """The settings of the run that is to go on."""
    from pocketfed.coordinator.store import Store
    from pocketfed.simulations.experiment import stored_settings
    from pocketfed.simulations.resuming import left_in

    with contextlib.closing(Store(database, create=False)) as store:
        left = left_in(store)
    return stored_settings(left.config, left.simulation)


def _finally(result: SimulationResult) -> dict[str, float]:
    """What is known only at the end, by name."""
    found = result.found
    told = {f"line/{name}": line.accuracy for name, line in (found.lines if found else {}).items()}
    if found and found.served:
        told |= {f"devices/{k}": getattr(found.served, k) for k in ("mean", "p10", "worst_decile")}
    return {name: value for name, value in told.items() if value is not None}


def _tell(result: SimulationResult) -> None:
    """The result in a few lines."""
    if result.skipped:
        print(format_skipped(result.skipped))
    final, found = result.rounds[-1], result.found
    measure = f"loss {final.loss:.4f}" if final.accuracy is None else f"accuracy {final.accuracy:.4f}"
    print(f"{measure} on {result.test_examples} test examples ({result.test_source})")
    if found is None or found.costs is None:
        return
    if found.served:
        s = found.served
        spread = f"mean {s.mean:.4f}, 10th percentile {s.p10:.4f}, worst decile {s.worst_decile:.4f}"
        print(f"over {s.devices} devices, on {s.source}: {spread}")
    names = {"central": "in one place", "local": "each device alone", "previous": "before"}
    told = [f"{names[k]} {v.accuracy:.4f}" for k, v in found.lines.items() if v.accuracy is not None]
    if told:
        print("beside it: " + ", ".join(told))
    c = found.costs
    spent = f"{format_bytes(c.bytes_up)} up, {format_bytes(c.bytes_down)} down, {c.device_seconds:.1f} s of training"
    print(f"a device: {spent}, {c.joules:.1f} J (an estimate)")


def _sweep(
    experiment: Experiment, queue: Path | None, root: Path | None, lines: Sequence[str], report: Path | None, more: bool
) -> None:
    from pocketfed.coordinator.strategy import make_strategy
    from pocketfed.simulations.experiment import cells
    from pocketfed.simulations.sweep import read_rows, run_sweep, tasks_of

    if queue is None:
        raise UsageError("a sweep keeps what is done in a folder; give one with --queue")
    if more:
        raise UsageError("--database, --json and --log-to are of one run; each run of a sweep has a report in --queue")
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
    _show_table([row for row in read_rows(queue) if row["key"] in keys], report)
    if elsewhere:
        print(f"{elsewhere} runs are with other processes; --table shows them once they are done")


def _show_table(rows: Sequence[Mapping[str, Any]], report: Path | None) -> None:
    from pocketfed.simulations.sweep import markdown, table, write_sweep

    if not rows:
        print("no run is done yet")
        return
    print(markdown(*table(rows)))
    if report is not None:
        write_sweep(rows, report, "A sweep")
        print(f"read it: {report / 'report.html'}")


def _compare(first: Sequence[Path], more: Sequence[Path], report: Path | None) -> None:
    from pocketfed.simulations.report import read_run, write_comparison

    if not first:
        raise UsageError(f"got an unexpected argument {str(more[0])!r}; reports are compared with --compare")
    if report is None:
        raise UsageError("--compare writes a report; say where with --report")
    write_comparison([read_run(path) for path in (*first, *more)], report)
    print(f"read it: {report / 'report.html'}")


@contextlib.contextmanager
def _noted(database: str | None, name: str) -> Iterator[None]:
    """A simulation that is kept publishes an artifact and makes a run: that is an act like any other."""
    if database is None:
        yield
        return
    from pocketfed.coordinator.operators import local_admin, noting
    from pocketfed.coordinator.store import Store, database_url

    url = database_url(database)
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").exists():
        yield  # a mistake leaves no database behind; what went well is written into the one it made
        with contextlib.closing(Store(database)) as store, noting(store, local_admin(), "simulate", name):
            pass
        return
    with contextlib.closing(Store(database)) as store, noting(store, local_admin(), "simulate", name):
        yield


def demo(
    folder: Annotated[
        Path, typer.Option(help="For everything the demo writes; an earlier demo there is replaced.")
    ] = Path("demo"),
    rounds: Annotated[int, typer.Option(min=1)] = 12,
    distill: Annotated[
        bool, typer.Option("--distill", help="Distill and quantize a small student first, on the data's text.")
    ] = False,
    steps: Annotated[
        int | None, typer.Option(min=10, help="Of that distillation, which it asks for; by default the preset's own.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Labelled texts in place of the demo's own.")] = None,
) -> None:
    """The whole path once: a student, published; four device processes over gRPC; a table of rounds."""
    from pocketfed.cli.demo import run_demo

    run_demo(folder, rounds, distill or steps is not None, steps, data)
