"""When a device may work: what its owner asks for, what its sensors say, and what is missing, in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from datetime import time as time_of_day

from pocketfed.client_sdk.errors import ConfigurationError

MB = 1e6


@dataclass(frozen=True)
class Readings:
    """What a device's sensors say now; None: not known here.

    battery: percent. metered: the network costs by the byte, or is a phone's. idle: nobody uses the device.
    hold: the app's own reason not to work now, in words ("the app is in the background"); empty: none.
    """

    charging: bool | None = None
    battery: float | None = None
    metered: bool | None = None
    idle: bool | None = None
    temperature_c: float | None = None
    hold: str = ""


@dataclass(frozen=True)
class Conditions:
    """What has to hold before a device trains or transfers. By default nothing has to.

    Args:
        charging: only while it is plugged in.
        battery: only above so many percent.
        unmetered: models, parameters and updates move only where the network is not metered.
        idle: only while nobody uses the device.
        max_temperature_c: only while it is no hotter.
        window: (from, to) as local "HH:MM"; over midnight where `from` is later.
        min_separation_s: between the end of a round and the next one.
        max_mb_per_day: of all that goes over the network, both ways, by the local date.
        max_disk_mb: of `home`, all in all.
        patience_s: how long a round that was broken off is kept, in case the condition comes back.
        strict: what is not known counts as not met.

    Raises:
        ConfigurationError: a value that cannot be.
    """

    charging: bool = False
    battery: float = 0.0
    unmetered: bool = False
    idle: bool = False
    max_temperature_c: float = math.inf
    window: tuple[str, str] | None = None
    min_separation_s: float = 0.0
    max_mb_per_day: float = math.inf
    max_disk_mb: float = math.inf
    patience_s: float = 60.0
    strict: bool = False

    def __post_init__(self) -> None:
        limits = {"battery": 100.0, "min_separation_s": math.inf, "max_mb_per_day": math.inf, "max_disk_mb": math.inf,
                  "max_temperature_c": math.inf, "patience_s": 3600.0}  # fmt: skip
        for name, most in limits.items():
            if not 0 <= getattr(self, name) <= most:
                raise ConfigurationError(f"{name} is {getattr(self, name)!r}; give a number from 0 to {most:g}")
        if self.window is not None:
            _window(self.window)


@dataclass(frozen=True)
class Used:
    """What the device has used up: bytes over the network today, bytes in home, seconds since its last round."""

    bytes_today: int = 0
    home_bytes: int = 0
    since_round_s: float = math.inf


@dataclass(frozen=True)
class Unmet:
    """Conditions that do not hold, name -> what is waited for, in words.

    compute: it does not train or measure. transfer: no model, parameters or update go over the network. begin: it takes on
    nothing new, but ends what it has begun.
    """

    compute: Mapping[str, str] = field(default_factory=dict)
    transfer: Mapping[str, str] = field(default_factory=dict)
    begin: Mapping[str, str] = field(default_factory=dict)

    @property
    def all(self) -> Mapping[str, str]:
        return {**self.compute, **self.transfer, **self.begin}


def unmet(asked: Conditions, now: Readings, used: Used, local: datetime) -> Unmet:
    """What is missing.

    >>> unmet(Conditions(battery=50), Readings(battery=32), Used(), datetime(2026, 1, 1)).compute
    {'battery': 'a battery of 50 % (it has 32 %)'}
    """
    compute, transfer, begin = dict[str, str](), dict[str, str](), dict[str, str]()

    def need(where: dict[str, str], name: str, holds: bool | None, words: str, not_so: str) -> None:
        """holds: None where it is not known."""
        if asked.strict if holds is None else not holds:  # an app may say 0, or numpy's False
            where[name] = f"{words} ({'not known here' if holds is None else not_so})"

    if now.hold:
        compute["app"] = transfer["app"] = now.hold
    if asked.charging:
        need(compute, "charging", now.charging, "a charger", "it is not plugged in")
    if asked.battery:
        level = now.battery
        enough = None if level is None else level >= asked.battery
        need(compute, "battery", enough, f"a battery of {asked.battery:g} %", f"it has {level or 0:g} %")
    if asked.idle:
        need(compute, "idle", now.idle, "the device to be idle", "somebody uses it")
    if asked.max_temperature_c < math.inf:
        heat = now.temperature_c
        cool = None if heat is None else heat <= asked.max_temperature_c
        need(compute, "temperature", cool, f"at most {asked.max_temperature_c:g} °C", f"it has {heat or 0:.0f} °C")
    if asked.window is not None and not _within(local.time(), *_window(asked.window)):
        compute["window"] = f"the hours from {asked.window[0]} to {asked.window[1]} (it is {local:%H:%M})"
    if asked.unmetered:
        free = None if now.metered is None else not now.metered
        need(transfer, "unmetered", free, "an unmetered network", "this one is metered")
    if used.bytes_today >= asked.max_mb_per_day * MB:
        transfer["data"] = f"tomorrow ({used.bytes_today / MB:.1f} of {asked.max_mb_per_day:g} MB were used today)"
    if used.home_bytes >= asked.max_disk_mb * MB:
        begin["disk"] = f"room in its folder ({used.home_bytes / MB:.0f} of {asked.max_disk_mb:g} MB are used)"
    if used.since_round_s < asked.min_separation_s:
        left = asked.min_separation_s - used.since_round_s
        begin["separation"] = f"{asked.min_separation_s:g} s between rounds to pass ({left:.0f} s are left)"
    return Unmet(compute, transfer, begin)


def _window(window: tuple[str, str]) -> tuple[time_of_day, time_of_day]:
    try:
        start, end = (time_of_day.fromisoformat(w) for w in window)
    except (TypeError, ValueError):
        raise ConfigurationError(f'window is {window!r}; give two local times, e.g. ("22:00", "06:00")') from None
    return start, end


def _within(moment: time_of_day, start: time_of_day, end: time_of_day) -> bool:
    if start == end:
        return True
    return start <= moment < end if start < end else moment >= start or moment < end
