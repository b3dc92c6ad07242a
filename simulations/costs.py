"""What a run costs its devices: bytes, seconds of work, and an estimate of the energy."""

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
    """Without a fleet: energy = watts x seconds of training + joules per MB x MB, each way. MB are 10^6 bytes.

    joules_per_mb: transfers over Wi-Fi by Huang et al. 2012 (MobiSys, "A close examination of performance and power
    characteristics of 4G LTE networks", table of power models): 283.17 mW a Mbit/s up, 137.01 down, 132.86 mW while the radio
    is on; at 20 Mbit/s that is 8 x (0.28317 + 0.13286 / 20) = 2.3 J a MB up and 1.1 down. Over LTE (438.39, 51.97 and 1288.04
    mW, at 6 Mbit/s up and 13 down) it would be 5.2 and 1.2.
    watts: an assumption, two large cores of a phone at work. The seconds are those of the machine that simulates.
    Phones differ by more than a factor of three: measure one of yours and set it.

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
class FleetWork:
    """What a fleet's devices have done, by its model.

    training_s: the part of device_s in which nothing went up or down. joules: watts of each device x its part of device_s, which
        is what it takes from its battery. virtual_s: on the fleet's clock. watts: by tier.
    """

    training_s: float
    device_s: float
    joules: float
    virtual_s: float
    watts: Mapping[str, float]


@dataclass(frozen=True)
class Costs:
    """Of a whole run, what no round has counted included. Figures of a device are means over all devices, also those that were
    never asked.

    uncounted_bytes_up, uncounted_bytes_down: the part of bytes_up and bytes_down that is in no round: it was under way, or
        waited, when the run ended.
    round_bytes_up, round_bytes_down: of a device in a round that it took part in, the artifact's download left out.
    device_seconds: of training. worked_seconds: of download, training and upload; None where only training was measured.
    seconds_are: "measured" here, or the "fleet" model's. wall_s: of this machine. virtual_s: of the fleet's clock.
    energy: the estimate's model; None where it is the fleet's, with these tier_watts.
    """

    devices: int
    bytes_up: float
    bytes_down: float
    most_bytes_up: float
    most_bytes_down: float
    uncounted_bytes_up: float
    uncounted_bytes_down: float
    round_bytes_up: float
    round_bytes_down: float
    device_seconds: float
    worked_seconds: float | None
    joules: float
    total_device_seconds: float
    total_worked_seconds: float | None
    total_joules: float
    seconds_are: str
    wall_s: float
    virtual_s: float | None
    energy: EnergyModel | None
    tier_watts: Mapping[str, float] | None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def cost_of(
    rounds: Sequence[RoundResult],
    spent: Mapping[str, Spent],
    devices: int,
    energy: EnergyModel,
    uncounted: tuple[int, int] = (0, 0),
    fleet: FleetWork | None = None,
    wall_s: float | None = None,
) -> Costs:
    """Bytes as the rounds have them (their details may be forgotten) and the uncounted ones, seconds as the devices told.

    Args:
        devices: of the fleet; those that took no part have spent nothing.
        uncounted: bytes up and down that no round has.
        fleet: what a fleet's model says, in the place of what devices told and of `energy`.
        wall_s: of this machine, where the rounds' own seconds are a fleet's.
    """
    up, down = sum(r.bytes_up for r in rounds) + uncounted[0], sum(r.bytes_down for r in rounds) + uncounted[1]
    seconds = sum(s.seconds for s in spent.values()) if fleet is None else fleet.training_s
    joules = energy.joules(seconds, up, down) if fleet is None else fleet.joules
    taken = max(1, sum(s.rounds for s in spent.values()))
    return Costs(
        devices=devices,
        bytes_up=up / devices,
        bytes_down=down / devices,
        most_bytes_up=max([s.bytes_up for s in spent.values()], default=0),
        most_bytes_down=max([s.bytes_down for s in spent.values()], default=0),
        uncounted_bytes_up=uncounted[0] / devices,
        uncounted_bytes_down=uncounted[1] / devices,
        round_bytes_up=sum(s.bytes_up for s in spent.values()) / taken,
        round_bytes_down=sum(s.parameters_down for s in spent.values()) / taken,
        device_seconds=seconds / devices,
        worked_seconds=None if fleet is None else fleet.device_s / devices,
        joules=joules / devices,
        total_device_seconds=seconds,
        total_worked_seconds=None if fleet is None else fleet.device_s,
        total_joules=joules,
        seconds_are="measured" if fleet is None else "fleet",
        wall_s=sum(r.seconds for r in rounds) if wall_s is None else wall_s,
        virtual_s=None if fleet is None else fleet.virtual_s,
        energy=energy if fleet is None else None,
        tier_watts=None if fleet is None else fleet.watts,
    )
