"""What several benchmarks share: virtual devices driven by the coordinator's own rounds, and rows that a run goes on from."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from pocketfed.client_sdk.flower_app import make_client_app
from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.client_sdk.trainer import Examples
from pocketfed.coordinator.artifacts import publish_artifact, read_artifact
from pocketfed.coordinator.config import RunConfig
from pocketfed.coordinator.progress import RoundResult
from pocketfed.coordinator.rounds import create_run, drive_run
from pocketfed.coordinator.store import Metric, Store, device_named
from pocketfed.model.parameters import Vector
from pocketfed.model.rows import whole_rows
from pocketfed.simulations.grids import InProcessGrid

Row = dict[str, Any]


@dataclass(frozen=True)
class Driven:
    """theta (P,) at the end; rounds[0] is the start; contexts: by device, with what stayed on it; metrics: name -> round -> value."""

    theta: Vector
    rounds: Sequence[RoundResult]
    contexts: Mapping[str, Any]
    metrics: Mapping[str, Mapping[int, float]]

    def mean_bytes(self, way: str) -> float:
        """A device and round, `up` or `down`."""
        return statistics.mean(getattr(r, f"bytes_{way}") / r.devices for r in self.rounds if r.number > 0)


def drive(
    trainer: PlanTrainer,
    local: Mapping[str, Examples],
    config: RunConfig,
    evaluate: Callable[[Vector], Mapping[str, float]] | None = None,
    on_round: Callable[[RoundResult], None] = lambda result: None,
) -> Driven:
    """A run over these devices (name -> examples), from the artifact's start. The artifact itself is not counted as bytes."""
    contexts: dict[str, Any] = {}

    def of(context: Any) -> tuple[str, Examples]:
        name = str(context.node_config["device"])
        contexts[name] = context
        return name, local[name]

    with tempfile.TemporaryDirectory(prefix="pocketfed-") as folder:
        store = Store(str(Path(folder) / "run.db"))
        with store.write() as session:
            built = read_artifact(trainer.artifact.folder)
            publish_artifact(session, built, config.channel, next(iter(trainer.artifact.manifest.sets)))
            nodes = {device_named(session, name).id: name for name in local}
        run_id, rounds = create_run(store, config), list[RoundResult]()
        grid = InProcessGrid(store, run_id, make_client_app(lambda: trainer, of), nodes, 0)
        grid.remembers = False  # nobody goes on with it

        def remember(result: RoundResult) -> None:
            rounds.append(result)
            on_round(result)

        theta = drive_run(store, run_id, grid, config, evaluate, remember)
        metrics: dict[str, dict[int, float]] = {}
        with store.read() as session:
            for row in session.scalars(sa.select(Metric).where(Metric.run_id == run_id)):
                metrics.setdefault(row.name, {})[row.round] = row.value
        store.close()
    return Driven(theta, rounds, contexts, metrics)


def options(description: str | None) -> argparse.ArgumentParser:
    """What all of these can be asked; each adds its own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, help="print what a file of results says, and end")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--out", type=Path)
    return parser


def asked(parser: argparse.ArgumentParser, table: Callable[[list[Row]], str]) -> argparse.Namespace | None:
    """The options; None once a table that was asked for is printed."""
    arguments = parser.parse_args()
    if arguments.table is not None:
        print(table(whole_rows(arguments.table)))
        return None
    if arguments.data is None or arguments.out is None:
        parser.error("give --data and --out, or --table")
    return arguments


def spread(values: Sequence[float], digits: int = 1) -> str:
    """
    >>> spread([1, 2, 6])
    '3.0 [1.0, 6.0]'
    """
    if not values:
        return ""
    mean, low, high = (f"{value:.{digits}f}" for value in (statistics.mean(values), min(values), max(values)))
    return f"{mean} [{low}, {high}]"


def difference(rows: Sequence[Row], others: Sequence[Row], key: str) -> str:
    """Of a number in points, seed by seed: mean ± standard deviation; nothing where no seed has both.

    >>> difference([{"seed": 0, "a": 0.9}, {"seed": 1, "a": 0.8}], [{"seed": 0, "a": 0.8}, {"seed": 1, "a": 0.8}], "a")
    '+5.0 ± 7.1'
    """
    other = {r["seed"]: r[key] for r in others}
    points = [100 * (r[key] - other[r["seed"]]) for r in rows if r["seed"] in other]
    if not points:
        return ""
    return f"{statistics.mean(points):+.1f}" + (f" ± {statistics.stdev(points):.1f}" if len(points) > 1 else "")
