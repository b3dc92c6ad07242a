"""What the dashboard asks the store, on real databases small enough to count by hand."""

from __future__ import annotations

import doctest
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from pocketfed.coordinator.store import Artifact, Assignment, Device, Release, Round, Run, Store, Update, put_blob
from pocketfed.dashboard import charts, queries, words

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


def test_a_rounds_rows_are_found_through_an_index(store: Store) -> None:
    """A full scan of assignments or updates would be read on every refresh, by every reader."""
    statements: list[str] = []
    sa.event.listen(store.engine, "before_cursor_execute", lambda c, cur, text, p, ctx, many: statements.append(text))
    with store.read() as session:
        queries.rounds.funnel(session, 1, 1)
        queries.rounds.drop_reasons(session, 1, 1)
        queries.rounds.assignments(session, 1, 1)
        queries.rounds.norms(session, 1, 1)
        queries.runs.problems(session, 1)
        queries.fleet.devices(session, AT)
        asked = [text for text in statements if "assignments" in text]
        assert len(asked) >= 6
        for text in asked:
            plan = session.connection().exec_driver_sql(f"EXPLAIN QUERY PLAN {text}", (1,) * text.count("?"))
            scans = [row[-1] for row in plan if row[-1] in ("SCAN assignments", "SCAN updates")]
            assert not scans, text


def test_ten_thousand_devices_are_counted_and_paged_in_well_under_a_second(store: Store) -> None:
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
    begin = time.perf_counter()
    with store.read() as session:
        assert queries.fleet.device_states(session, AT)["training"] == 5_000
        assert len(queries.fleet.devices(session, AT, offset=9_990)[0]) == 10
        assert queries.rounds.funnel(session, 1, 1).aggregated == 5_000
    assert time.perf_counter() - begin < 1.0


def test_names_lose_what_would_mislead_a_reader() -> None:
    assert words.plain("a\u202egpj.exe") == "agpj.exe"  # a right-to-left override hides the real order
    assert words.plain("x\x00\ty\n") == "x y"
    assert len(words.plain("z" * 10_000)) == 60
    assert words.plain("العربية") == "العربية"
    assert words.markup("<script>") == "<bdi>&lt;script&gt;</bdi>"
    assert words.cell("=HYPERLINK(1)") == "'=HYPERLINK(1)"


def test_the_examples_of_words_hold() -> None:
    found = doctest.testmod(words)
    assert found.attempted > 5
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
    for axis, (title, _) in charts.AXES.items():
        spec = charts.learning(frame, "loss", axis).to_dict()
        assert spec["layer"][0]["encoding"]["x"]["title"] == title
        assert "nats" in spec["layer"][0]["encoding"]["y"]["title"]
