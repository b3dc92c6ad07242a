"""A made-up fleet in a real database, for timing the dashboard and for testing it.

    python benchmarks/fleet_database.py --devices 10000 --rounds 1000 --out fleet.db

The numbers come from a seeded generator and describe no training that ever happened.
"""

from __future__ import annotations

import argparse
import hashlib
import random
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pocketfed.coordinator.config import RunConfig
from pocketfed.coordinator.store import (
    Artifact,
    Assignment,
    Audit,
    Baseline,
    Device,
    History,
    Lease,
    Metric,
    Presence,
    Release,
    ReleaseEvent,
    ReleaseReport,
    Round,
    Run,
    Store,
    Update,
    Vitals,
    now,
    put_blob,
)

FAILURES = (
    "NOT_ELIGIBLE: charging",
    "NOT_ELIGIBLE: charging, idle",
    "the app was closed",
    "no space left for the artifact",
)
PHASES = ("downloading", "training", "training", "uploading")
NOT_FINITE = "not_finite: theta holds a value that is not finite"
NORM_LIMIT = 5.0
COHORTS = ("pilot", "staff", None)  # of enrolment keys
TIERS = ("new", "usual", "usual", "old", None)  # as apps say
SDKS = ("0.3.0", "0.3.0", "0.3.0", "0.2.1", "0.1.0")
EVALUATED = 5  # the newest rounds whose result the devices measured
BYTES_DOWN, BYTES_UP = 24_000, 25_100  # bytes of a trainable set each way
BACKBONE = 688_000


def fill(
    database: str,
    *,
    seed: int = 7,
    devices: int = 24,
    rounds: int = 12,
    planned: int = 20,
    cohort: int = 0,
    at: datetime | None = None,
) -> None:
    """Two artifacts, a finished run, and a run whose round `rounds` is under way at the time `at` (default: now)."""
    rng = random.Random(seed)
    at = at or now()
    store = Store(database)
    with store.write() as session:
        parameters = put_blob(session, rng.randbytes(BYTES_DOWN))
        versions = [_artifact(session, rng, at, name) for name in ("nano", "micro")]
        for number in range(devices):
            seen = None if number == devices - 1 else at - timedelta(seconds=rng.choice((1, 3, 8, 15, 400)))
            session.add(
                Device(
                    id=number + 1,
                    name=f"phone-{number:05d}",
                    token_hash=f"{number:064d}",
                    sdk_version=SDKS[number % len(SDKS)],
                    cohort=COHORTS[number % len(COHORTS)],
                    tier=TIERS[number % len(TIERS)],
                    present_until=None if seen is None else seen + timedelta(seconds=30),
                    examples=rng.randrange(40, 400),
                    enrolled_at=at - timedelta(days=3),
                    last_seen_at=seen,
                )
            )
        session.flush()
        cohort = min(cohort or devices, devices)
        for run_id, (name, version, goal, last) in enumerate(
            (
                ("first try, head only", versions[0], rounds, rounds),
                ("assistant intents", versions[1], planned, rounds),
            ),
            1,
        ):
            running = last < goal
            begin = at - timedelta(hours=26 if run_id == 1 else 0, seconds=30.0 * last)
            session.add(
                Run(
                    id=run_id,
                    name=name,
                    channel="stable",
                    status="running" if running else "finished",
                    reason=None,
                    config=_config(name, goal, seed, run_id, cohort),
                    artifact_version=version,
                    trainable_set="lora:8" if running else "head",
                    seed=seed,
                    rounds_planned=goal,
                    created_at=begin,
                    started_at=begin,
                    finished_at=None if running else begin + timedelta(seconds=30.0 * last),
                )
            )
            session.flush()
            for number in range(last + 1):
                _round(
                    session,
                    rng,
                    run_id,
                    number,
                    begin + timedelta(seconds=30.0 * (number - 1)),
                    cohort,
                    parameters,
                    under_way=running and number == last,
                    ceiling=0.97 if running else 0.88,
                    late=run_id == 1,
                    measured=number > last - EVALUATED,
                )
            for kind, accuracy, loss in (("central", 0.981, 0.09), ("local", 0.614, 1.31)):
                for metric, value in (("accuracy", accuracy), ("loss", loss)):
                    session.add(Baseline(run_id=run_id, kind=kind, metric=metric, value=value))
        session.add(
            Release(
                channel="stable",
                artifact_version=versions[0],
                trainable_set="head",
                parameters=parameters,
                run_id=1,
                created_at=at - timedelta(hours=25),
            )
        )
        session.add(
            Release(
                channel="stable",
                artifact_version=versions[1],
                trainable_set="lora:8",
                parameters=parameters,
                run_id=None,
                created_at=at - timedelta(hours=1),
            )
        )
        session.flush()
        _trial(session, random.Random(seed + 1), at, versions[1], parameters, devices)
        _operations(session, random.Random(seed + 2), at, devices, rounds)
    store.close()


def advance(database: str, seed: int = 0) -> int:
    """One round more of the run that is under way: the one that was under way is done. Returns the new one's number."""
    store = Store(database)
    with store.write() as session:
        last = session.scalars(sa.select(Round).where(Round.run_id == 2).order_by(Round.number.desc()).limit(1)).one()
        mine = (Assignment.run_id == 2, Assignment.round == last.number)
        waiting = (*mine, Assignment.status == "uploaded")
        session.execute(sa.update(Assignment).where(*waiting).values(status="aggregated", counted_in=last.number))
        before = session.scalar(sa.select(Round.parameters).where(Round.run_id == 2, Round.number == 0)) or ""
        cohort = session.scalar(sa.select(sa.func.count()).select_from(Assignment).where(*mine)) or 0
        last.status, last.accuracy, last.loss, last.finished_at = "finished", 0.96, 0.13, now()
        last.parameters, last.seconds = before, 29.0
        session.flush()
        rng, number = random.Random(seed + last.number), last.number + 1
        _round(
            session, rng, 2, number, now(), cohort, before, under_way=True, ceiling=0.97, late=False, measured=False
        )  # fmt: skip
    store.close()
    return number


def _config(name: str, rounds: int, seed: int, run_id: int, cohort: int) -> dict[str, Any]:
    """The first run is buffered: its updates may be of earlier rounds."""
    size = max(cohort, 1)
    if run_id == 1:
        late = {"mode": "fedbuff", "buffer": size, "min_devices": size}
        return RunConfig(name=name, rounds=rounds, seed=seed, cohort=size, **late).to_dict()  # type: ignore[arg-type]
    config = RunConfig(name=name, rounds=rounds, seed=seed, cohort=size, quorum=1, deadline_s=60.0)
    return config.to_dict() | {"evaluate_on_devices": True}


def _trial(session: Session, rng: random.Random, at: datetime, version: str, parameters: str, devices: int) -> None:
    """A third release that a fifth of the fleet has, with what its devices say of it."""
    trial = Release(channel="stable", artifact_version=version, trainable_set="lora:8", parameters=parameters, run_id=2)
    trial.created_at, trial.state, trial.percent, trial.parent_id = at - timedelta(minutes=20), "staged", 20.0, 2
    trial.margin, trial.loss_margin, trial.min_devices = 0.02, 0.1, 5
    session.add(trial)
    session.execute(sa.update(Release).where(Release.id == 1).values(state="superseded"))
    session.flush()
    told = ((1, "live", 100.0, 25.0), (2, "live", 100.0, 1.0), (1, "superseded", 100.0, 1.0), (3, "staged", 5.0, 0.4))
    for release_id, state, percent, hours in (*told, (3, "staged", 20.0, 0.2)):
        session.add(
            ReleaseEvent(
                release_id=release_id, state=state, percent=percent, who="alice", at=at - timedelta(hours=hours),
                reason="followed by release 2" if state == "superseded" else "",
            )
        )  # fmt: skip
    have = set(rng.sample(range(1, devices + 1), devices // 5))
    session.execute(sa.update(Device).values(release_id=2))
    rows = []
    for device in sorted(have):
        examples, right = rng.randrange(8, 40), rng.uniform(0.7, 0.95)
        rows.append(
            {
                "release_id": 3, "device_id": device, "before_id": 2, "cohort": COHORTS[(device - 1) % len(COHORTS)],
                "examples": examples, "correct": round(min(1.0, right + 0.02) * examples),
                "correct_before": round(right * examples), "loss_sum": 0.5 * examples, "loss_sum_before": 0.6 * examples,
                "went_back": rng.random() < 0.02, "at": at - timedelta(minutes=rng.uniform(0, 12)),
            }
        )  # fmt: skip
    if rows:
        session.execute(sa.insert(ReleaseReport), rows)
    for start in range(0, len(rows), 500):
        some = [row["device_id"] for row in rows[start : start + 500]]
        session.execute(sa.update(Device).where(Device.id.in_(some)).values(release_id=3))


def _operations(session: Session, rng: random.Random, at: datetime, devices: int, rounds: int) -> None:
    """What the coordinator writes of itself: its lease, a day's vital figures, the audit, a round's second attempt."""
    session.add(Lease(name="coordinator", holder="host-a:4711", token=3, held_until=at + timedelta(days=365)))
    session.execute(
        sa.insert(Vitals),
        [
            {
                "at": at - timedelta(seconds=60.0 * n), "seconds": 60.0, "calls": rng.randrange(400, 900),
                "errors": rng.choice((0, 0, 0, 1, 4)), "p50_ms": rng.uniform(1, 3), "p95_ms": rng.uniform(5, 12),
                "p99_ms": rng.uniform(15, 60), "bytes_in": rng.randrange(10**6, 10**7),
                "bytes_out": rng.randrange(10**6, 10**8), "write_ms": rng.uniform(2, 8), "devices": devices // 2,
                "polls": devices // 3, "queue": rng.choice((0, 0, 0, 2, 9)), "spool_files": rng.randrange(30),
                "spool_bytes": rng.randrange(10**6), "rss_bytes": 180_000_000 + rng.randrange(10**6), "open_files": 400,
            }
            for n in range(1440)
        ],
    )  # fmt: skip
    hour = at.replace(minute=0, second=0, microsecond=0)
    for ago in range(24 * 7):
        moment = hour - timedelta(hours=ago)
        awake = 0.35 + 0.3 * (moment.hour in (0, 1, 2, 3, 4, 22, 23)) + rng.uniform(0, 0.1)
        session.add(Presence(hour=moment, devices=round(awake * devices)))
    lines = (
        (26.0, "bob@cli", "publish", "stable 1a2b", "done", ""),
        (2.0, "phone-00003", "credential.shared", "phone-00003", "noticed", "two processes at once"),
        (1.5, "mallory", "log-in", "", "refused", ""),
        (1.4, "mallory", "log-in", "", "refused", ""),
        (1.0, "alice", "log-in", "", "done", ""),
        (0.9, "carol", "promote", "3", "refused", "viewer; operator is needed"),
        (0.4, "alice", "promote", "3 5 %", "done", ""),
        (0.2, "alice", "promote", "3 20 %", "done", ""),
    )
    for hours, who, act, target, outcome, detail in lines:
        moment = at - timedelta(hours=hours)
        session.add(Audit(at=moment, who=who, act=act, target=target, outcome=outcome, detail=detail))
    if rounds > 1:
        why = "attempt 1 failed: 0 of at least 1 updates were usable"
        moment = at - timedelta(seconds=40)
        session.add(History(at=moment, run_id=2, round=rounds - 1, attempt=2, status="running", reason=why))


def _artifact(session: Session, rng: random.Random, at: datetime, preset: str) -> str:
    parameters = {"nano": 184_320, "micro": 622_208}[preset]
    teacher, nano = (hashlib.sha256(name).hexdigest()[:16] for name in (b"teacher", b"nano"))
    version = hashlib.sha256(preset.encode()).hexdigest()[:16]
    manifest: dict[str, Any] = {
        "schema": 1,
        "model": {"preset": preset, "parameters": parameters, "flops": parameters * 165, "config": {}},
        "labels": [f"intent {n}" for n in range(12)],
        "quantization": "int8",
        "sizes": {"fp32": 4 * parameters, "fp16": 2 * parameters, "int8": int(1.06 * parameters)},
        "trainable_sets": {"head": {"size": 1_548, "parameters": []}, "lora:8": {"size": 12_345, "parameters": []}},
        "files": {},
        "parent": teacher if preset == "nano" else nano,
        "metrics": {"accuracy": 0.883, "latency_ms": 1.9} if preset == "nano" else {},
    }
    days = 3 if preset == "nano" else 1
    session.add(
        Artifact(version=version, manifest=manifest, bytes=int(1.2 * parameters), created_at=at - timedelta(days=days))
    )
    session.flush()
    return version


def _round(
    session: Session,
    rng: random.Random,
    run_id: int,
    number: int,
    begin: datetime,
    cohort: int,
    parameters: str,
    under_way: bool,
    ceiling: float,
    late: bool,
    measured: bool,
) -> None:
    """A round and its assignments, added in bulk: a large fleet has millions of them."""
    learned = 1 - 0.7 ** (number)
    accuracy = None if under_way else 0.083 + (ceiling - 0.083) * learned + rng.uniform(-0.006, 0.006)
    loss = None if under_way else 2.48 * (1 - learned) + 0.12 + rng.uniform(-0.01, 0.01)
    enrolled = session.scalar(sa.select(sa.func.count(Device.id))) or 0
    chosen = [] if number == 0 else sorted(rng.sample(range(1, enrolled + 1), cohort))
    statuses = [_status(rng, under_way) for _ in chosen]
    rows, updates = [], []
    for device, status in zip(chosen, statuses, strict=True):
        name = f"{run_id}-{number}-{device}"
        took = rng.lognormvariate(2.4, 0.35)
        arrived = status in ("uploaded", "aggregated", "quarantined")
        rows.append(
            {
                "id": name,
                "run_id": run_id,
                "round": number,
                "attempt": 1,
                "device_id": device,
                "kind": "train",
                "status": status,
                "config": {},
                "parameters": parameters,
                "phase": rng.choice(PHASES) if status == "accepted" else None,
                "progress": rng.random() if status == "accepted" else 0.0,
                "offered_at": begin,
                "accepted_at": None if status in ("offered", "expired") else begin + timedelta(seconds=1),
                "lease_until": None,
                "deadline": begin + timedelta(seconds=60),
                "counted_in": None if under_way else number + (rng.choice((0, 0, 1, 3)) if late else 0),
                "finished_at": begin + timedelta(seconds=took) if arrived or status in ("failed", "expired") else None,
                "error": rng.choice(FAILURES) if status == "failed" else None,
                "bytes_down": 0 if status == "offered" else BYTES_DOWN + (BACKBONE if number == 1 else 0),
            }
        )
        if arrived:
            refused = status == "quarantined"
            norm: float | None = rng.lognormvariate(0.2, 0.25)
            reason = None
            if refused:
                norm = rng.choice((None, max(8 * norm, NORM_LIMIT + 0.01)))  # None: theta is not finite
                reason = NOT_FINITE if norm is None else f"norm: {norm:.2f} is above the limit {NORM_LIMIT:.2f}"
            updates.append(
                {
                    "assignment_id": name,
                    "num_examples": rng.randrange(40, 400),
                    "bytes": BYTES_UP + rng.randrange(200),
                    "digest": f"{device:064x}",
                    "metrics": {"loss": rng.uniform(0.2, 2.0), "seconds": 0.6 * took},
                    "norm": norm,
                    "cosine": None
                    if number < 2 or norm is None
                    else max(-1.0, min(1.0, rng.gauss(-0.2 if refused else 0.35, 0.15))),
                    "reason": reason,
                    "received_at": begin + timedelta(seconds=took),
                }
            )
    counted = statuses.count("aggregated")
    session.add(
        Round(
            run_id=run_id,
            number=number,
            status="running" if under_way else "finished",
            parameters=parameters,
            accuracy=accuracy,
            loss=loss,
            train_loss=None if loss is None or number == 0 else 0.85 * loss + rng.uniform(-0.02, 0.02),
            devices=counted,
            failed=sum(s in ("failed", "expired", "quarantined") for s in statuses),
            bytes_up=sum(u["bytes"] for u in updates),
            bytes_down=sum(r["bytes_down"] for r in rows),
            seconds=0.0 if under_way else 0.4 if number == 0 else 24 + rng.uniform(0, 5),
            started_at=begin,
            finished_at=None if under_way else begin + timedelta(seconds=29),
        )
    )
    session.flush()
    if rows:
        session.execute(sa.insert(Assignment), rows)
    if updates:
        session.execute(sa.insert(Update), updates)
    if accuracy is not None and number and measured:
        _measured(session, rng, run_id, number, begin, chosen, parameters, accuracy)
    if number and not under_way:
        named = {"step_norm": 2.0 / number, "device_accuracy": accuracy, "train_clipped": float(rng.randrange(3))}
        session.add_all(Metric(run_id=run_id, round=number, name=k, value=v) for k, v in named.items() if v is not None)


def _measured(
    session: Session, rng: random.Random, run_id: int, number: int, begin: datetime, chosen: list[int],
    parameters: str, accuracy: float,
) -> None:  # fmt: skip
    """What the devices found on their own examples."""
    rows, updates = [], []
    for device in chosen:
        name = f"{run_id}-{number}-{device}-evaluate"
        rows.append(
            {
                "id": name, "run_id": run_id, "round": number, "attempt": 1, "device_id": device, "kind": "evaluate",
                "status": "aggregated", "config": {}, "parameters": parameters, "progress": 1.0,
                "offered_at": begin + timedelta(seconds=26), "accepted_at": begin + timedelta(seconds=26),
                "finished_at": begin + timedelta(seconds=28), "counted_in": number, "bytes_down": 0,
            }
        )  # fmt: skip
        right = min(1.0, max(0.0, accuracy + rng.gauss(0, 0.08)))
        updates.append(
            {
                "assignment_id": name, "num_examples": rng.randrange(10, 60), "bytes": 0, "digest": "",
                "metrics": {"accuracy": right, "loss": 1.5 * (1 - right)}, "received_at": begin + timedelta(seconds=28),
            }
        )  # fmt: skip
    session.execute(sa.insert(Assignment), rows)
    session.execute(sa.insert(Update), updates)


def _status(rng: random.Random, under_way: bool) -> str:
    if under_way:
        return rng.choices(("offered", "accepted", "uploaded", "failed", "quarantined"), (2, 5, 5, 0.7, 0.3))[0]
    return rng.choices(("aggregated", "failed", "expired", "quarantined"), (90, 5, 3, 2))[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--devices", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=1_000)
    parser.add_argument("--cohort", type=int, default=100)
    parser.add_argument("--seed", type=int, default=7)
    given = parser.parse_args()
    fill(
        str(given.out),
        seed=given.seed,
        devices=given.devices,
        rounds=given.rounds,
        planned=given.rounds + 8,
        cohort=given.cohort,
    )
    print(f"{given.out}: {given.devices:,} devices, 2 runs of {given.rounds:,} rounds")


if __name__ == "__main__":
    main()
