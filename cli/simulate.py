"""simulate: a federated run on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pocketfed.cli.output import print_round, print_round_header, write_json


def simulate(
    data: Annotated[Path, typer.Option(help="Labelled texts: a file or folder, see the README.")],
    devices: Annotated[int, typer.Option(min=1, help="Virtual devices.")] = 10,
    rounds: Annotated[int, typer.Option(min=1)] = 10,
    model: Annotated[str, typer.Option(help="A model folder, or a preset for a student that starts untrained.")] = "micro",
    partition: Annotated[str, typer.Option(help="iid, dirichlet:ALPHA or by:COLUMN.")] = "iid",
    train: Annotated[str, typer.Option(help="head, norms, lora:R, last:K or full; by default full for a preset, lora:8 for a folder.")] = "",
    strategy: Annotated[str, typer.Option(help="Ours or one of Flower's, by name.")] = "StreamingFedAvg",
    cohort: Annotated[int, typer.Option(min=0, help="Devices a round; 0 for all.")] = 0,
    local_epochs: Annotated[int, typer.Option(min=1)] = 1,
    learning_rate: Annotated[float, typer.Option(min=0.0)] = 1e-3,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same result to the last bit.")] = 0,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Any setting of a run: NAME=VALUE, local.NAME=VALUE, strategy_options.NAME=VALUE.")] = None,
    database: Annotated[str | None, typer.Option(help="Keep the run here, for the dashboard.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write rounds and result to this file.")] = None,
) -> None:
    """Run federated fine-tuning with virtual devices, and measure every round on the test split."""
    from pocketfed.coordinator.config import RunConfig, apply_overrides
    from pocketfed.simulations.run import SimulationConfig
    from pocketfed.simulations.run import simulate as run_simulation

    _check_json(json)
    values = {
        "name": f"simulate {data.name}", "rounds": rounds, "min_devices": 1, "cohort": cohort, "strategy": strategy, "seed": seed,
        "local": {"epochs": local_epochs, "learning_rate": learning_rate, "batch_size": batch_size},
    }
    run = RunConfig.from_dict(apply_overrides(values, set_ or []))
    config = SimulationConfig(data=data, model=model, devices=devices, partition=partition, train=train, run=run)
    header = [True]

    def show(result: object) -> None:
        if header.pop() if header else False:
            print_round_header()
        print_round(result)

    result = run_simulation(config, database, show, lambda step: print(f"{step} ...", flush=True))
    if json is not None:
        write_json(json, result.to_dict())
    final = result.rounds[-1]
    print(f"accuracy {final.accuracy:.4f} on {result.test_examples} test examples ({result.test_source})")
    if database:
        print(f"watch it: pocketfed dashboard --database {database}")


def _check_json(path: Path | None) -> None:
    """Better now than after an hour of training."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise typer.BadParameter(f"{path} cannot be written: {'it is a folder' if path.is_dir() else f'there is no folder {path.absolute().parent}'}", param_hint="--json")
