"""simulate: a federated run on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from pocketfed.cli.output import UsageError, check_file, check_folder

# The command is one of four things; what each of them takes, by the names of `simulate`'s parameters.
COMPARISON = frozenset({"compare", "more", "report"})
TABLE = frozenset({"table", "queue", "report"})
SETTINGS = frozenset({
    "data", "devices", "rounds", "model", "partition", "fleet", "train", "strategy", "cohort", "local_epochs", "learning_rate",
    "batch_size", "seed", "hold_out", "config", "data_root", "set_", "backend", "baselines",
})  # fmt: skip
SWEEP = SETTINGS | {"sweep", "seeds", "queue", "report"}
RUN = SETTINGS | {"report", "log_to", "database", "resume", "json", "picture"}


def simulate(
    context: typer.Context,
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
    from pocketfed.cli import simulating, sweeping
    from pocketfed.simulations.baselines import LINES, parse_lines
    from pocketfed.simulations.experiment import Experiment, axis_of, load, narrowed, put

    if more and not compare:
        raise UsageError(f"got an unexpected argument {str(more[0])!r}; reports are compared with --compare")
    check_folder("--report", report)
    if compare:
        _only(context, COMPARISON, "--compare lays reports that are there over each other, and takes --report alone")
        sweeping.compare([*compare, *(more or [])], report)
        return
    if table:
        _only(context, TABLE, "--table prints what a queue has, and takes --queue and --report alone")
        sweeping.print_queue(queue, report)
        return
    given = {
        "devices": devices, "rounds": rounds, "model": model, "partition": partition, "train": train, "strategy": strategy,
        "cohort": cohort, "local.epochs": local_epochs, "local.learning_rate": learning_rate, "seed": seed,
        "local.batch_size": batch_size, "hold_out": hold_out, "fleet": fleet, "backend": backend,
        "data": None if data is None else str(data),
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    fixed = {*given, *(text.partition("=")[0].strip() for text in set_ or [])}
    experiment = load(config) if config else Experiment()
    axes = experiment.axes
    for text in [*(sweep or []), *([f"seed={seeds}"] if seeds is not None else [])]:
        axis = axis_of(text)
        if axis[0] in fixed:
            raise UsageError(f"{axis[0]} is given and is to be varied as well; leave out one of the two")
        axes = narrowed(axes, axis)
    experiment = Experiment(
        _with_overrides(put(experiment.values, given), set_ or []),
        {} if resume else {name: axis for name, axis in axes.items() if name not in fixed},
        parse_lines(baselines) if baselines is not None else experiment.baselines,
    )
    root = None if data is not None else data_root
    if queue is not None or experiment.axes:
        _only(
            context,
            SWEEP,
            "--queue has a report of each run of a sweep, and the same command goes on with what is left",
        )
        check_folder("--queue", queue)
        lines = experiment.baselines if experiment.baselines is not None else LINES
        sweeping.sweep(experiment, queue, root, lines, report)
        return
    _only(context, RUN, "--resume goes on with one run, and a sweep with what its --queue has not done")
    check_file("--json", json)
    check_file("--picture", picture)
    lines = experiment.baselines if experiment.baselines is not None else (LINES if report else ("previous",))
    simulating.run(simulating.Asked(experiment, root, database, resume, lines, report, log_to or [], json, picture))


def _only(context: typer.Context, takes: frozenset[str], why: str) -> None:
    """What is given and would be ignored is refused.

    Raises:
        UsageError: there is such an option.
    """
    for parameter in context.command.params:
        value = context.params.get(str(parameter.name))
        is_given = not (value is None or value is False or value == [] or value == ())
        if is_given and parameter.name not in takes:
            raise UsageError(f"{why}; leave out {parameter.opts[0]}")


def _with_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    from pocketfed.coordinator.config import apply_overrides

    return apply_overrides(values, overrides)


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
