"""How a release goes out in stages: whose turn it is, which SDKs may have it, and whether it is worse than what it follows."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

MIN_PERCENT = 0.01
STEPS = (1.0, 5.0, 20.0, 50.0, 100.0)  # percent; where an automatic release goes on to
WATCHED_BY = 5  # devices of a cohort that have to report before it is judged, where nothing else was said
MAX_WEIGHT = 2  # of the median number of examples: what one device's report counts at most
MAX_LOSS = 20.0  # nats an example; more counts as that
CHANCE = 3.0  # standard errors; a difference within them may be chance. More than two, since it is looked at with every report
ROUNDING = 1e-9

_VERSION = re.compile(r"([0-9]{1,6}(?:\.[0-9]{1,6}){0,4})(.{0,40})", re.DOTALL)
_LATER = re.compile(r"\+|[.-]?post", re.IGNORECASE)  # what may follow a version that is not before it


class ReleaseError(ValueError):
    """A release that cannot be made, or cannot become what is asked."""


@dataclass(frozen=True)
class Rollout:
    """How a release is to go out.

    Args:
        percent: of the channel's devices; 100: it is live at once.
        margin: of accuracy, 0 to 1; loss_margin: nats an example. Worse by more in any cohort, and it is halted.
        min_devices: of a cohort, whose reports are judged; 0: never. None: 5 if it is staged, else 0.
        min_sdk, max_sdk: which versions of the SDK may have it; empty: any. 0.3 as the latter takes in 0.3.5.
        automatic: it goes on to the next of STEPS by itself while no cohort is worse.

    Raises:
        ReleaseError: a value that cannot be.
    """

    percent: float = 100.0
    margin: float = 0.02
    loss_margin: float = 0.1
    min_devices: int | None = None
    min_sdk: str = ""
    max_sdk: str = ""
    automatic: bool = False

    def __post_init__(self) -> None:
        check_percent(self.percent)
        for name, most in (("margin", 1.0), ("loss_margin", MAX_LOSS)):
            if not 0 <= getattr(self, name) <= most:
                raise ReleaseError(f"the {name} is {getattr(self, name)!r}; give 0 to {most:g}")
        if self.watched_by == 1 or not 0 <= self.watched_by <= 10**6:
            raise ReleaseError(f"min_devices is {self.watched_by}; give 2 or more, or 0 to judge never")
        if self.automatic and not self.watched_by:
            raise ReleaseError("a release that nobody judges cannot go on by itself; set min_devices, e.g. to 5")
        for text in (self.min_sdk, self.max_sdk):
            if text and (len(text) > 20 or version_key(text) is None):
                raise ReleaseError(f"{text[:40]!r} is not a version of the SDK; give one like 0.3.0")

    @property
    def watched_by(self) -> int:
        if self.min_devices is not None:
            return self.min_devices
        return WATCHED_BY if self.percent < 100 else 0


def check_percent(percent: float) -> None:
    if not MIN_PERCENT <= percent <= 100:
        raise ReleaseError(f"{percent:g} % of the devices cannot be; give {MIN_PERCENT} to 100")


# ---- who gets it -----------------------------------------------------------------------------------------------------


def bucket(channel: str, name: str) -> float:
    """Where a device stands on its channel, 0 to below 100: it has a release whose percentage is above. Never changes.

    >>> bucket("stable", "phone") == bucket("stable", "phone") != bucket("beta", "phone")
    True
    """
    digest = hashlib.sha256(f"{channel}\0{name}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:4]) / (1 << 32) * 100


def version_key(text: str) -> tuple[tuple[int, ...], bool] | None:
    """To sort versions by; one that is still to come (0.3.0rc1, 0.3.0-beta) is before it. None for what is no version.

    >>> version_key("0.2.10") > version_key("0.2.9") > version_key("0.2.9rc1")
    True
    """
    found = _VERSION.fullmatch(text)
    if found is None:
        return None
    numbers = [int(n) for n in found[1].split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers), not found[2] or _LATER.match(found[2]) is not None


def sdk_fits(version: str, min_sdk: str, max_sdk: str) -> bool:
    """
    >>> sdk_fits("0.3.5", "0.2", "0.3"), sdk_fits("0.4.0", "0.2", "0.3"), sdk_fits("no version", "0.2", ""), sdk_fits("", "", "")
    (True, False, False, True)
    """
    if not (min_sdk or max_sdk):
        return True
    mine, least, most = version_key(version), version_key(min_sdk), version_key(max_sdk)
    if mine is None or (least is not None and mine < least):
        return False
    length = len(max_sdk.split("."))
    return most is None or _padded(mine[0], length) <= _padded(most[0], length)


def _padded(numbers: tuple[int, ...], length: int) -> tuple[int, ...]:
    return (*numbers, *[0] * length)[:length]


# ---- how it fares ----------------------------------------------------------------------------------------------------


class Report(Protocol):
    """What `store.ReleaseReport` holds."""

    examples: int
    correct: int
    correct_before: int
    loss_sum: float
    loss_sum_before: float
    went_back: bool


@dataclass(frozen=True)
class Comparison:
    """A release beside its parent on one cohort's own examples.

    verdict: few (too few devices), fine, unclear (worse by more than the margin, but that may be chance) or worse.
    went_back: devices that by themselves went back to the parent.
    """

    cohort: str
    devices: int
    examples: int
    accuracy: float
    accuracy_before: float
    loss: float
    loss_before: float
    went_back: int
    verdict: str


def compare(cohort: str, reports: Sequence[Report], margin: float, loss_margin: float, min_devices: int) -> Comparison:
    """What a cohort's reports come to. Means over devices, weighted by examples, none by more than twice the median.

    Worse is what loses more accuracy than `margin`, or gains none and more loss than `loss_margin`, by more than chance.
    One device alone cannot make that so, whatever it reports and however few the others are.
    """
    sizes = sorted(r.examples for r in reports)
    most = MAX_WEIGHT * sizes[(len(sizes) - 1) // 2]
    weights = [float(min(r.examples, most)) for r in reports]
    new = [r.correct / r.examples for r in reports]
    before = [r.correct_before / r.examples for r in reports]
    loss = [min(MAX_LOSS, r.loss_sum / r.examples) for r in reports]
    loss_before = [min(MAX_LOSS, r.loss_sum_before / r.examples) for r in reports]
    worse_by = (
        (margin, [b - n for n, b in zip(new, before, strict=True)]),
        (loss_margin, [n - b for n, b in zip(loss, loss_before, strict=True)]),
    )
    verdict = "few" if len(reports) < min_devices else judge(worse_by[0][1], weights, margin)
    if verdict == "fine" and _mean(worse_by[0][1], weights) >= 0:
        verdict = judge(worse_by[1][1], weights, loss_margin)
    return Comparison(
        cohort,
        devices=len(reports),
        examples=sum(sizes),
        accuracy=_mean(new, weights),
        accuracy_before=_mean(before, weights),
        loss=_mean(loss, weights),
        loss_before=_mean(loss_before, weights),
        went_back=sum(r.went_back for r in reports),
        verdict=verdict,
    )


def judge(worse_by: Sequence[float], weights: Sequence[float], margin: float) -> str:
    """fine, unclear or worse: the mean of what each device lost, beside the margin and its own standard error.

    >>> judge([0.1] * 5, [1.0] * 5, 0.02), judge([1.0, 0, 0, 0, 0], [1.0] * 5, 0.02), judge([0.01] * 5, [1.0] * 5, 0.02)
    ('worse', 'unclear', 'fine')
    """
    mean, count, total = _mean(worse_by, weights), len(weights), math.fsum(weights)
    if mean <= margin + ROUNDING:
        return "fine"
    if count < 2:
        return "unclear"
    spread = math.fsum((w * (d - mean)) ** 2 for w, d in zip(weights, worse_by, strict=True))
    error = math.sqrt(spread * count / (count - 1)) / total
    return "worse" if mean > CHANCE * error + ROUNDING else "unclear"


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    return math.fsum(w * v for w, v in zip(weights, values, strict=True)) / math.fsum(weights)


def next_step(percent: float) -> float:
    """
    >>> next_step(1), next_step(10), next_step(50)
    (5.0, 20.0, 100.0)
    """
    return next((step for step in STEPS if step > percent), 100.0)
