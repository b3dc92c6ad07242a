"""An experiment as a TOML file: a simulation's settings by name, and what of them a sweep varies."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pocketfed.coordinator.config import RunConfig, apply_overrides, lay
from pocketfed.simulations.baselines import parse_lines
from pocketfed.simulations.costs import EnergyModel
from pocketfed.simulations.resuming import plain
from pocketfed.simulations.simulation import SimulationConfig

CONFIGS = Path(__file__).with_name("configs")
MOST_CELLS = 100_000


class ExperimentError(ValueError):
    """An experiment that cannot be read."""


@dataclass(frozen=True)
class Choice:
    """One value of an axis: how it is called in tables, and the settings (dotted names) that it makes."""

    label: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Experiment:
    """values: settings, nested. axes: name -> its choices; empty where nothing is varied."""

    values: Mapping[str, Any] = field(default_factory=dict)
    axes: Mapping[str, Sequence[Choice]] = field(default_factory=dict)
    baselines: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Cell:
    """One run of a sweep. labels: axis -> what is chosen there."""

    labels: Mapping[str, str]
    values: Mapping[str, Any]


def load(name: str) -> Experiment:
    """From a TOML file, or one that comes with pocketfed, by its name.

    Raises:
        ExperimentError: not there, not TOML, or a sweep of nothing.
    """
    path = Path(name)
    if not path.exists() and (CONFIGS / f"{name}.toml").exists():
        path = CONFIGS / f"{name}.toml"
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        own = ", ".join(sorted(p.stem for p in CONFIGS.glob("*.toml")))
        why = getattr(error, "strerror", None) or error
        raise ExperimentError(f"cannot read {name} ({why}); give a TOML file, or one of {own}") from None
    except tomllib.TOMLDecodeError as error:
        raise ExperimentError(f"{path} is not TOML: {error}") from None
    sweep = document.pop("sweep", {})
    if not isinstance(sweep, dict):
        raise ExperimentError(f"sweep is {sweep!r} in {path}; it must be a table of names and lists")
    told = document.pop("baselines", None)
    lines = None if told is None else parse_lines(",".join(told) if isinstance(told, list) else str(told))
    return Experiment(document, {name: _axis(name, choices) for name, choices in sweep.items()}, lines)


def axis_of(text: str) -> tuple[str, list[Choice]]:
    """`--sweep key=a,b,c`; commas within brackets, braces and quotation marks belong to a value.

    >>> [choice.settings for choice in axis_of("partition=iid,dirichlet:0.3")[1]]
    [{'partition': 'iid'}, {'partition': 'dirichlet:0.3'}]
    """
    name, equals, values = text.partition("=")
    if not (equals and name.strip() and values.strip()):
        raise ExperimentError(f"{text!r} is not of the form key=a,b,c, e.g. partition=iid,dirichlet:0.3")
    return name.strip(), _axis(name.strip(), [_value(word) for word in _split(values)])


def _value(word: str) -> Any:
    return apply_overrides({}, [f"value={word.strip()}"])["value"]


def _split(text: str) -> list[str]:
    words, depth, quoted = [""], 0, ""
    for c in text:
        if quoted:
            quoted = "" if c == quoted else quoted
        elif c in "\"'":
            quoted = c
        else:
            depth += (c in "[{") - (c in "]}")
        if c == "," and not depth and not quoted:
            words.append("")
        else:
            words[-1] += c
    return words


def _axis(name: str, choices: Any) -> list[Choice]:
    if not isinstance(choices, list) or not choices:
        raise ExperimentError(f"sweep.{name} is {choices!r}; it must be a list of at least one value")
    made = []
    for choice in choices:
        if isinstance(choice, Mapping):  # several settings that go together
            rest = {k: v for k, v in choice.items() if k != "label"}
            made.append(Choice(str(choice.get("label", next(iter(rest.values()), ""))), rest))
        else:
            made.append(Choice(str(choice), {name: choice}))
    if len({choice.label for choice in made}) < len(made):
        raise ExperimentError(f"sweep.{name} has {', '.join(c.label for c in made)}: one of them twice; name each once")
    return made


def narrowed(axes: Mapping[str, Sequence[Choice]], wanted: tuple[str, list[Choice]]) -> dict[str, Sequence[Choice]]:
    """An axis in the place of a file's; where all that is wanted has the label of a choice there, those choices."""
    name, choices = wanted
    known = {choice.label: choice for choice in axes.get(name, ())}
    return {**axes, name: [known[c.label] for c in choices] if all(c.label in known for c in choices) else choices}


def put(values: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with dotted names laid over nested values; returns new ones.

    >>> put({"local": {"epochs": 1}}, {"local.batch_size": 8})
    {'local': {'epochs': 1, 'batch_size': 8}}
    """
    merged = {k: put(v, {}) if isinstance(v, Mapping) else v for k, v in values.items()}
    for name, value in settings.items():
        if table := lay(merged, name, value):
            raise ExperimentError(f"{name} goes into {table}, which is not a table")
    return merged


def cells(experiment: Experiment) -> list[Cell]:
    """Every choice of each axis with every one of the others; seeds change slowest: a table fills evenly.

    Raises:
        ExperimentError: too many.
    """
    names = sorted(experiment.axes, key=lambda name: name != "seed")
    count = 1
    for name in names:
        count *= len(experiment.axes[name])
    if count > MOST_CELLS:
        raise ExperimentError(f"the sweep has {count:,} runs, more than {MOST_CELLS:,}; vary less at once")
    made = []
    for choices in itertools.product(*(experiment.axes[name] for name in names)):
        values = experiment.values
        for choice in choices:
            values = put(values, choice.settings)
        made.append(Cell({n: c.label for n, c in zip(names, choices, strict=True)}, values))
    return made


# ---- settings <-> SimulationConfig ---------------------------------------------------------------------------------------


def _own() -> dict[str, dataclasses.Field[Any]]:
    return {f.name: f for f in dataclasses.fields(SimulationConfig) if f.name != "run"}


def config_of(values: Mapping[str, Any], data_root: Path | None = None) -> SimulationConfig:
    """From nested settings: SimulationConfig's and, on the same level, RunConfig's.

    Args:
        data_root: where a relative path of the data begins.

    Raises:
        ExperimentError: a name that does not exist, no data, or a value of the wrong type. RunConfigError: the run's.
    """
    own, run_names = _own(), {f.name for f in dataclasses.fields(RunConfig)}
    for name in values:
        if name not in own and name not in run_names:
            near = difflib.get_close_matches(name, [*own, *run_names], n=5, cutoff=0.3) or sorted(own)
            raise ExperimentError(f"there is no setting {name[:100]}; the nearest are {', '.join(near)}")
    if not values.get("data"):
        raise ExperimentError("there is no data; set data to a file or folder of labelled texts")
    given = {name: _checked(own[name], value) for name, value in values.items() if name in own}
    given["data"] = (data_root or Path()) / given["data"]
    run = {"min_devices": 1, "name": f"simulate {given['data'].name}"[:100]}
    if given.get("fleet"):  # a night is worth waiting for, and a cohort is a cohort
        devices, cohort = given.get("devices", SimulationConfig.devices), values.get("cohort", 0)
        run |= {
            "wait_s": 7 * 86400.0,
            "min_devices": min(devices, cohort) if isinstance(cohort, int) and cohort > 0 else 1,
        }
    return SimulationConfig(**given, run=RunConfig.from_dict(run | {k: v for k, v in values.items() if k in run_names}))


def _checked(own: dataclasses.Field[Any], value: Any) -> Any:
    if own.name == "data":
        return Path(str(value))
    if own.name == "energy":
        known = {f.name for f in dataclasses.fields(EnergyModel)}
        if not isinstance(value, Mapping):
            raise ExperimentError(f"energy is {value!r}; it must be a table, such as energy.watts = 3")
        if strange := sorted(set(value) - known):
            raise ExperimentError(f"energy has no {strange[0]!r}; it has {', '.join(sorted(known))}")
        return EnergyModel(**value)
    wanted = type(own.default)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise ExperimentError(f"{own.name} is {value!r}; it must be of type {wanted.__name__}")
    return value


def settings_of(config: SimulationConfig) -> dict[str, Any]:
    """All settings as resolved, as `config_of` takes them: what a report and a sweep keep."""
    told: dict[str, Any] = plain({name: getattr(config, name) for name in _own() if name != "energy"})
    told |= {"energy": dataclasses.asdict(config.energy)}
    told |= plain(config.run.to_dict())
    return told


def stored_settings(config: Mapping[str, Any], simulation: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a run in a database."""
    own = _own()
    return dict(config) | {k: v for k, v in simulation.items() if k in own}


def canonical(values: Any) -> str:
    return json.dumps(values, sort_keys=True, default=str)
