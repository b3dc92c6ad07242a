"""A fleet by its name: a preset, a model in a TOML file, or a trace in a CSV file."""

from __future__ import annotations

import math
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from pocketfed.simulations.fleet import WEEK_S, Dropout, Fleet, FleetDevice, FleetError, Rules, Visit
from pocketfed.simulations.fleet_model import FleetModel, Tier
from pocketfed.simulations.traces import TracedDevice, read_trace

PRESETS = Path(__file__).with_name("fleets")
SETTINGS = ("availability", "dropout", "tiers", "time_zones", "trace")  # beside those of Rules
T = TypeVar("T")


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def load_fleet(which: str, count: int, seed: int) -> Fleet:
    """`count` devices of a preset, of a model in a TOML file, or of a trace in a CSV file (its first ones).

    Raises:
        FleetError: there is no such fleet, it is not one, or it has fewer devices.
    """
    path = PRESETS / f"{which}.toml" if which in preset_names() else Path(which)
    if not path.is_file():
        raise FleetError(f"there is no fleet {which!r}; give {', '.join(preset_names())}, or a TOML or CSV file")
    if path.suffix.lower() == ".csv":
        return _of_trace(path, Rules(), count)
    if path.suffix.lower() != ".toml":
        raise FleetError(f"{path} is neither .toml (a model) nor .csv (a trace); rename it")
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise FleetError(f"{path} cannot be read as TOML ({error}); see docs/simulations.md for an example") from None
    try:
        return _of_settings(path, settings, count, seed)
    except FleetError as error:
        raise FleetError(f"{path}: {error}") from None


def _of_settings(path: Path, settings: dict[str, Any], count: int, seed: int) -> Fleet:
    known = sorted({*SETTINGS, *(f.name for f in fields(Rules))})
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise FleetError(f"there is no setting {unknown[0]}; the settings are {', '.join(known)}")
    dropout = _made(Dropout, "dropout.", settings.pop("dropout", {}))
    ruled = {f.name: settings.pop(f.name) for f in fields(Rules) if f.name in settings}
    rules = _made(Rules, "", {**ruled, "dropout": dropout})
    if "trace" in settings:
        trace = settings.pop("trace")
        if settings or not isinstance(trace, str):
            raise FleetError(f"a trace has its devices itself; leave out {', '.join(sorted(settings)) or 'the list'}")
        return _of_trace(path.parent / trace, rules, count)
    tiers = settings.pop("tiers", [{}])
    if not isinstance(tiers, list):
        raise FleetError("tiers are tables of their own; write [[tiers]] before each")
    model = {"rules": rules, "tiers": tuple(_made(Tier, "tiers.", tier) for tier in tiers)}
    for name in ("availability", "time_zones"):
        if name in settings:
            model[name] = _numbers(name, settings.pop(name))
    drawn = _made(FleetModel, "", {**settings, **model})
    return Fleet(path.stem, tuple(drawn.draw(count, seed)), rules)


def _of_trace(path: Path, rules: Rules, count: int) -> Fleet:
    traced = read_trace(path)
    if len(traced) < count:
        raise FleetError(
            f"{path} has {len(traced)} devices for {count}; give at most {len(traced)} devices or a longer trace"
        )
    weeks = math.ceil(max(row.end for device in traced for row in device.rows) / WEEK_S)
    return Fleet(path.stem, tuple(_traced(path, d, rules, weeks * WEEK_S) for d in traced[:count]), rules)


def _traced(path: Path, device: TracedDevice, rules: Rules, period: float) -> FleetDevice:
    visits = [Visit(row.begin, row.end, row.charging, row.metered, row.battery) for row in device.rows]
    allowed = tuple(visit for visit in visits if rules.allow(visit))
    if not allowed:
        raise FleetError(
            f"{path}: device {device.name!r} is never there while it may work (charging, battery and metered links are "
            "looked at); leave it out or change the rules"
        )
    return FleetDevice(
        device.tier, device.ms_per_token, device.down_bps, device.up_bps, allowed, period, device.battery_wh, device.watts,
    )  # fmt: skip


def _made(kind: type[T], where: str, values: Any) -> T:
    """A dataclass of a TOML table.

    Raises:
        FleetError: an unknown setting, or one of the wrong type.
    """
    if not isinstance(values, dict):
        raise FleetError(f"{where.rstrip('.')} is {values!r}; it is a table")
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    for name, value in values.items():
        if name not in known:
            raise FleetError(f"there is no setting {where}{name}; the settings are {', '.join(sorted(known))}")
        wanted = str(known[name].type)
        right = {"float": _is_number(value), "bool": isinstance(value, bool), "str": isinstance(value, str)}
        if not right.get(wanted, True):
            raise FleetError(f"{where}{name} is {value!r}; it is a {wanted}")
    return kind(**values)


def _numbers(name: str, values: Any) -> tuple[float, ...]:
    if not isinstance(values, list) or not all(map(_is_number, values)):
        raise FleetError(f"{name} is {str(values)[:80]}; it is a list of numbers")
    return tuple(map(float, values))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
