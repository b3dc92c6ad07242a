"""What a run is configured with: one frozen dataclass, from TOML and `--set a.b=c`, checked before anything starts."""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pocketfed.coordinator.rollout import ReleaseError, Rollout
from pocketfed.model.codecs import parse_codec
from pocketfed.model.parameters import ParametersError

METRICS = ("loss", "accuracy", "steps", "seconds", "holdout_loss", "truncated", "examples", "correct", "loss_sum")
SCHEDULES = ("constant", "linear", "cosine")
MAX_S = 1e9  # 31 years: dates end in the year 9999, and JSON (PostgreSQL's) knows no infinity


class RunConfigError(ValueError):
    """A run configuration that cannot be used."""


@dataclass(frozen=True)
class LocalTraining:
    """How devices train; the fields are those of `TrainConfig` in fleet.proto (but the seed, which is the run's)."""

    epochs: int = 1
    batch_size: int = 16
    learning_rate: float = 1e-3
    optimizer: str = "adamw"
    momentum: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    proximal_mu: float = 0.0
    max_length: int = 64
    max_steps: int = 0
    schedule: str = "constant"
    warmup: float = 0.0
    label_smoothing: float = 0.0
    holdout: float = 0.0
    patience: int = 0

    def __post_init__(self) -> None:
        _check_ranges(
            self,
            "local.",
            {
                "epochs": (1, 1000),
                "batch_size": (1, 4096),
                "learning_rate": (0, 100),
                "momentum": (0, 1),
                "weight_decay": (0, 100),
                "max_grad_norm": (0, sys.float_info.max),
                "proximal_mu": (0, 1e6),
                "max_length": (3, 65536),
                "max_steps": (0, 10**9),
                "warmup": (0, 1),
                "label_smoothing": (0, 0.99),
                "holdout": (0, 0.9),
                "patience": (0, 1000),
            },
        )
        if self.optimizer not in ("adamw", "sgd"):
            raise RunConfigError(f"local.optimizer is {self.optimizer!r}; choose adamw or sgd")
        _check_schedule("local.schedule", self.schedule)
        if self.patience and not self.holdout:
            raise RunConfigError(f"local.patience is {self.patience} without local.holdout; set one, e.g. 0.1")


@dataclass(frozen=True)
class UpdateForm:
    """What may leave a device, and in which form; the fields are those of `UpdateForm` in fleet.proto."""

    codec: str = "float32"  # or float16; with error feedback: int8, topk:SHARE, ternary:SHARE
    clip_norm: float = 0.0  # the device scales its update down to this L2 norm; 0: it does not
    noise: float = 0.0  # standard deviation, in clip_norms, of Gaussian noise that the device adds
    private: Sequence[str] = ()  # parameters (names, or what stands before a dot in them) that stay on the device
    metrics: Sequence[str] = METRICS  # numbers that are sent with it, where the device has them
    frozen: Sequence[str] = ()  # parameters (names, or parts of them between dots) that are neither trained nor sent
    lora_rank: int = 0  # of LoRA's matrices only the first so many rows of A and columns of B are; 0: all

    def __post_init__(self) -> None:
        _check_ranges(self, "update.", {"clip_norm": (0, 1e18), "noise": (0, 1000), "lora_rank": (0, 1_000_000)})
        for name in ("private", "metrics", "frozen"):
            values = getattr(self, name)
            if not isinstance(values, (list, tuple)) or not all(isinstance(v, str) and v for v in values):
                raise RunConfigError(f'update.{name} is {values!r}; it must be a list of names, e.g. ["a", "b"]')
            object.__setattr__(self, name, tuple(values))
        try:
            codec = parse_codec(self.codec)
        except ParametersError as error:
            raise RunConfigError(f"update.codec: {error}") from None
        if self.noise and not self.clip_norm:
            raise RunConfigError(
                f"update.noise is {self.noise} in units of update.clip_norm, which is 0; set that, too"
            )
        if self.noise and codec.feeds_back:
            raise RunConfigError(
                f"update.noise with codec {self.codec} would pile up: error feedback carries what a round leaves out, noise "
                "included, into the next until it drowns the update; choose float32 or float16"
            )
        for name in self.metrics:
            if name not in METRICS:
                raise RunConfigError(f"update.metrics has {name!r}; devices know {', '.join(METRICS)}")

    def to_dict(self) -> dict[str, Any]:
        """With lists, as JSON has them."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    def __str__(self) -> str:
        """In words, what an operator and a user should know of it."""
        parts = [f"updates as {self.codec}"]
        parts += [f"without {', '.join(self.private)}"] if self.private else []
        parts += [f"with {', '.join(self.frozen)} left as it is"] if self.frozen else []
        parts += [f"of LoRA's first {self.lora_rank} ranks"] if self.lora_rank else []
        parts += [f"clipped to norm {self.clip_norm:g}"] if self.clip_norm else []
        parts += [f"with noise of {self.noise:g} times that norm a value"] if self.noise else []
        return f"{', '.join(parts)}; {', '.join(('number of examples', *self.metrics))}"

    @property
    def plain(self) -> bool:
        """Devices that know nothing of forms send just this."""
        return self == UpdateForm()


@dataclass(frozen=True)
class RunConfig:
    """One training of the fleet.

    Raises:
        RunConfigError: a value of the wrong type or out of its range.
    """

    name: str = "run"
    channel: str = "stable"
    rounds: int = 10
    min_devices: int = 2  # wait for so many before a round starts
    cohort: int = 0  # devices whose updates make a round; 0 for all that are there
    over_selection: float = 0.0  # ask this share more than `cohort`, and go on once `cohort` have answered
    quorum: int = 1  # updates without which a round fails
    max_attempts: int = 2  # at a round, before it has failed
    max_failed_rounds: int = 3  # in a row, before the run is given up
    mode: str = "sync"  # or fedbuff: a round is a buffer of updates that may be of earlier parameters
    buffer: int = 10  # fedbuff: updates that make a round; `cohort` is how many devices work at a time
    staleness_exponent: float = 0.5  # fedbuff: an update t rounds late counts (1 + t) to the minus this
    strategy: str = "StreamingFedAvg"
    strategy_options: Mapping[str, Any] = field(default_factory=dict)
    trainable_set: str = ""  # empty: the one of the channel's release
    seed: int = 0
    wait_s: float = 600.0  # for min_devices
    deadline_s: float = 600.0  # of a round
    lease_s: float = 30.0  # without a heartbeat for this long a device counts as gone
    offer_s: float = (
        10.0  # a device that was there takes what it is offered within so long (and within lease_s), or is gone
    )
    max_examples: int = 10_000  # the most that one device's weight can be
    max_update_norm: float = 0.0  # larger updates are quarantined; 0 for no limit
    # The next three count medians of what the run has accepted lately; 0 switches one off.
    examples_factor: float = 2.0  # larger weights are lowered to that, and weight × length to as many medians of it
    clip_factor: float = 3.0  # longer updates are scaled down to that
    refuse_factor: float = 30.0  # longer ones are quarantined
    max_offences: int = 3  # quarantined updates before the run samples a device no more; 0 for never
    evaluate_on_devices: bool = False  # ask the cohort to measure each round's result on its own examples
    test_data: str = ""  # labelled texts on the coordinator, measured after every round
    retain_updates: bool = False  # keep what devices sent in the spool once its round has committed
    retain_rounds: int = 0  # keep the details of so many rounds; 0 for all
    round_schedule: str = "constant"  # of local.learning_rate from round to round; linear, cosine: towards 0
    release: bool = True  # release the result on the channel
    rollout: float = 100.0  # percent of the devices that get it at first; 100: all, and it is judged by nobody
    rollout_margin: float = 0.02  # of accuracy; worse by more in any cohort, and it is halted
    rollout_loss_margin: float = 0.1  # nats an example, likewise, where the accuracy is no better
    rollout_devices: int = 5  # of a cohort that have to report before it is judged
    rollout_auto: bool = False  # it goes on to more devices by itself while no cohort is worse
    local: LocalTraining = field(default_factory=LocalTraining)
    update: UpdateForm = field(default_factory=UpdateForm)

    def __post_init__(self) -> None:
        _check_ranges(
            self,
            "",
            {
                "rounds": (1, 1_000_000),
                "min_devices": (1, 10**7),
                "cohort": (0, 10**7),
                "quorum": (1, 10**7),
                "over_selection": (0, 10),
                "max_attempts": (1, 1000),
                "max_failed_rounds": (1, 1000),
                "buffer": (1, 10**7),
                "staleness_exponent": (0, 100),
                "retain_rounds": (0, 10**7),
                "seed": (0, 2**63 - 1),
                "wait_s": (0, MAX_S),
                "deadline_s": (0.1, MAX_S),
                "lease_s": (0.1, 86400),
                "offer_s": (0.1, 86400),
                "max_examples": (1, 10**9),
                "max_update_norm": (0, sys.float_info.max),
                "examples_factor": (0, MAX_S),
                "clip_factor": (0, MAX_S),
                "refuse_factor": (0, MAX_S),
                "max_offences": (0, 10**9),
            },
        )
        for name in ("name", "channel"):
            if not 0 < len(getattr(self, name)) <= 100:
                raise RunConfigError(f"{name} is {getattr(self, name)[:100]!r}; it must have 1 to 100 characters")
        try:
            self.rollout_plan()
        except ReleaseError as error:
            raise RunConfigError(f"rollout: {error}") from None
        if self.cohort and self.quorum > self.cohort:
            raise RunConfigError(f"quorum {self.quorum} can never be met by a cohort of {self.cohort}; lower it")
        if self.over_selection and (not self.cohort or self.mode == "fedbuff"):
            raise RunConfigError(
                f"over_selection is {self.over_selection}, of nothing; set cohort to the updates that make a round "
                "(fedbuff needs none: it does not wait for stragglers)"
            )
        _check_schedule("round_schedule", self.round_schedule)
        if self.mode not in ("sync", "fedbuff"):
            raise RunConfigError(f"mode is {self.mode!r}; choose sync or fedbuff")
        if self.mode == "fedbuff" and max(self.buffer, self.quorum) > (self.cohort or self.min_devices):
            raise RunConfigError(
                f"a buffer of {self.buffer} with a quorum of {self.quorum} may never fill with "
                f"{self.cohort or self.min_devices} devices at work; lower them, or raise min_devices"
            )
        if self.mode == "fedbuff" and self.evaluate_on_devices:
            raise RunConfigError(
                "evaluate_on_devices waits for every device, as fedbuff does not; give test_data instead"
            )
        if 0 < self.max_update_norm < self.update.clip_norm * 1.001:
            raise RunConfigError(
                f"max_update_norm {self.max_update_norm:g} would quarantine updates that devices clip to update.clip_norm "
                f"{self.update.clip_norm:g}; set it higher, or to 0"
            )
        if self.mode == "fedbuff" and self.quorum > self.buffer:
            raise RunConfigError(f"quorum {self.quorum} can never be met by a buffer of {self.buffer}; lower it")

    def learning_rate_in(self, number: int) -> float:
        """Of round `number`, counted from 1: FedAvg on unlike devices converges only if it falls (X. Li et al. 2020, theorem 4).

        >>> run = RunConfig(rounds=4, round_schedule="linear", local=LocalTraining(learning_rate=0.8))
        >>> [round(run.learning_rate_in(number), 6) for number in (1, 2, 3, 4)]
        [0.8, 0.6, 0.4, 0.2]
        """
        done = (number - 1) / self.rounds
        left = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}
        return self.local.learning_rate * left[self.round_schedule]

    def rollout_plan(self, min_sdk: str = "", max_sdk: str = "") -> Rollout:
        """How the result is released."""
        watched_by, automatic = (self.rollout_devices, self.rollout_auto) if self.rollout < 100 else (0, False)
        return Rollout(
            self.rollout, self.rollout_margin, self.rollout_loss_margin, watched_by, min_sdk, max_sdk, automatic
        )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {
            "strategy_options": dict(self.strategy_options),
            "update": self.update.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """From nested names and values.

        Raises:
            RunConfigError: a name that does not exist, or a value that does not fit.
        """
        tables: dict[str, Any] = {}
        for name, kind in (("local", LocalTraining), ("update", UpdateForm)):
            given = values.get(name, {})
            if not isinstance(given, Mapping):
                raise RunConfigError(f"{name} is {given!r}; it must be a table")
            _check_names(kind, given, f"{name}.")
            tables[name] = kind(**given)
        rest = {k: v for k, v in values.items() if k not in tables}
        _check_names(cls, rest, "")
        return cls(**rest, **tables)


def _check_schedule(name: str, value: str) -> None:
    if value not in SCHEDULES:
        raise RunConfigError(f"{name} is {value!r}; choose constant, linear or cosine")


def _check_names(cls: type, values: Mapping[str, Any], prefix: str) -> None:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name, value in values.items():
        if name not in fields:
            near = sorted(fields, key=lambda n: -difflib.SequenceMatcher(None, name, n).ratio())[:20]
            raise RunConfigError(
                f"there is no setting {prefix}{name[:100]}; the nearest are {', '.join(prefix + n for n in near)}"
            )
        default = fields[name].default
        wanted = Mapping if name == "strategy_options" else type(default)
        if wanted is tuple:
            continue  # the table looks at its lists itself
        number = isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool)
        if not number and (not isinstance(value, wanted) or (isinstance(value, bool) and wanted is int)):
            raise RunConfigError(
                f"{prefix}{name} is {value!r}; it must be of type {getattr(wanted, '__name__', 'table')}"
            )


def _check_ranges(values: Any, prefix: str, ranges: Mapping[str, tuple[float, float]]) -> None:
    for name, (low, high) in ranges.items():
        value = getattr(values, name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
            raise RunConfigError(f"{prefix}{name} is {value!r}; it must be a number between {low:g} and {high:g}")


def load_run_config(path: Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """From a TOML file (or the defaults) and `a.b=value` overrides, whose values are read as TOML where they can be.

    Raises:
        RunConfigError: unreadable file or override, or a value that does not fit.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise RunConfigError(
                f"cannot read {path}: {getattr(error, 'strerror', None) or error}; give a TOML file"
            ) from None
        except tomllib.TOMLDecodeError as error:
            raise RunConfigError(f"{path} is not TOML: {error}") from None
    return RunConfig.from_dict(apply_overrides(values, overrides))


def apply_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`["local.epochs=2"]` laid over nested values; returns new ones."""
    merged = {k: dict(v) if isinstance(v, Mapping) else v for k, v in values.items()}
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name.strip():
            raise RunConfigError(f"{override!r} is not of the form name=value, e.g. local.epochs=2")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        if table := lay(merged, name.strip(), value):
            raise RunConfigError(f"{override!r} goes into {table}, which is not a table")
    return merged


def lay(merged: dict[str, Any], name: str, value: Any) -> str | None:
    """Put a value at its dotted name, in place. What is in its way and not a table, if there is such a thing."""
    *tables, last = name.split(".")
    place = merged
    for table in tables:
        place = place.setdefault(table, {})
        if not isinstance(place, dict):
            return table
    place[last] = value
    return None
