"""What a run is compared with: numbers that were measured elsewhere, kept beside the run for who looks at its curves."""

from __future__ import annotations

import math
from collections.abc import Mapping

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pocketfed.coordinator.store import Baseline, Run, printable

# trained on all data in one place; every device by itself (the mean over them); the model before the run
KINDS = ("central", "local", "previous")
METRICS = ("accuracy", "loss")  # what Learning draws; others are kept and listed


class BaselineError(ValueError):
    """A number that cannot be kept."""


def record_baseline(session: Session, run_id: int, kind: str, metrics: Mapping[str, float | None]) -> None:
    """Keep these in the place of what was known of that kind; None is no number and is left out.

    Raises:
        BaselineError: there is no such run or kind, or a number that is none.
    """
    if kind not in KINDS:
        raise BaselineError(f"there is no baseline {kind!r}; choose one of {', '.join(KINDS)}")
    if not 0 < run_id < 2**31 or session.get(Run, run_id) is None:
        raise BaselineError(f"the database holds no run {run_id}; the dashboard lists them")
    told = {printable(name, 100): value for name, value in metrics.items() if value is not None}
    for name, value in told.items():
        if not math.isfinite(value):
            raise BaselineError(f"{name} is {value}; give a finite number")
        if name == "accuracy" and not 0 <= value <= 1:
            raise BaselineError(f"accuracy is {value:g}; give a share between 0 and 1")
    session.execute(sa.delete(Baseline).where(Baseline.run_id == run_id, Baseline.kind == kind))
    session.add_all(Baseline(run_id=run_id, kind=kind, metric=name, value=float(v)) for name, v in told.items())


def baselines_of(session: Session, run_id: int) -> dict[str, dict[str, float]]:
    """Kind -> metric -> value."""
    query = sa.select(Baseline).where(Baseline.run_id == run_id).order_by(Baseline.kind, Baseline.metric)
    found: dict[str, dict[str, float]] = {}
    for row in session.scalars(query):
        found.setdefault(row.kind, {})[row.metric] = row.value
    return found
