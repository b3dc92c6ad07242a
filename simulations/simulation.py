"""What a simulation is: how it is configured, and what it ends with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketfed.coordinator.config import RunConfig
from pocketfed.coordinator.progress import RoundResult
from pocketfed.model.parameters import Vector
from pocketfed.model.shipped import SHIPPED
from pocketfed.simulations.costs import EnergyModel
from pocketfed.simulations.findings import Findings
from pocketfed.simulations.partition_picture import draw_partition
from pocketfed.simulations.resuming import SimulationError, plain


@dataclass(frozen=True)
class SimulationConfig:
    """What to simulate.

    Args:
        model: a preset (a student that starts untrained), a model folder, or `shipped`, the package's own.
        train: the trainable set; empty: `full` for a preset, `lora:8` for a model folder.
        partition: as `partition` takes it.
        fleet: as `load_fleet` takes it; empty: all devices are always there and take no time.
        hold_out: share of its examples that each device never trains on, to be measured on.
        energy: what a second of training and a megabyte cost.
        run: rounds, cohort, strategy, local training and seed.
        backend: where devices train, one of `backends.BACKENDS`.

    Raises:
        SimulationError: hold_out is no share.
    """

    data: Path
    model: str = SHIPPED
    devices: int = 10
    partition: str = "iid"
    train: str = ""
    run: RunConfig = field(default_factory=RunConfig)
    fleet: str = ""
    hold_out: float = 0.0
    energy: EnergyModel = field(default_factory=EnergyModel)
    backend: str = "in-process"

    def __post_init__(self) -> None:
        if not 0 <= self.hold_out <= 0.9:
            raise SimulationError(f"hold_out is {self.hold_out!r}; give a share between 0 and 0.9")

    def made_of(self) -> dict[str, Any]:
        """Everything but the run's own settings, as it is stored with the run."""
        return {k: v for k, v in plain(dataclasses.asdict(self)).items() if k not in ("run", "energy", "backend")}


@dataclass(frozen=True)
class SimulationResult:
    """rounds[0] is the start. theta: (P,) the final parameters."""

    rounds: tuple[RoundResult, ...]
    theta: Vector
    model: Mapping[str, Any]
    seed: int
    test_examples: int
    test_source: str
    run_id: int
    skipped: Mapping[str, int] = field(default_factory=dict)  # rows of the data that could not be used, by reason
    virtual_s: float | None = None  # with a fleet: its time from beginning to end
    device_s: float | None = None  # with a fleet: for which devices worked, what no round has counted included
    dealt: tuple[NDArray[np.int64], Sequence[str], str] | None = None  # (devices, labels) counts, the labels, a title
    found: Findings | None = None
    data: Mapping[str, Any] = field(default_factory=dict)  # its name, digest and sizes

    @cached_property
    def partition_svg(self) -> str:
        """A picture of who holds which labels; drawn when somebody asks for it."""
        return draw_partition(*self.dealt) if self.dealt is not None else ""

    def to_dict(self) -> dict[str, Any]:
        """What `simulate --json` writes."""
        last = self.rounds[-1]
        return {
            "rounds": [r.to_dict() for r in self.rounds],
            "final": {
                "accuracy": last.accuracy,
                "loss": last.loss,
                "test_examples": self.test_examples,
                "test_source": self.test_source,
                "parameters_sha256": sha256(self.theta.tobytes()).hexdigest(),
            },
            "model": dict(self.model),
            "seed": self.seed,
            "skipped": dict(self.skipped),
            **({} if self.virtual_s is None else {"virtual_s": self.virtual_s, "device_s": self.device_s}),
            "data": dict(self.data),
            **(self.found.to_dict() if self.found else {}),
        }
