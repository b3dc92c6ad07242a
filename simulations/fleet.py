"""Devices as they are: when each is there, how fast it trains and transfers, and where it is lost.

A fleet is a week (or more) of visits for every device, repeated: drawn from a model (`fleet_model.py`) or read from a trace
(`traces.py`). Times are seconds since Monday 00:00 UTC; docs/simulations.md describes it all.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

HOUR_S, WEEK_S = 3600.0, 604_800.0
PHASES = ("download", "training", "upload")
FORWARD = 1 / 3  # of a training step: the backward pass is about twice the forward one
MOST = 1e9


class FleetError(ValueError):
    """A fleet that cannot be; one sentence with the value and the remedy."""


def check_ranges(settings: Any, where: str, ranges: Mapping[str, tuple[float, float]]) -> None:
    for name, (low, high) in ranges.items():
        value = getattr(settings, name)
        if not low <= value <= high:  # also where it is no number at all
            raise FleetError(f"{where}{name} is {value:g}; it lies between {low:g} and {high:g}")


@dataclass(frozen=True)
class Visit:
    """Seconds from `begin` to `end` in which a device may work. battery: 0 to 1, when it begins; charging: it lasts."""

    begin: float
    end: float
    charging: bool = True
    metered: bool = False
    battery: float = 1.0


def join(visits: Iterable[Visit]) -> list[Visit]:
    """Visits, in order, of which those that touch and are alike are one."""
    joined: list[Visit] = []
    for visit in visits:
        if joined and joined[-1].end == visit.begin and _alike(joined[-1], visit):
            joined[-1] = replace(joined[-1], end=visit.end)
        else:
            joined.append(visit)
    return joined


def _alike(one: Visit, other: Visit) -> bool:
    """What the battery has counts off the charger only."""
    same = (one.charging, one.metered) == (other.charging, other.metered)
    return same and (one.charging or one.battery == other.battery)


@dataclass(frozen=True)
class FleetDevice:
    """visits: within [0, period), in order; only those in which the device may take part (`Rules`). One that begins where
    another ends is the same stay: the device works on, on its charger or off it.
    """

    tier: str
    ms_per_token: float
    down_bps: float
    up_bps: float
    visits: tuple[Visit, ...]
    period: float = WEEK_S
    battery_wh: float = 15.0
    watts: float = 4.0

    @cached_property
    def _laid_out(self) -> tuple[tuple[Visit, ...], list[float]]:
        """Joined, also the last of a period with the first of the next; with their beginnings."""
        joined = join(self.visits)
        first, last = joined[0], joined[-1]
        if first.begin == 0 and last.end == self.period and _alike(first, last):
            if len(joined) > 1:
                joined = [*joined[1:-1], replace(last, end=self.period + first.end)]
            elif first.charging:  # off the charger the battery is what it was again when the next period begins
                joined = [replace(first, end=math.inf)]
        return tuple(joined), [visit.begin for visit in joined]

    def visit(self, at: float) -> Visit | None:
        """The visit that covers a moment, in that moment's time."""
        found = self._before(at)
        return found if found is not None and at < found.end else None

    def next_there(self, at: float) -> float:
        """The first moment from `at` on at which the device is there."""
        if self.visit(at) is not None:
            return at
        visits, begins = self._laid_out
        lap, within = divmod(at, self.period)
        place = bisect_right(begins, within)
        if place == len(visits):
            lap, place = lap + 1, 0
        return lap * self.period + begins[place]

    def _before(self, at: float) -> Visit | None:
        """The last visit to begin at `at` or before."""
        visits, begins = self._laid_out
        if math.isinf(visits[0].end):
            return visits[0]
        lap, within = divmod(at, self.period)
        place = bisect_right(begins, within) - 1
        if place + 1 < len(begins) and lap * self.period + begins[place + 1] <= at:
            place += 1  # `at` is where that one begins, as sums of floats are rounded
        shift = (lap - (place < 0)) * self.period  # before the first: the last one of the period before
        visit = visits[place]
        return replace(visit, begin=visit.begin + shift, end=visit.end + shift)


@dataclass(frozen=True)
class Dropout:
    """Chances that a device is lost without a word: before its download, while it trains, before its upload."""

    download: float = 0.0
    training: float = 0.0
    upload: float = 0.0

    def __post_init__(self) -> None:
        check_ranges(self, "dropout.", dict.fromkeys(PHASES, (0.0, 1.0)))


@dataclass(frozen=True)
class Rules:
    """What holds for all devices. needs_charging, metered_allowed: when they take part at all; min_battery: down to where.

    away_s: a device that was lost is not there for so long.
    """

    dropout: Dropout = field(default_factory=Dropout)
    away_s: float = 600.0
    needs_charging: bool = False
    metered_allowed: bool = True
    min_battery: float = 0.2

    def __post_init__(self) -> None:
        check_ranges(self, "", {"away_s": (0.0, MOST), "min_battery": (0.0, 1.0)})

    def allow(self, visit: Visit) -> bool:
        charged = visit.charging or (not self.needs_charging and visit.battery > self.min_battery)
        return charged and (self.metered_allowed or not visit.metered)

    def work_s(self, device: FleetDevice, visit: Visit) -> float:
        """For how long a device can work in a visit before its battery is at `min_battery`."""
        if visit.charging:
            return math.inf
        return (visit.battery - self.min_battery) * device.battery_wh * HOUR_S / device.watts


@dataclass(frozen=True)
class Fleet:
    """name: the preset's or the file's."""

    name: str
    devices: tuple[FleetDevice, ...]
    rules: Rules = field(default_factory=Rules)


@dataclass(frozen=True)
class Work:
    """What an assignment asks of a device. artifact_bytes: the part of down_bytes that is the artifact."""

    down_bytes: int
    tokens: float
    up_bytes: int
    artifact_bytes: int = 0


@dataclass(frozen=True)
class Journey:
    """One device's way through an assignment: when it begins and ends, seconds; how long each phase would take.

    lost: the phase in which the device is lost, or nothing. silent: then it tells nobody. stopped: the phase in which it was
        told to stop. artifact_bytes: the first of down_bytes.
    """

    begin: float
    end: float
    seconds: Mapping[str, float]
    lost: str = ""
    silent: bool = False
    down_bytes: int = 0
    artifact_bytes: int = 0
    stopped: str = ""

    def phase(self, at: float) -> str:
        """What the device does at a moment of its way, or did last."""
        if at >= self.end:
            return self.lost or self.stopped or PHASES[-1]
        left = at - self.begin
        for name in PHASES:
            if left < self.seconds[name] or name == "upload":
                break
            left -= self.seconds[name]
        return name

    def trained(self, at: float) -> float:
        """Seconds for which it has trained by then."""
        passed = min(at, self.end) - self.begin - self.seconds["download"]
        return min(self.seconds["training"], max(0.0, passed))

    def downloaded(self, at: float) -> int:
        """Bytes that have come by then."""
        took, passed = self.seconds["download"], max(0.0, min(at, self.end) - self.begin)
        return self.down_bytes if passed >= took else int(self.down_bytes * passed / took)

    def left(self, at: float) -> Journey:
        """As it is if the device has to go then, and says so."""
        return replace(self, end=at, lost=self.phase(at), silent=False) if at < self.end else self

    def stop(self, at: float) -> Journey:
        """As it is if the device is told to stop then: whatever would have come of it has not."""
        return replace(self, end=at, lost="", silent=False, stopped=self.phase(at)) if at < self.end else self


def travel(device: FleetDevice, work: Work, begin: float, dropout: Dropout, dice: Sequence[float]) -> Journey:
    """What becomes of an assignment that a device takes at `begin`, if it does not have to go.

    dice: three uniform numbers: lost while training, where in it, lost before the upload.
    """
    seconds = {
        "download": 8 * work.down_bytes / device.down_bps,
        "training": work.tokens * device.ms_per_token / 1000,
        "upload": 8 * work.up_bytes / device.up_bps,
    }
    trained = begin + seconds["download"] + seconds["training"]
    end, lost = trained + seconds["upload"], ""
    if dice[0] < dropout.training:
        end, lost = begin + seconds["download"] + dice[1] * seconds["training"], "training"
    elif dice[2] < dropout.upload:
        end, lost = trained, "upload"
    return Journey(begin, end, seconds, lost, bool(lost), work.down_bytes, work.artifact_bytes)
