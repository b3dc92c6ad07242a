"""What a round has cost the devices of a fleet, and what became of its assignments."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from pocketfed.coordinator.grid import ENOUGH
from pocketfed.simulations.fleet import PHASES, FleetDevice, Journey

PRIVATE = ("training_s", "joules")  # of the run, not told of a round


def attempt_of(row_id: str) -> int:
    """See `grid.assignment_id`: run-round-attempt-device-kind."""
    return int(row_id.split("-")[2])


def book(rows: Iterable[Any], journeys: Mapping[str, Journey], profiles: Mapping[int, FleetDevice]) -> dict[str, Any]:
    """Of assignments that have ended: seconds of all phases and of training, joules, and how they ended.

    dropped: how many ended without an update, by why. fates: by kind, how many were offered, how many "began" each phase, and
    how many were lost in each, or ended for another reason.
    """
    device_s = training_s = joules = 0.0
    dropped, fates = Counter[str](), defaultdict[str, Counter[str]](Counter)
    for row in rows:
        _, _, _, node, kind = row.id.split("-")
        fate, journey = fates[kind], journeys.get(row.id)
        fate["offered"] += 1
        why = _why(row, journey) if row.status in ("failed", "expired") else ""
        if journey is not None:
            seconds = journey.end - journey.begin
            device_s += seconds
            training_s += journey.trained(journey.end)
            joules += seconds * profiles[int(node)].watts
            last = why if why in PHASES else journey.phase(journey.end)
            fate.update(f"began {phase}" for phase in PHASES[: PHASES.index(last) + 1])
        if why:
            dropped[why] += 1
            fate[why] += 1
    return {
        "device_s": round(device_s, 6),
        "training_s": round(training_s, 6),
        "joules": round(joules, 6),
        "dropped": dict(sorted(dropped.items())),
        "fates": {kind: dict(sorted(fate.items())) for kind, fate in sorted(fates.items())},
    }


def _why(row: Any, journey: Journey | None) -> str:
    """What the device was doing when it was lost; if it was not, `deadline`, `surplus` (the round had enough), or `absent` (the
    offer ended before it came).
    """
    if journey is not None and journey.lost:
        return journey.lost
    if row.status == "failed":
        return "training"  # it could not train
    if row.error == ENOUGH:
        return "surplus"
    return "absent" if journey is None and "lease" in (row.error or "") else "deadline"
