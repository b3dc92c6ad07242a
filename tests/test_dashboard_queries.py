"""What the dashboard asks the store, on real databases small enough to count by hand."""

from __future__ import annotations

import doctest
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import fleet_database
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from pocketfed.coordinator.store import (
    Artifact,
    Assignment,
    Audit,
    Baseline,
    Device,
    Presence,
    Release,
    Round,
    Run,
    Store,
    Update,
    Vitals,
    put_blob,
)
from pocketfed.dashboard import charts, health, queries, words
from pocketfed.dashboard.queries import compare, learning

ROOT = Path(__file__).resolve().parents[1]

AT = datetime(2025, 3, 1, 12, 0, 0, tzinfo=UTC)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(str(tmp_path / "fleet.db"))
    yield opened
    opened.close()


def add_run(store: Store, run_id: int = 1, **values: Any) -> None:
    with store.write() as session:
        if session.get(Artifact, "a1") is None:
            session.add(Artifact(version="a1", manifest={}, bytes=10))
            session.flush()
        given = {"name": f"run {run_id}", "status": "running", "rounds_planned": 5, **values}
        session.add(
            Run(id=run_id, channel="stable", config={}, artifact_version="a1", trainable_set="head", seed=1, **given)
        )


def add_round(store: Store, number: int, run_id: int = 1, **values: Any) -> None:
    with store.write() as session:
        session.add(Round(run_id=run_id, number=number, **{"status": "finished", "started_at": AT, **values}))


def add_device(store: Store, device_id: int, name: str = "", seen_s_ago: float | None = 1.0) -> None:
    seen = None if seen_s_ago is None else AT - timedelta(seconds=seen_s_ago)
    with store.write() as session:
        session.add(Device(id=device_id, name=name or f"phone-{device_id}", token_hash="", last_seen_at=seen))


def add_assignment(store: Store, device_id: int, status: str, number: int = 1, run_id: int = 1, **values: Any) -> None:
    update = values.pop("update", None)
    with store.write() as session:
        parameters = put_blob(session, b"theta")
        name = f"{run_id}-{number}-{device_id}-{values.get('attempt', 1)}-{values.get('kind', 'train')}"
        given = {"kind": "train", "offered_at": AT, "config": {}, "parameters": parameters, **values}
        session.add(Assignment(id=name, run_id=run_id, round=number, device_id=device_id, status=status, **given))
        session.flush()
        if update is not None:
            filled = {"num_examples": 8, "bytes": 100, "digest": "0" * 64, "metrics": {}, **update}
            session.add(Update(assignment_id=name, **filled))


def test_an_empty_database_has_no_rows_and_no_newest_run(store: Store) -> None:
    with store.read() as session:
        assert queries.runs.runs(session) == []
        assert queries.runs.newest_run_id(session) is None
        assert queries.runs.run(session, 1) is None
        assert queries.runs.rounds(session, [1]) == []
        assert queries.models.artifacts(session) == []
        assert queries.models.releases(session) == []
        assert queries.fleet.devices(session, AT) == ([], 0)
        assert set(queries.fleet.device_states(session, AT).values()) == {0}
        assert queries.rounds.funnel(session, 1, 1).sampled == 0
        assert queries.rounds.norms(session, 1, 1) == []


def test_a_run_adds_up_its_rounds_and_shows_the_newest_known_accuracy(store: Store) -> None:
    add_run(store)
    add_round(store, 0, accuracy=0.1, loss=2.0, seconds=1.0)
    add_round(store, 1, accuracy=0.5, loss=1.0, devices=3, failed=1, bytes_up=10, bytes_down=200, seconds=4.0)
    add_round(store, 2, status="running", devices=0, failed=2, bytes_up=5, bytes_down=100)
    with store.read() as session:
        line = queries.runs.run(session, 1)
    assert line is not None
    assert (line.rounds_done, line.current_round) == (1, 2)
    assert (line.first_accuracy, line.accuracy, line.loss) == (0.1, 0.5, 1.0)
    assert (line.updates, line.failed, line.bytes_up, line.bytes_down, line.seconds) == (3, 3, 15, 300, 5.0)


def test_a_run_without_rounds_counts_zero(store: Store) -> None:
    add_run(store, status="waiting")
    with store.read() as session:
        (line,) = queries.runs.runs(session)
    assert (line.rounds_done, line.current_round, line.accuracy, line.bytes_up) == (0, None, None, 0)


def test_runs_come_newest_first_and_in_pages(store: Store) -> None:
    for run_id in (1, 2, 3):
        add_run(store, run_id)
    with store.read() as session:
        assert [line.id for line in queries.runs.runs(session, limit=2)] == [3, 2]
        assert [line.id for line in queries.runs.runs(session, limit=2, offset=2)] == [1]
        assert queries.runs.run_names(session) == {3: "run 3", 2: "run 2", 1: "run 1"}


def test_a_running_run_is_looked_at_before_a_newer_finished_one(store: Store) -> None:
    add_run(store, 1, status="running")
    add_run(store, 2, status="finished")
    with store.read() as session:
        assert queries.runs.newest_run_id(session) == 1


def test_rounds_carry_running_totals_of_their_own_run(store: Store) -> None:
    for run_id in (1, 2):
        add_run(store, run_id)
    for number in (0, 1, 2):
        add_round(store, number, bytes_up=1, bytes_down=10, seconds=2.0)
    add_round(store, 0, run_id=2, bytes_up=7, seconds=1.0)
    with store.read() as session:
        found = queries.runs.rounds(session, [1, 2])
    assert [(r.run_id, r.number, r.total_bytes, r.total_seconds) for r in found] == [
        (1, 0, 11, 2.0), (1, 1, 22, 4.0), (1, 2, 33, 6.0), (2, 0, 7, 1.0),
    ]  # fmt: skip


def test_the_funnel_narrows_and_every_dropped_device_has_its_reason(store: Store) -> None:
    add_run(store)
    for device in range(1, 9):
        add_device(store, device)
    for device, status in enumerate(("offered", "accepted", "uploaded", "aggregated", "aggregated"), 1):
        add_assignment(store, device, status)
    add_assignment(store, 6, "failed", accepted_at=AT, error="no space")
    add_assignment(store, 7, "expired")
    add_assignment(store, 8, "quarantined", update={"norm": 9.0, "reason": "norm 9 is above 5"})
    with store.read() as session:
        found = queries.rounds.funnel(session, 1, 1)
        reasons = queries.rounds.drop_reasons(session, 1, 1)
    # accepted: those that uploaded (3, 4, 5, 8), number 2, and number 6, which accepted before it failed
    assert (found.downloaded, found.trained) == (4, 4)  # nobody else has said so
    assert (found.sampled, found.accepted, found.uploaded, found.aggregated, found.dropped) == (8, 6, 4, 2, 3)
    assert set(reasons) == {("failed", "no space", 1), ("expired", "", 1), ("quarantined", "norm 9 is above 5", 1)}


def test_the_funnel_keeps_training_and_evaluation_apart(store: Store) -> None:
    add_run(store)
    add_device(store, 1)
    add_assignment(store, 1, "aggregated")
    add_assignment(store, 1, "failed", kind="evaluate")
    with store.read() as session:
        assert queries.rounds.kinds(session, 1, 1) == ["train", "evaluate"]
        assert queries.rounds.funnel(session, 1, 1, "train").statuses == {"aggregated": 1}
        assert queries.rounds.funnel(session, 1, 1, "evaluate").statuses == {"failed": 1}


def test_assignments_are_paged_by_device_name_and_filtered_by_status(store: Store) -> None:
    add_run(store)
    for device, name in ((1, "b"), (2, "a"), (3, "c")):
        add_device(store, device, name)
    add_assignment(
        store, 1, "aggregated", finished_at=AT + timedelta(seconds=3), bytes_down=50, update={"norm": 2.0, "bytes": 70}
    )
    add_assignment(store, 2, "accepted", phase="training", progress=0.5)
    add_assignment(store, 3, "failed", error="stopped")
    with store.read() as session:
        first, second = queries.rounds.assignments(session, 1, 1, limit=2)
        assert [a.device for a in queries.rounds.assignments(session, 1, 1, limit=2, offset=2)] == ["c"]
        (failed,) = queries.rounds.assignments(session, 1, 1, statuses=["failed"])
    assert (first.device, first.seconds, first.bytes_up, first.progress) == ("a", None, None, 0.5)
    assert (second.device, second.seconds, second.bytes_up, second.bytes_down, second.norm) == ("b", 3.0, 70, 50, 2.0)
    assert failed.reason == "stopped"


def test_the_norm_histogram_counts_every_update_once(store: Store) -> None:
    add_run(store)
    for device, norm in enumerate((1.0, 1.1, 2.9, 3.0), 1):
        add_device(store, device)
        add_assignment(store, device, "aggregated", update={"norm": norm})
    with store.read() as session:
        assert [(b.low, b.high, b.count) for b in queries.rounds.norms(session, 1, 1, bins=2)] == [
            (1.0, 2.0, 2),
            (2.0, 3.0, 2),
        ]


def test_norms_that_are_all_equal_fill_one_bar(store: Store) -> None:
    add_run(store)
    for device in (1, 2):
        add_device(store, device)
        add_assignment(store, device, "aggregated", update={"norm": 0.0})
    with store.read() as session:
        (only,) = queries.rounds.norms(session, 1, 1)
    assert only.count == 2
    assert only.high > only.low


@pytest.mark.parametrize(
    ("seen_s_ago", "status", "phase", "state"),
    [
        (1, None, None, "idle"),
        (59, "offered", None, "offered"),
        (1, "accepted", "downloading", "downloading"),
        (1, "accepted", "uploading", "uploading"),
        (1, "accepted", "training", "training"),
        (1, "accepted", None, "training"),
        (1, "accepted", "<b>", "training"),  # what a device calls its phase is not trusted
        (1, "aggregated", None, "idle"),
        (61, "accepted", "training", "offline"),
        (None, None, None, "offline"),
    ],
)
def test_a_devices_state_follows_from_its_open_assignment(
    store: Store, seen_s_ago: float | None, status: str | None, phase: str | None, state: str
) -> None:
    add_run(store)
    add_device(store, 1, seen_s_ago=seen_s_ago)
    if status is not None:
        add_assignment(store, 1, status, phase=phase)
    with store.read() as session:
        ((device,), total) = queries.fleet.devices(session, AT)
        assert queries.fleet.device_states(session, AT)[state] == 1
    assert (device.state, total) == (state, 1)


def test_a_device_with_two_open_assignments_is_listed_once_with_the_one_it_accepted(store: Store) -> None:
    add_run(store)
    add_device(store, 1)
    add_assignment(store, 1, "accepted", number=1, offered_at=AT - timedelta(seconds=9))
    add_assignment(store, 1, "offered", number=2)
    with store.read() as session:
        ((device,), total) = queries.fleet.devices(session, AT)
    assert (device.round, device.state, total) == (1, "training", 1)


def test_a_search_takes_wildcards_literally_and_ignores_case(store: Store) -> None:
    for device, name in enumerate(("Anna", "50%", "a_b", "axb"), 1):
        add_device(store, device, name)
    with store.read() as session:
        for text, expected in (("anna", ["Anna"]), ("%", ["50%"]), ("a_b", ["a_b"]), ("none", [])):
            found, total = queries.fleet.devices(session, AT, text)
            assert [d.name for d in found] == expected
            assert total == len(expected)
        page, total = queries.fleet.devices(session, AT, states=["idle"], limit=1, offset=1)
    assert ([d.name for d in page], total) == (["Anna"], 4)  # 50% sorts before it


def test_a_manifest_that_lacks_everything_is_shown_all_the_same(store: Store) -> None:
    odd = {
        "model": None,
        "labels": "x",
        "sizes": {"fp32": -1, "int8": True},
        "trainable_sets": {"head": 3},
        "parent": 7,
    }
    with store.write() as session:
        session.add(Artifact(version="bare", manifest={}, bytes=1, created_at=AT))
        session.add(Artifact(version="odd", manifest=odd, bytes=1, created_at=AT + timedelta(seconds=1)))
    with store.read() as session:
        for line in queries.models.artifacts(session):
            assert (line.preset, line.parameters, line.parent, line.labels) == (None, None, None, 0)
            assert (dict(line.sizes), dict(line.trainable_sets)) == ({}, {})


def test_the_newest_release_of_each_channel_is_current(store: Store) -> None:
    add_run(store)
    with store.write() as session:
        theta = put_blob(session, b"12345")
        for channel, run_id in (("stable", None), ("stable", 1), ("beta", None)):
            session.add(
                Release(channel=channel, artifact_version="a1", trainable_set="head", parameters=theta, run_id=run_id)
            )
            session.flush()
    with store.read() as session:
        found = queries.models.releases(session)
    assert [(r.channel, r.current, r.run, r.bytes) for r in found] == [
        ("beta", True, None, 5), ("stable", True, "run 1", 5), ("stable", False, None, 5),
    ]  # fmt: skip


def test_problems_are_the_newest_first_and_only_those_of_the_run(store: Store) -> None:
    for run_id in (1, 2):
        add_run(store, run_id)
    add_device(store, 1, "p")
    add_round(store, 1, failed=1)
    add_round(store, 2, status="failed", reason="no quorum", finished_at=AT + timedelta(seconds=5))
    add_round(store, 1, run_id=2, failed=1)
    add_assignment(store, 1, "failed", error="battery", finished_at=AT + timedelta(seconds=2))
    add_assignment(store, 1, "failed", run_id=2, error="not ours")
    with store.read() as session:
        found = queries.runs.problems(session, 1)
        assert len(queries.runs.problems(session, 1, limit=1)) == 1
    assert [(p.what, p.round, p.device, p.reason) for p in found] == [
        ("round", 2, None, "no quorum"),
        ("device", 1, "p", "battery"),
    ]


def test_the_funnel_believes_what_devices_last_said_of_their_phase(store: Store) -> None:
    add_run(store)
    for device, phase in enumerate(("downloading", "training", "uploading"), 1):
        add_device(store, device)
        add_assignment(store, device, "accepted", phase=phase)
    with store.read() as session:
        steps = queries.rounds.funnel(session, 1, 1).steps
    assert steps == {"sampled": 3, "accepted": 3, "downloaded": 2, "trained": 1, "uploaded": 0, "aggregated": 0}


def test_attempts_of_a_round_are_told_with_their_reasons(store: Store) -> None:
    add_run(store)
    add_round(store, 1, status="running")
    with store.write() as session:
        row = session.get_one(Round, (1, 1))
        row.attempt, row.reason = 2, "attempt 1 failed: too few"
    with store.read() as session:
        found = queries.rounds.attempts(session, 1, 1)
    assert [(a.attempt, a.status, a.reason) for a in found] == [
        (1, "running", None),
        (2, "running", "attempt 1 failed: too few"),
    ]


def test_spans_are_seconds_since_the_first_offer_the_unfinished_first(store: Store) -> None:
    add_run(store)
    for device in (1, 2):
        add_device(store, device)
    ends = {"accepted_at": AT + timedelta(seconds=2), "deadline": AT + timedelta(seconds=60)}
    add_assignment(store, 1, "aggregated", update={"received_at": AT + timedelta(seconds=9)}, **ends)
    add_assignment(store, 2, "offered", offered_at=AT + timedelta(seconds=1))
    with store.read() as session:
        second, first = queries.rounds.spans(session, 1, 1)
        assert queries.rounds.deadline(session, 1, 1) == AT + timedelta(seconds=60)
        (bar,) = queries.rounds.times(session, 1, 1, bins=1)
    assert (first.offered, first.accepted, first.ended, first.deadline) == (0.0, 2.0, 9.0, 60.0)
    assert (second.offered, second.accepted, second.ended) == (1.0, None, None)
    assert bar.count == 1
    assert bar.low == pytest.approx(7.0, abs=0.001)


def test_staleness_is_the_distance_to_the_round_that_took_an_update_in(store: Store) -> None:
    add_run(store)
    for device, (number, status) in enumerate(
        ((3, "aggregated"), (3, "aggregated"), (1, "aggregated"), (3, "failed")), 1
    ):
        add_device(store, device)
        add_assignment(store, device, status, number=number, counted_in=3)
    with store.read() as session:
        assert queries.rounds.staleness(session, 1, 3) == {0: 2, 2: 1}


def test_the_clip_line_is_clip_factor_medians_of_what_was_accepted_before(store: Store) -> None:
    add_run(store)
    add_round(store, 1, devices=32)
    for device in range(1, 33):
        add_device(store, device)
        add_assignment(store, device, "aggregated", counted_in=1, update={"norm": float(device)})
    with store.write() as session:
        session.get_one(Run, 1).config = {"clip_factor": 3.0}
    with store.read() as session:
        assert queries.rounds.clip_line(session, 1, 2) == 48.0  # the lower median of 1 to 32 is 16
        assert queries.rounds.clip_line(session, 1, 1) is None  # nothing came before


def test_cohorts_are_shown_as_quantiles_and_only_where_five_devices_measured(store: Store) -> None:
    add_run(store)
    add_round(store, 1)
    for device in range(1, 10):
        add_device(store, device)
        add_assignment(store, device, "aggregated", kind="evaluate", update={"metrics": {"accuracy": device / 10}})
    with store.write() as session:
        session.execute(sa.update(Device).where(Device.id <= 5).values(cohort="pilot"))
    with store.read() as session:
        (found,) = queries.learning.spreads(session, 1)
    assert (found.cohort, found.devices) == ("pilot", 5)  # the other four are not shown
    assert (found.p10, found.p50, found.p90, found.worst) == (0.1, 0.3, 0.5, 0.1)


def test_a_round_of_which_only_some_values_are_read_is_not_shown(store: Store) -> None:
    add_run(store)
    for number in (1, 2):
        add_round(store, number)
    for device in range(1, 11):
        add_device(store, device)
        for number in (1, 2):
            update = {"metrics": {"accuracy": device / 10}}
            add_assignment(store, device, "aggregated", number=number, kind="evaluate", update=update)
    with store.read() as session:
        assert [(s.round, s.devices) for s in queries.learning.spreads(session, 1)] == [(1, 10), (2, 10)]
        assert [(s.round, s.devices) for s in queries.learning.spreads(session, 1, most=17)] == [(2, 10)]


def test_quarantined_updates_are_counted_by_their_code_and_device(store: Store) -> None:
    add_run(store)
    for device in (1, 2):
        add_device(store, device)
    reasons = ("norm: 9 is above 5", "not_finite: 1 of 3", "my own words: 1")
    for number, reason in enumerate(reasons, 1):
        add_assignment(store, 1, "quarantined", number=number, update={"norm": 9.0, "reason": reason})
    add_assignment(store, 2, "aggregated", update={"norm": 1.0})
    with store.read() as session:
        assert queries.security.refusals(session, 1) == {"norm": 1, "not_finite": 1, "other": 1}
        assert queries.security.refusals(session, 2) == {}
        (offender,) = queries.security.offenders(session, 1)
        assert [q.round for q in queries.security.quarantined(session, 1, limit=2)] == [3, 2]
        assert {p.status for p in queries.security.points(session, 1, 3)} == {"quarantined", "aggregated"}
    assert (offender.device_id, offender.count, offender.last_round) == (1, 3, 3)


def test_what_a_device_claims_of_its_update_is_not_drawn_as_screenings_own(store: Store) -> None:
    add_run(store)
    for device, metrics in enumerate(({"cosine": 1.0}, {}), 1):
        add_device(store, device)
        add_assignment(store, device, "aggregated", update={"norm": 2.0, "num_examples": 7, "metrics": metrics})
    with store.read() as session:
        drawn = charts.scatter(queries.security.points(session, 1, 1))
    assert drawn.data.to_dict("records") == [
        {"round": 1, "norm": 2.0, "examples": 7, "cosine": None, "fate": "counted or waiting"} for _ in range(2)
    ]
    assert drawn.to_dict()["encoding"]["x"]["field"] == "examples"


def test_norm_is_drawn_against_the_cosine_that_screening_measured(store: Store) -> None:
    add_run(store)
    for device, cosine in enumerate((None, 0.5, -1.0), 1):
        add_device(store, device)
        status = "quarantined" if device == 3 else "aggregated"
        add_assignment(store, device, status, update={"norm": 2.0, "cosine": cosine, "metrics": {"cosine": 1.0}})
    with store.read() as session:
        drawn = charts.scatter(queries.security.points(session, 1, 1))
    told = [(row["cosine"], row["fate"]) for row in drawn.data.to_dict("records")]
    assert told == [(0.5, "counted or waiting"), (-1.0, "quarantined")]
    assert drawn.to_dict()["encoding"]["x"]["field"] == "cosine"


def test_what_a_run_is_compared_with_is_drawn_as_level_lines_from_its_first_round_to_its_last(store: Store) -> None:
    add_run(store)
    for number, accuracy in enumerate((0.1, 0.4, 0.6)):
        add_round(store, number, accuracy=accuracy, loss=2.0 - number)
    with store.write() as session:
        for kind, metric, value in (
            ("central", "accuracy", 0.9),
            ("local", "accuracy", 0.3),
            ("central", "epochs", 4.0),
        ):
            session.add(Baseline(run_id=1, kind=kind, metric=metric, value=value))
    with store.read() as session:
        levels = queries.learning.baselines(session, [1, 7])
        frame = charts.learning_frame(queries.runs.rounds(session, [1]), {1: "a"}, levels=levels)
    assert levels == {(1, "central"): {"accuracy": 0.9, "epochs": 4.0}, (1, "local"): {"accuracy": 0.3}}
    level = frame[(frame["measure"] == "accuracy") & ~frame["curve"].str.startswith("evaluation")]
    assert list(zip(level["curve"], level["number"], level["value"], strict=True)) == [
        ("all data in one place", 0, 0.9), ("all data in one place", 2, 0.9),
        ("each device alone", 0, 0.3), ("each device alone", 2, 0.3),
        ("the release before", 0, 0.1), ("the release before", 2, 0.1),
    ]  # fmt: skip
    spec = charts.learning(frame, "accuracy").to_dict()
    drawn = spec["layer"][0]["encoding"]["strokeDash"]
    assert drawn["scale"]["domain"][1:] == ["all data in one place", "each device alone", "the release before"]
    assert drawn["legend"]["orient"] == "bottom"  # named, and outside of the plot


def test_a_value_that_is_no_number_is_not_drawn(store: Store) -> None:
    add_run(store)
    add_round(store, 0, accuracy=0.5, loss=1.0)
    add_round(store, 1, accuracy=0.6, loss=float("inf"))
    with store.read() as session:
        frame = charts.learning_frame(queries.runs.rounds(session, [1]), {1: "a"}, levels={})
    assert list(frame["value"][(frame["measure"] == "loss") & (frame["curve"] == "evaluation")]) == [1.0]


def test_the_audit_is_paged_newest_first_and_searched_literally(store: Store) -> None:
    with store.write() as session:
        for number in range(5):
            session.add(Audit(at=AT, who=f"p{number}", act="log-in", target="a_b", outcome="refused"))
        session.add(Audit(at=AT, who="q", act="pause", target="axb", outcome="done"))
    with store.read() as session:
        lines, total = queries.security.audit(session, limit=2, offset=1)
        assert ([a.who for a in lines], total) == (["p4", "p3"], 6)
        assert queries.security.audit(session, "a_b")[1] == 5
        assert queries.security.audit(session, acts=("pause",), outcomes=("done",))[1] == 1
        assert queries.security.audit_acts(session) == ["log-in", "pause"]
        tried, failed = queries.security.failed_log_ins(session, AT + timedelta(days=1), limit=2)
    assert [(name, times) for name, times, _ in tried] == [("p0", 1), ("p1", 1)]
    assert failed == 5, "also of the names that are not shown"


def test_work_given_back_is_counted_by_the_condition_that_was_named(store: Store) -> None:
    add_run(store)
    errors = ("NOT_ELIGIBLE: charging, idle", "NOT_ELIGIBLE: charging", "NOT_ELIGIBLE: made-up", "idle")
    for device, error in enumerate(errors, 1):
        add_device(store, device)
        add_assignment(store, device, "failed", error=error)
    with store.read() as session:
        assert queries.fleet.refused_for(session, 1) == {"charging": 2, "idle": 1}
        assert len(queries.fleet.failures(session, 1)) == 4
        assert queries.fleet.failures(session, 2) == []


def test_devices_are_counted_by_presence_version_cohort_and_when_they_were_seen(store: Store) -> None:
    for device, ago in enumerate((1.0, 120.0, None), 1):
        add_device(store, device, seen_s_ago=ago)
    with store.write() as session:
        session.execute(
            sa.update(Device)
            .where(Device.id == 1)
            .values(present_until=AT, cohort="pilot", sdk_version="1", tier="new")
        )
        session.add(Presence(hour=AT, devices=2))
        session.add(Presence(hour=AT - timedelta(days=8), devices=3))
    with store.read() as session:
        present = queries.fleet.present(session, AT)
        assert (present.enrolled, present.online, present.eligible) == (3, 1, 1)
        assert queries.fleet.versions(session) == {"": 2, "1": 1}
        assert queries.fleet.cohorts(session) == {"": 2, "pilot": 1}
        assert queries.fleet.tiers(session) == {"": 2, "new": 1}
        seen = queries.fleet.last_seen(session, AT)
        assert queries.fleet.activity(session, AT) == [(AT, 2)]
    assert (seen["within a minute"], seen["within an hour"], seen["never"], seen["longer ago"]) == (1, 1, 1, 0)


def test_settings_that_differ_are_found_in_tables_too() -> None:
    configs = {
        1: {"rounds": 3, "local": {"epochs": 1, "lr": 1}},
        2: {"rounds": 3, "local": {"epochs": 2, "lr": 1}, "x": []},
    }
    assert queries.compare.differences(configs) == {"local.epochs": {1: 1, 2: 2}, "x": {1: None, 2: []}}


def test_vital_figures_are_thinned_to_what_a_chart_can_show(store: Store) -> None:
    with store.write() as session:
        values = dict.fromkeys(queries.system.FIGURES, 1)
        session.execute(
            sa.insert(Vitals), [{"at": AT + timedelta(seconds=n), "seconds": 1.0, **values} for n in range(10)]
        )
    with store.read() as session:
        assert len(queries.system.vitals(session, AT)) == 10
        found = queries.system.vitals(session, AT, most=5)
        assert [(line.at - AT).seconds for line in found] == [1, 3, 5, 7, 9]  # the newest is among them
        assert queries.system.vitals(session, AT + timedelta(days=1)) == []
        newest = queries.system.newest_vitals(session)
    assert newest is not None
    assert newest.at == AT + timedelta(seconds=9)


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({}, "Healthy"),
        ({"status": "failed", "reason": "3 rounds failed in a row"}, "Halted"),
        ({"status": "waiting"}, "Waiting for quorum"),
        ({"served": -5, "changed": -90}, "Halted"),  # its lease has ended and nothing happens
        ({"served": -5, "changed": -3}, "Healthy"),  # a simulation beside an old lease
        ({"deadline": -90, "changed": -90}, "Halted"),
        ({"deadline": -90, "changed": -3}, "Healthy"),  # late, but something goes on
        ({"deadline": None, "eligible": 1}, "Waiting for quorum"),
        ({"status": "finished", "served": -500, "changed": -500}, "Healthy"),
    ],
)
def test_the_banner_says_whether_all_is_well_and_why(store: Store, given: dict[str, Any], word: str) -> None:
    case = {"status": "running", "reason": None, "served": 5, "changed": -1, "deadline": 30, "eligible": 9} | given
    add_run(store, status=case["status"], reason=case["reason"])
    with store.read() as session:
        line = queries.runs.run(session, 1)
    assert line is not None

    def moment(seconds: int | None) -> datetime | None:
        return None if seconds is None else AT + timedelta(seconds=seconds)

    served, deadline, changed = (moment(case[name]) for name in ("served", "deadline", "changed"))
    found = health.condition(line, {"min_devices": 2}, case["eligible"], served, deadline, changed, AT)
    assert found.word == word
    assert found.reason or word == "Healthy"
    if word == "Halted":
        assert any(part in found.reason for part in ("in a row", "pocketfed serve", "nothing has happened"))


def every_query(session: Session) -> None:
    """All that pages ask, on a database of some run 1 with a round 1."""
    runs, rounds, fleet, models = queries.runs, queries.rounds, queries.fleet, queries.models
    runs.runs(session), runs.newest_run_id(session), runs.run_names(session), runs.rounds(session, [1, 2])
    runs.problems(session, 1), runs.metric_names(session, [1]), runs.metric(session, [1], "x")
    runs.configs(session, [1]), runs.last_change(session, 1, 1)
    for kind in ("train", "evaluate"):
        rounds.funnel(session, 1, 1, kind), rounds.drop_reasons(session, 1, 1, kind)
        rounds.assignments(session, 1, 1, kind), rounds.spans(session, 1, 1, kind), rounds.times(session, 1, 1, kind)
    rounds.kinds(session, 1, 1), rounds.attempts(session, 1, 1), rounds.deadline(session, 1, 1)
    rounds.norms(session, 1, 1), rounds.staleness(session, 1, 1), rounds.clip_line(session, 1, 2)
    rounds.metrics(session, 1, 1)
    fleet.device_states(session, AT), fleet.devices(session, AT, "p", ["idle"]), fleet.device(session, 1, AT)
    fleet.work_of(session, 1), fleet.present(session, AT), fleet.versions(session), fleet.cohorts(session)
    fleet.last_seen(session, AT), fleet.activity(session, AT), fleet.failures(session, 1), fleet.refused_for(session, 1)
    models.artifacts(session), models.releases(session), models.release_events(session)
    models.running(session, "stable"), models.judged(session, 3), models.live(session, "stable")
    models.signatures(session, ["a"])
    queries.learning.spreads(session, 1), queries.learning.baselines(session, [1]), fleet.tiers(session)
    security = queries.security
    security.quarantined(session, 1), security.refusals(session, 1), security.offenders(session, 1)
    security.points(session, 1, 1), security.failed_log_ins(session, AT), security.credentials(session)
    security.audit(session, "p", ("log-in",), ("done",)), security.audit_acts(session)
    system = queries.system
    system.vitals(session, AT), system.newest_vitals(session), system.lease(session), system.open_work(session)
    system.database_bytes(session), system.table_rows(session)


def test_every_query_has_an_answer_and_none_reads_all_updates_or_assignments(database: str) -> None:
    """On both kinds of database. A full scan would be read on every refresh, by every reader."""
    fleet_database.fill(database, devices=30, rounds=8, planned=9, cohort=20)
    store = Store(database)
    with store.write() as session:  # PostgreSQL knows tables that were never counted as tiny, and reads those whole
        session.execute(sa.text("ANALYZE"))
    asked: list[tuple[str, Any]] = []

    @sa.event.listens_for(store.engine, "before_cursor_execute")
    def note(_c: Any, _cur: Any, text: str, given: Any, _context: Any, _many: bool) -> None:
        asked.append((text, given))

    with store.read() as session:
        every_query(session)
        queried = [(text, given) for text, given in asked if "assignments" in text or "updates" in text]
        assert len(queried) > 20
        connection = session.connection()
        if not store.is_sqlite:
            connection.exec_driver_sql("SET enable_seqscan = off")  # what is left has no other way
        for text, given in queried:
            explain = "EXPLAIN QUERY PLAN " if store.is_sqlite else "EXPLAIN "
            plan = [str(row[-1]) for row in connection.exec_driver_sql(explain + text, given)]
            scans = [p for p in plan if re.search(r"SCAN (assignments|updates)|Seq Scan on (assignments|updates)", p)]
            assert not scans, f"{text}\n{plan}"
    store.close()


def test_ten_thousand_devices_are_counted_and_paged_by_the_database(store: Store) -> None:
    add_run(store)
    add_round(store, 1)
    with store.write() as session:
        theta = put_blob(session, b"theta")
        session.execute(
            sa.insert(Device),
            [{"id": n, "name": f"p{n:05d}", "token_hash": "", "last_seen_at": AT} for n in range(10_000)],
        )
        session.execute(
            sa.insert(Assignment),
            [
                {"id": str(n), "run_id": 1, "round": 1, "device_id": n, "kind": "train", "config": {},
                     "parameters": theta,
                 "status": "accepted" if n % 2 else "aggregated", "offered_at": AT}
                for n in range(10_000)
            ],
        )  # fmt: skip
    with store.read() as session:
        assert queries.fleet.device_states(session, AT)["training"] == 5_000
        assert len(queries.fleet.devices(session, AT, offset=9_990)[0]) == 10
        assert queries.rounds.funnel(session, 1, 1).aggregated == 5_000


def test_names_lose_what_would_mislead_a_reader() -> None:
    assert words.plain("a\u202egpj.exe") == "agpj.exe"  # a right-to-left override hides the real order
    assert words.plain("x\x00\ty\n") == "x y"
    assert len(words.plain("z" * 10_000)) == 60
    assert words.plain("العربية") == "العربية"
    assert words.markup("<script>") == "<bdi>&lt;script&gt;</bdi>"
    assert words.cell("=HYPERLINK(1)") == "'=HYPERLINK(1)"


def test_the_examples_of_words_hold() -> None:
    for module in (words, compare, learning):
        found = doctest.testmod(module)
        assert found.attempted
        assert found.failed == 0


def test_a_chart_of_one_run_holds_a_point_for_every_known_value(store: Store) -> None:
    add_run(store)
    add_round(store, 0, accuracy=0.1, loss=2.0)
    add_round(store, 1, accuracy=0.5, loss=1.0, train_loss=1.5)
    add_round(store, 2, status="running")
    with store.read() as session:
        frame = charts.learning_frame(queries.runs.rounds(session, [1]), {1: "first"})
    assert list(frame["value"][frame["measure"] == "accuracy"]) == [0.1, 0.5]
    assert list(frame["value"][frame["measure"] == "loss"]) == [2.0, 1.0, 1.5]
    with store.read() as session:
        begun = charts.learning_frame(queries.runs.rounds(session, [1]), {1: "first"}, levels={})
    level = begun[begun["curve"] == "the release before"]
    assert set(level["value"][level["measure"] == "accuracy"]) == {0.1}
    for axis, (title, _) in charts.AXES.items():
        spec = charts.learning(frame, "loss", axis).to_dict()
        assert spec["layer"][0]["encoding"]["x"]["title"] == title
        assert "nats" in spec["layer"][0]["encoding"]["y"]["title"]
