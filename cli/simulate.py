"""simulate: a federated run on this machine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from pocketfed.cli.output import check_database, check_json, format_skipped, print_round, print_round_header, write_json


def simulate(
    data: Annotated[Path, typer.Option(help="Labelled texts: a file or folder, see the README.")],
    devices: Annotated[int, typer.Option(min=1, help="Virtual devices.")] = 10,
    rounds: Annotated[int, typer.Option(min=1)] = 10,
    model: Annotated[
        str, typer.Option(help="A model folder, or a preset for a student that starts untrained.")
    ] = "micro",
    partition: Annotated[str, typer.Option(help="iid, dirichlet:ALPHA or by:COLUMN.")] = "iid",
    train: Annotated[
        str,
        typer.Option(help="head, norms, lora:R, last:K or full; by default full for a preset, lora:8 for a folder."),
    ] = "",
    strategy: Annotated[str, typer.Option(help="Ours or one of Flower's, by name.")] = "StreamingFedAvg",
    cohort: Annotated[int, typer.Option(min=0, help="Devices a round; 0 for all.")] = 0,
    local_epochs: Annotated[int, typer.Option(min=1)] = 1,
    learning_rate: Annotated[float, typer.Option(min=0.0)] = 1e-3,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same result to the last bit.")] = 0,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any setting of a run: NAME=VALUE, local.NAME=VALUE, strategy_options.NAME=VALUE."),
    ] = None,
    backend: Annotated[
        str, typer.Option(help="Where devices train: in-process, batched, processes[:COUNT] or ray[:COUNT].")
    ] = "in-process",
    database: Annotated[str | None, typer.Option(help="Keep the run here, for the dashboard.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write rounds and result to this file.")] = None,
) -> None:
    """Run federated fine-tuning with virtual devices, and measure every round on the test split."""
    from pocketfed.coordinator.config import RunConfig, apply_overrides
    from pocketfed.coordinator.strategy import make_strategy
    from pocketfed.simulations.run import SimulationConfig
    from pocketfed.simulations.run import simulate as run_simulation

    check_json(json)
    values = {
        "name": f"simulate {data.name}"[:100],
        "rounds": rounds,
        "min_devices": 1,
        "cohort": cohort,
        "strategy": strategy,
        "seed": seed,
        "local": {"epochs": local_epochs, "learning_rate": learning_rate, "batch_size": batch_size},
    }
    run = RunConfig.from_dict(apply_overrides(values, set_ or []))
    make_strategy(run.strategy, run.strategy_options)
    check_database(database)
    config = SimulationConfig(
        data=data, model=model, devices=devices, partition=partition, train=train, run=run, backend=backend
    )
    header = [True]

    def show(result: object) -> None:
        if header.pop() if header else False:
            print_round_header()
        print_round(result)

    with _noted(database, run.name):
        result = run_simulation(config, database, show, lambda step: print(f"{step} ...", flush=True))
    if json is not None:
        write_json(json, result.to_dict())
    if result.skipped:
        print(format_skipped(result.skipped))
    final = result.rounds[-1]
    print(f"accuracy {final.accuracy:.4f} on {result.test_examples} test examples ({result.test_source})")
    if database:
        print(f"watch it: pocketfed dashboard --database {database}")


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
    steps: Annotated[int | None, typer.Option(min=10, help="Of distillation; by default the preset's own.")] = None,
    data: Annotated[Path | None, typer.Option(help="Labelled texts in place of the demo's own.")] = None,
) -> None:
    """The whole path once: distill, quantize, publish, four device processes over gRPC, a table of rounds."""
    from pocketfed.cli.demo import run_demo

    run_demo(folder, rounds, steps, data)
