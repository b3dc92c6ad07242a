"""Whether all is well with a run, in a word and a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from pocketfed.dashboard.queries.runs import RunLine

SILENT = timedelta(seconds=60)  # without any change before a lease that has ended, or a deadline, means a halt


@dataclass(frozen=True)
class Condition:
    """word: Healthy, Waiting for quorum or Halted; reason: one sentence, in words of ours and the coordinator's."""

    word: str
    tone: str  # of frame.TONES
    reason: str


def condition(
    run: RunLine,
    config: Mapping[str, Any],
    eligible: int,
    served_until: datetime | None,
    deadline: datetime | None,
    last_change: datetime | None,
    at: datetime,
) -> Condition:
    """
    Args:
        eligible: devices that ask for work. served_until: of the coordinator's lease; None: no coordinator has ever been.
        deadline: of the round under way. last_change: when anything of it last came to be something else.
    """
    silent = last_change is None or at - last_change > SILENT
    if run.status == "failed":
        return Condition("Halted", "bad", run.reason or "The run has failed; no reason was recorded.")
    if run.status == "finished":
        return Condition("Healthy", "good", run.reason or "The run has done all of its rounds.")
    if served_until is not None and served_until < at and silent:
        return Condition(
            "Halted",
            "bad",
            f"No coordinator has served this database since {served_until:%Y-%m-%d %H:%M:%S} UTC; start `pocketfed serve`.",
        )
    needed = _whole(config.get("min_devices"), 1)
    if run.status == "waiting":
        why = run.reason or "the run starts when enough devices have asked for work"
        return Condition(
            "Waiting for quorum", "wait", f"{eligible:,} of at least {needed:,} devices ask for work; {why}."
        )
    if deadline is not None and at - deadline > SILENT and silent:
        return Condition(
            "Halted",
            "bad",
            f"Round {run.current_round} was to end at {deadline:%H:%M:%S} UTC and nothing has happened since.",
        )
    if deadline is None and eligible < needed:
        return Condition("Waiting for quorum", "wait", f"{eligible:,} of at least {needed:,} devices ask for work.")
    return Condition("Healthy", "busy", run.reason or "")


def _whole(value: Any, otherwise: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else otherwise
