"""What a run costs its devices: bytes, seconds of training, and an estimate of the energy."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pocketfed.coordinator.progress import RoundResult
from pocketfed.coordinator.spending import Spent

MEGABYTE = 1e6


class CostError(ValueError):
    """A model of costs that makes no sense."""


@dataclass(frozen=True)
class EnergyModel:
    """Energy = watts x seconds of training + joules per MB x MB, each way. MB are 10^6 bytes.

    joules_per_mb: transfers over Wi-Fi by Huang et al. 2012 (MobiSys, "A close examination of performance and power
    characteristics of 4G LTE networks", table of power models): 283.17 mW a Mbit/s up, 137.01 down, 132.86 mW while the radio
    is on; at 20 Mbit/s that is 8 x (0.28317 + 0.13286 / 20) = 2.3 J a MB up and 1.1 down. Over LTE (438.39, 51.97 and 1288.04
    mW, at 6 Mbit/s up and 13 down) it would be 5.2 and 1.2.
    watts: an assumption, two large cores of a phone at work. The seconds are those of the machine that simulates, or of the fleet's
    model where there is one. Phones differ by more than a factor of three: measure one of yours and set it.

    Raises:
        CostError: a number that is negative or not finite.
    """

    watts: float = 3.0
    joules_per_mb_up: float = 2.3
    joules_per_mb_down: float = 1.1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < math.inf:
                raise CostError(f"energy.{field.name} is {value!r}; it must be a finite number of at least 0")

    def joules(self, seconds: float, bytes_up: float, bytes_down: float) -> float:
        """
        >>> EnergyModel().joules(seconds=10, bytes_up=1e6, bytes_down=2e6)
        34.5
        """
        sent = self.joules_per_mb_up * bytes_up + self.joules_per_mb_down * bytes_down
        return self.watts * seconds + sent / MEGABYTE


@dataclass(frozen=True)
class Costs:
    """Of a whole run. Figures of a device are means over all devices, also those that were never asked.

    round_bytes_up, round_bytes_down: of a device in a round that it took part in, the artifact's download left out.
    seconds_are: "measured" here, or the "fleet" model's. wall_s: of this machine. virtual_s: of the fleet's clock.
    """

    devices: int
    bytes_up: float
    bytes_down: float
    most_bytes_up: float
    most_bytes_down: float
    round_bytes_up: float
    round_bytes_down: float
    device_seconds: float
    joules: float
    total_device_seconds: float
    total_joules: float
    seconds_are: str
    wall_s: float
    virtual_s: float | None
    energy: EnergyModel

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def cost_of(
    rounds: Sequence[RoundResult],
    spent: Mapping[str, Spent],
    devices: int,
    energy: EnergyModel,
    training_s: float | None = None,
    virtual_s: float | None = None,
    wall_s: float | None = None,
) -> Costs:
    """Bytes as the rounds have them (their details may be forgotten), seconds as the devices told.

    Args:
        devices: of the fleet; those that took no part have spent nothing.
        training_s, virtual_s: what a fleet's model says in the place of what devices told, and its clock.
        wall_s: of this machine, where the rounds' own seconds are a fleet's.
    """
    up, down = sum(r.bytes_up for r in rounds), sum(r.bytes_down for r in rounds)
    seconds = sum(s.seconds for s in spent.values()) if training_s is None else training_s
    joules = energy.joules(seconds, up, down)
    taken = max(1, sum(s.rounds for s in spent.values()))
    return Costs(
        devices=devices,
        bytes_up=up / devices,
        bytes_down=down / devices,
        most_bytes_up=max([s.bytes_up for s in spent.values()], default=0),
        most_bytes_down=max([s.bytes_down for s in spent.values()], default=0),
        round_bytes_up=sum(s.bytes_up for s in spent.values()) / taken,
        round_bytes_down=sum(s.parameters_down for s in spent.values()) / taken,
        device_seconds=seconds / devices,
        joules=joules / devices,
        total_device_seconds=seconds,
        total_joules=joules,
        seconds_are="measured" if training_s is None else "fleet",
        wall_s=sum(r.seconds for r in rounds) if wall_s is None else wall_s,
        virtual_s=virtual_s,
        energy=energy,
    )
