"""What devices measured on their own examples, as quantiles over enough of them that none can be told apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pocketfed.coordinator.store import Assignment, Baseline, Device, Round, Update

MIN_COHORT = 5  # devices; of fewer no cohort's numbers are shown
NEWEST = 30  # rounds that are looked at
MOST_VALUES = 50_000


@dataclass(frozen=True)
class Spread:
    """A cohort's devices in one round. worst: the mean of the worst tenth of them, at least of one."""

    cohort: str
    round: int
    devices: int
    p10: float
    p50: float
    p90: float
    worst: float


def spreads(
    session: Session, run_id: int, name: str = "accuracy", floor: int = MIN_COHORT, most: int = MOST_VALUES
) -> list[Spread]:
    """The devices' own measurements by cohort ("" for devices without one) and round, in the NEWEST rounds.

    Where a run has asked for no evaluation on the devices there is none. Cohorts of fewer than `floor` are left out,
    and of more than `most` values the oldest round, which is not there as a whole.
    """
    last = session.scalar(sa.select(sa.func.max(Round.number)).where(Round.run_id == run_id)) or 0
    value: sa.ColumnElement[float] = Update.metrics[name].as_float()
    if session.get_bind().dialect.name == "sqlite":  # JSON that holds a NaN is none to it, and would end the query
        value = sa.case((sa.func.json_valid(Update.metrics) == 1, value), else_=None)
    query = (
        sa.select(Device.cohort, Assignment.round, value.label("value"))
        .select_from(Assignment)
        .join(Update, Update.assignment_id == Assignment.id)
        .join(Device, Device.id == Assignment.device_id)
        .where(Assignment.run_id == run_id, Assignment.round > last - NEWEST, Assignment.kind == "evaluate")
        .where(Assignment.status == "aggregated", value.is_not(None))
        .order_by(Assignment.round.desc())
        .limit(most)
    )
    rows = session.execute(query).all()
    if len(rows) == most and rows[0].round > rows[-1].round:
        rows = [row for row in rows if row.round > rows[-1].round]
    groups = dict[tuple[str, int], list[float]]()
    for row in rows:
        if not math.isfinite(row.value):
            continue
        groups.setdefault((row.cohort or "", row.round), []).append(float(row.value))
    return [
        spread(cohort, number, values, higher_is_better=name == "accuracy")
        for (cohort, number), values in sorted(groups.items())
        if len(values) >= floor
    ]


def baselines(session: Session, run_ids: Sequence[int]) -> dict[tuple[int, str], dict[str, float]]:
    """(run, kind) -> metric -> value, of what runs are compared with: central, local, previous."""
    query = sa.select(Baseline).where(Baseline.run_id.in_(run_ids)).order_by(Baseline.run_id, Baseline.kind)
    found: dict[tuple[int, str], dict[str, float]] = {}
    for row in session.scalars(query.limit(1_000)):
        found.setdefault((row.run_id, row.kind), {})[row.metric] = row.value
    return found


def spread(cohort: str, number: int, values: Sequence[float], higher_is_better: bool) -> Spread:
    """
    >>> spread("pilot", 3, [0.1, 0.2, 0.3, 0.4, 0.5], higher_is_better=True)
    Spread(cohort='pilot', round=3, devices=5, p10=0.1, p50=0.3, p90=0.5, worst=0.1)
    """
    rising = sorted(values)
    tenth = max(1, round(len(rising) / 10))
    worst = rising[:tenth] if higher_is_better else rising[-tenth:]
    p10, p50, p90 = (rising[round(share * (len(rising) - 1))] for share in (0.1, 0.5, 0.9))
    return Spread(cohort, number, len(rising), p10, p50, p90, sum(worst) / tenth)
