"""What a run is judged by: how well devices are served, what it is compared with, and what it has cost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pocketfed.client_sdk.errors import TrainingError
from pocketfed.client_sdk.outgoing import UpdateForm
from pocketfed.client_sdk.perform import split_of
from pocketfed.client_sdk.trainer import Examples, Trainer
from pocketfed.coordinator.baselines import record_baseline
from pocketfed.coordinator.config import RunConfig
from pocketfed.coordinator.progress import RoundResult
from pocketfed.coordinator.store import Store
from pocketfed.model.parameters import Vector
from pocketfed.model.tasks import Example
from pocketfed.simulations import baselines
from pocketfed.simulations.baselines import Line
from pocketfed.simulations.costs import Costs
from pocketfed.simulations.served import Spread, Yardstick, yardstick


@dataclass(frozen=True)
class Findings:
    """served: the final model on what is the devices' own. lines: of baselines.LINES, those that were asked for."""

    served: Spread | None
    lines: Mapping[str, Line] = field(default_factory=dict)
    costs: Costs | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "devices": self.served.to_dict() if self.served else None,
            "lines": {name: line.to_dict() for name, line in self.lines.items()},
            "costs": self.costs.to_dict() if self.costs else None,
        }


@dataclass(frozen=True)
class Material:
    """What the run was made of, and what is measured again with it: the same trainer, so its cache is warm.

    train, test: as read and as encoded. parts: device -> places in train that it trains on. aside: that it holds out.
    """

    trainer: Trainer
    train: tuple[Sequence[Example], Examples]
    test: tuple[Sequence[Example], Examples]
    parts: Mapping[str, Sequence[int]]
    aside: Mapping[str, Sequence[int]]
    partition: str


def find(
    material: Material,
    run: RunConfig,
    rounds: Sequence[RoundResult],
    theta: Vector,
    start: Vector,
    private_of: Callable[[str], Vector],
    costs: Costs,
    lines: Collection[str],
    kept: Path | None,
    on_step: Callable[[str], None],
) -> Findings:
    """Measure the final model, and train what it is compared with.

    Args:
        start: what the run started from: the model before.
        private_of: what a device has kept to itself, of `run.update.private`.
        lines: of baselines.LINES.
        kept: a folder where central lines are kept for other runs with the same data, model and local training.
    """
    trainer, (_, examples), (_, test) = material.trainer, material.train, material.test
    on_step("measuring what devices get")
    given = (material.train, material.test, material.parts, material.aside, material.partition)
    stick = yardstick(trainer, *given)
    split = split_of(trainer, UpdateForm(private=tuple(run.update.private)))

    def theta_of(device: str) -> Vector | None:
        mine = private_of(device)
        return split.overlay(theta, mine) if mine.size else None

    served = stick.measure(trainer, theta_of, theta) if stick else None
    found: dict[str, Line] = {}
    devices = len(material.parts)
    if "central" in lines:
        on_step("training in one place")
        found["central"] = _central(material, run, start, stick, kept)
    if "local" in lines:
        on_step("training each device alone")
        alone = {name: examples.take(part) for name, part in material.parts.items() if len(part)}
        config = baselines.training(run, devices, together=False)
        found["local"] = baselines.local(trainer, start, alone, test, config, stick)
    if "previous" in lines:
        own = stick.measure(trainer, lambda device: None, start) if stick else None
        found["previous"] = Line(rounds[0].accuracy, rounds[0].loss, own)
    return Findings(served, found, costs)


def keep_lines(store: Store, run_id: int, lines: Mapping[str, Line]) -> None:
    """Beside the run, for the dashboard."""
    with store.write() as session:
        for kind, line in lines.items():
            told: dict[str, float | None] = {"accuracy": line.accuracy, "loss": line.loss}
            if line.epochs:
                told["epochs"] = line.epochs
            if line.devices:
                told["devices"] = line.devices
            finite = {name: value for name, value in told.items() if value is not None and math.isfinite(value)}
            record_baseline(session, run_id, kind, finite)


def _central(material: Material, run: RunConfig, start: Vector, stick: Yardstick | None, kept: Path | None) -> Line:
    trainer, (_, examples), (_, test) = material.trainer, material.train, material.test
    everywhere = examples.take(sorted(place for part in material.parts.values() for place in part))
    config = baselines.training(run, len(material.parts), together=True)
    key = baselines.key_of(trainer.identity, start, (everywhere, test), config)
    try:
        line, theta = baselines.kept_central(
            kept, key, trainer.size, lambda: baselines.central(trainer, start, everywhere, test, config)
        )
    except TrainingError as error:  # a rate that many small parts bear may be too much for all data at once
        return Line(None, None, why=str(error))
    own = stick.measure(trainer, lambda device: None, theta) if stick else None
    return dataclasses.replace(line, own=own)
