"""Drawing a fleet from a model: tiers of devices, and the share of them that is there at each hour."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from pocketfed.simulations.fleet import HOUR_S, MOST, WEEK_S, FleetDevice, FleetError, Rules, Visit, check_ranges, join

MAX_DRAWS = 1000  # weeks, of a device that was not there in any


@dataclass(frozen=True)
class Tier:
    """A kind of device. Speeds are medians; spreads are the standard deviation of their logarithm (log-normal).

    share: of the fleet, in proportion to the other tiers'. charging, metered: shares of its visits.
    """

    name: str = "all"
    share: float = 1.0
    ms_per_token: float = 1.0
    speed_spread: float = 0.0
    download_mbps: float = 20.0
    upload_mbps: float = 5.0
    bandwidth_spread: float = 0.0
    charging: float = 1.0
    metered: float = 0.0
    battery_wh: float = 15.0
    watts: float = 4.0

    def __post_init__(self) -> None:
        positive = ("share", "ms_per_token", "download_mbps", "upload_mbps", "battery_wh", "watts")
        shares = dict.fromkeys(("charging", "metered"), (0.0, 1.0))
        spreads = dict.fromkeys(("speed_spread", "bandwidth_spread"), (0.0, 5.0))
        check_ranges(self, f"tier {self.name!r}: ", dict.fromkeys(positive, (1e-9, MOST)) | shares | spreads)


@dataclass(frozen=True)
class FleetModel:
    """What a fleet is drawn from.

    availability: the share of devices that are there, for each of 24 local hours, or of the week's 168 from Monday on.
    time_zones: hours east of UTC, for the devices in equal shares.
    """

    tiers: tuple[Tier, ...] = (Tier(),)
    availability: tuple[float, ...] = (1.0,) * 24
    time_zones: tuple[float, ...] = (0.0,)
    rules: Rules = field(default_factory=Rules)

    def __post_init__(self) -> None:
        if not self.tiers or not self.time_zones:
            raise FleetError("a fleet needs at least one tier and one time zone; leave the setting out for the default")
        if len(self.availability) not in (24, 168):
            raise FleetError(
                f"availability has {len(self.availability)} values; give 24, one for each hour, or 168 for a week's"
            )
        for name, values, low, high in (
            ("availability", self.availability, 0, 1),
            ("time_zones", self.time_zones, -24, 24),
        ):
            for value in values:
                if not low <= value <= high:
                    raise FleetError(f"{name} has {value:g}; its values lie between {low} and {high}")
        if not any(self.availability):
            raise FleetError("availability is 0 at every hour, so no device is ever there; raise it at some")
        for tier in self.tiers:
            if (self.rules.needs_charging and not tier.charging) or (
                not self.rules.metered_allowed and tier.metered == 1
            ):
                raise FleetError(
                    f"tier {tier.name!r} never charges, or is always metered, so by the fleet's rules it is never there; "
                    "change the tier, needs_charging or metered_allowed"
                )

    def draw(self, count: int, seed: int) -> list[FleetDevice]:
        """Device i is a function of the model, the seed and i."""
        shares = np.cumsum([tier.share for tier in self.tiers]) / sum(tier.share for tier in self.tiers)
        order = np.random.Generator(np.random.PCG64([seed, 0])).permutation(count)
        # Stratified: of 10 devices at 90 and 10 percent, 9 and 1, whatever the seed.
        tiers = np.searchsorted(shares, (order + 0.5) / count)
        return [self._draw_device(self.tiers[min(int(t), len(self.tiers) - 1)], i, seed) for i, t in enumerate(tiers)]

    def _draw_device(self, tier: Tier, index: int, seed: int) -> FleetDevice:
        random = np.random.Generator(np.random.PCG64([seed, 1, index]))
        slower = math.exp(tier.speed_spread * random.standard_normal())
        wider = 1e6 * math.exp(tier.bandwidth_spread * random.standard_normal())
        zone = self.time_zones[int(random.integers(len(self.time_zones)))]
        offset = (zone + random.random()) * HOUR_S  # an hour begins at another minute on every device
        for _ in range(MAX_DRAWS):  # by chance a device may never be there in its week: then it has another week
            visits = [visit for visit in self._draw_week(tier, offset, random) if self.rules.allow(visit)]
            if visits:
                break
        else:
            raise FleetError(
                f"a device of tier {tier.name!r} was not there once in {MAX_DRAWS} weeks; raise availability or charging"
            )
        return FleetDevice(
            tier.name, tier.ms_per_token * slower, tier.download_mbps * wider, tier.upload_mbps * wider,
            tuple(join(sorted(visits, key=lambda visit: visit.begin))), WEEK_S, tier.battery_wh, tier.watts,
        )  # fmt: skip

    def _draw_week(self, tier: Tier, offset: float, random: np.random.Generator) -> Iterable[Visit]:
        """One draw a day, from noon to noon: a device with a small one comes early and leaves late.

        So an hour's share of devices is as asked for, and a day's hours hang together. Whether it charges, how full its battery
        is, and what link it has are drawn for every visit, and anew at noon.
        """
        hours = np.resize(np.asarray(self.availability), 168)
        eager = np.roll(np.repeat(random.random(7), 24), 12)
        there = eager < hours  # (168,) by local hour
        noon = np.arange(168) % 24 == 12
        edges = map(int, np.flatnonzero(there & (noon | ~np.roll(there, 1))))
        blocks = [(h, h + 1 + int(np.argmax(np.roll(noon | ~there, -h - 1)))) for h in edges]
        # Where one ends and another begins it is the same number: they touch.
        spans = sorted(tuple((hour % 168 * HOUR_S - offset) % WEEK_S for hour in block) for block in blocks)
        for begin, end in spans:
            charging, metered = random.random() < tier.charging, random.random() < tier.metered
            visit = Visit(begin, end, charging, metered, 1.0 if charging else float(random.random()))
            if end <= begin:  # it goes on at the week's beginning
                if end > 0:
                    yield replace(visit, begin=0.0)
                visit = replace(visit, end=WEEK_S)
            yield visit
