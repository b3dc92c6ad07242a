"""Assignments at the coordinator: handed out once, kept alive by heartbeats, and taken back exactly once."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa

from pocketfed.coordinator.assignments import AWAY_S, Assignments, Header, Receipt, UploadError, devices_online
from pocketfed.coordinator.store import (
    Assignment,
    Device,
    Run,
    Store,
    Update,
    device_named,
    now,
    put_artifact,
    put_blob,
)

DATA = np.random.default_rng(0).bytes(1000)
LEASE_S = 30.0
PAST = timedelta(seconds=-1)
FUTURE = timedelta(seconds=600)


@pytest.fixture
def store(database: str) -> Iterator[Store]:
    opened = Store(database)
    with opened.write() as session:
        put_artifact(session, {}, "v1", [])
        session.add(
            Run(
                id=1,
                name="r",
                channel="stable",
                config={},
                artifact_version="v1",
                trainable_set="head",
                seed=1,
                rounds_planned=9,
            )
        )
        for name in ("phone", "tablet"):
            device_named(session, name)
    yield opened
    opened.close()


@pytest.fixture
def assignments(store: Store, tmp_path: Path) -> Assignments:
    return Assignments(store, tmp_path / "spool")


def offer(
    store: Store, device: int = 1, number: int = 1, deadline: timedelta = FUTURE, lease: timedelta | None = None
) -> str:
    name = f"1-{number}-1-{device}-train"
    with store.write() as session:
        session.add(
            Assignment(
                id=name,
                run_id=1,
                round=number,
                device_id=device,
                kind="train",
                config={},
                parameters=put_blob(session, b"theta"),
                deadline=now() + deadline,
                lease_until=None if lease is None else now() + lease,
            )
        )
    return name


def move(store: Store, name: str, **values: object) -> None:
    """Time passes, or the round decides."""
    with store.write() as session:
        session.execute(sa.update(Assignment).where(Assignment.id == name).values(**values))


def row(store: Store, name: str) -> Assignment:
    with store.read() as session:
        return session.get_one(Assignment, name)


def header(name: str, data: bytes = DATA, offset: int = 0, **values: object) -> Header:
    given = {
        "total_bytes": len(data),
        "digest": hashlib.sha256(data).hexdigest(),
        "num_examples": 7,
        "metrics": {"loss": 0.5},
    }
    return Header(assignment_id=name, offset=offset, **(given | values))  # type: ignore[arg-type]


def hand_in(assignments: Assignments, name: str, data: bytes = DATA, device: int = 1) -> Receipt:
    told = header(name, data)
    done = assignments.check_header(device, told, 5000)
    if done is not None:
        return done
    assignments.append(told, data)
    return assignments.finish(device, told)


def updates(store: Store) -> list[Update]:
    with store.read() as session:
        return list(session.scalars(sa.select(Update)))


# ---- asking for work -------------------------------------------------------------------------------------------------


def test_a_device_is_given_its_own_assignment_and_the_same_one_again(store: Store, assignments: Assignments) -> None:
    name = offer(store)
    assert assignments.next_for(2, LEASE_S) is None
    first, again = assignments.next_for(1, LEASE_S), assignments.next_for(1, LEASE_S)
    assert first is not None
    assert again is not None
    assert first.id == again.id == name
    assert row(store, name).status == "accepted"
    assert first.accepted_at == again.accepted_at


def test_the_oldest_open_assignment_comes_first(store: Store, assignments: Assignments) -> None:
    old, new = offer(store, number=1), offer(store, number=2)
    assert assignments.next_for(1, LEASE_S).id == old  # type: ignore[union-attr]
    hand_in(assignments, old)
    assert assignments.next_for(1, LEASE_S).id == new  # type: ignore[union-attr]


@pytest.mark.parametrize("times", [{"deadline": PAST}, {"lease": PAST}])
def test_what_is_overdue_is_not_handed_out(store: Store, assignments: Assignments, times: dict[str, timedelta]) -> None:
    offer(store, **times)
    assert assignments.next_for(1, LEASE_S) is None


def test_an_overdue_assignment_does_not_hide_the_next(store: Store, assignments: Assignments) -> None:
    offer(store, number=1, deadline=PAST)
    new = offer(store, number=2)
    found = assignments.next_for(1, LEASE_S)
    assert found is not None
    assert found.id == new


def test_accepting_begins_a_lease_and_a_heartbeat_extends_it(store: Store, assignments: Assignments) -> None:
    name = offer(store, lease=timedelta(seconds=1))
    assignments.next_for(1, LEASE_S)
    begun = row(store, name).lease_until
    assert begun is not None
    assert begun - now() > timedelta(seconds=LEASE_S - 5)
    assert assignments.heartbeat(1, name, "training", 0.25, 2 * LEASE_S)
    extended = row(store, name)
    assert extended.lease_until is not None
    assert extended.lease_until - begun > timedelta(seconds=LEASE_S - 5)
    assert (extended.phase, extended.progress) == ("training", 0.25)


@pytest.mark.parametrize(("told", "kept"), [(-1.0, 0.0), (2.0, 1.0), (math.nan, 0.0), (math.inf, 0.0)])
def test_progress_is_kept_between_nothing_and_all(
    store: Store, assignments: Assignments, told: float, kept: float
) -> None:
    name = offer(store)
    assert assignments.heartbeat(1, name, "training", told, LEASE_S)
    assert row(store, name).progress == kept


def test_a_heartbeat_after_the_end_says_stop_and_revives_nothing(store: Store, assignments: Assignments) -> None:
    name = offer(store)
    assignments.next_for(1, LEASE_S)
    move(store, name, lease_until=now() + PAST)
    assert not assignments.heartbeat(1, name, "training", 0.5, LEASE_S)
    assignments.expire([name])
    assert not assignments.heartbeat(1, name, "training", 0.5, LEASE_S)
    assert (row(store, name).status, row(store, name).error) == ("expired", "no heartbeat within the lease")


def test_lease_and_deadline_expire_with_their_reason_and_only_what_is_open(
    store: Store, assignments: Assignments
) -> None:
    late, alive, silent = (offer(store, number=n) for n in (1, 2, 3))
    handed = offer(store, number=4)
    hand_in(assignments, handed)
    move(store, late, deadline=now() + PAST)
    move(store, silent, lease_until=now() + PAST)
    move(store, handed, deadline=now() + PAST)
    assignments.expire([late, alive, silent, handed])
    assert [(row(store, n).status, row(store, n).error) for n in (late, alive, silent, handed)] == [
        ("expired", "the round's deadline has passed"),
        ("offered", None),
        ("expired", "no heartbeat within the lease"),
        ("uploaded", None),
    ]


def test_a_declined_assignment_has_failed_with_its_reason(store: Store, assignments: Assignments) -> None:
    name = offer(store)
    assignments.decline(1, name, "battery low " * 100)
    assert row(store, name).status == "failed"
    assert row(store, name).error == ("battery low " * 100)[:500]
    assert assignments.next_for(1, LEASE_S) is None


def test_declining_what_was_handed_in_changes_nothing(store: Store, assignments: Assignments) -> None:
    name = offer(store)
    hand_in(assignments, name)
    assignments.decline(1, name, "changed my mind")
    assert row(store, name).status == "uploaded"


def test_whoever_waits_hears_of_a_decline_and_of_an_upload(store: Store, assignments: Assignments) -> None:
    names = [offer(store, number=1), offer(store, number=2)]
    for end in (lambda: assignments.decline(1, names[0], "no"), lambda: hand_in(assignments, names[1])):
        with assignments.changed:
            ending = threading.Thread(target=end)
            ending.start()
            assert assignments.changed.wait(5)
        ending.join()


def test_a_foreign_assignment_is_as_good_as_none(store: Store, assignments: Assignments) -> None:
    name = offer(store, device=1)
    says = f"this device holds no assignment '{name}'"
    for attempt in (
        lambda: assignments.heartbeat(2, name, "training", 0.5, LEASE_S),
        lambda: assignments.decline(2, name, "mine"),
        lambda: assignments.received(2, name),
        lambda: assignments.check_header(2, header(name), 5000),
        lambda: assignments.finish(2, header(name, b"")),
    ):
        with pytest.raises(UploadError, match=says) as caught:
            attempt()
        assert caught.value.kind == "not_found"
    assert row(store, name).status == "offered"
    assert updates(store) == []


# ---- handing in ------------------------------------------------------------------------------------------------------


def test_an_update_is_counted_and_lies_in_the_spool(store: Store, assignments: Assignments) -> None:
    name = offer(store)
    assert hand_in(assignments, name) == Receipt(True)
    (update,) = updates(store)
    assert (update.num_examples, update.bytes, update.digest, update.metrics) == (
        7,
        1000,
        hashlib.sha256(DATA).hexdigest(),
        {"loss": 0.5},
    )
    assert assignments.upload_path(name).read_bytes() == DATA
    assert (row(store, name).status, row(store, name).progress) == ("uploaded", 1.0)


def test_an_interrupted_upload_goes_on_where_it_stood(store: Store, assignments: Assignments) -> None:
    name = offer(store)
    assert assignments.received(1, name) == (0, None)
    assert assignments.check_header(1, header(name), 5000) is None
    assignments.append(header(name), DATA[:300])
    assert assignments.received(1, name) == (300, None)
    with pytest.raises(UploadError, match="300 of 1000 bytes have arrived; send the rest") as caught:
        assignments.finish(1, header(name))
    assert caught.value.kind == "invalid"
    with pytest.raises(UploadError, match="the upload goes on at byte 300, not 0") as caught:
        assignments.check_header(1, header(name), 5000)
    assert caught.value.kind == "out_of_range"
    rest = header(name, offset=300)
    assert assignments.check_header(1, rest, 5000) is None
    assignments.append(rest, DATA[300:])
    assert assignments.finish(1, rest) == Receipt(True)
    assert assignments.upload_path(name).read_bytes() == DATA


def test_what_has_arrived_is_known_to_a_coordinator_started_anew(
    store: Store, assignments: Assignments, tmp_path: Path
) -> None:
    name = offer(store)
    assignments.append(header(name), DATA[:300])
    assert Assignments(store, tmp_path / "spool").received(1, name) == (300, None)


def test_sent_twice_it_counts_once_with_the_same_receipt(store: Store, assignments: Assignments) -> None:
    name = offer(store)
    assert hand_in(assignments, name) == hand_in(assignments, name) == Receipt(True)
    assert assignments.received(1, name) == (0, Receipt(True))
    assert assignments.finish(1, header(name, b"")) == Receipt(True)
    assert len(updates(store)) == 1
    move(store, name, status="aggregated")
    assignments.forget([name])
    assert hand_in(assignments, name) == Receipt(True)
    assert not assignments.upload_path(name).exists()


def test_a_wrong_digest_is_data_loss_and_begins_again_at_nothing(store: Store, assignments: Assignments) -> None:
    name = offer(store)
    wrong = header(name, digest="0" * 64)
    assignments.append(wrong, DATA)
    with pytest.raises(UploadError, match="does not have the digest announced; start again at byte 0") as caught:
        assignments.finish(1, wrong)
    assert caught.value.kind == "data_loss"
    assert updates(store) == []
    assert assignments.received(1, name) == (0, None)
    assert hand_in(assignments, name) == Receipt(True)


def test_more_than_was_announced_is_refused(store: Store, assignments: Assignments) -> None:
    name = offer(store)
    with pytest.raises(UploadError, match="more than the 1000 bytes announced have arrived") as caught:
        assignments.append(header(name), DATA + b"!")
    assert caught.value.kind == "invalid"
    assert assignments.received(1, name) == (0, None)


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        (
            {"total_bytes": 5001},
            "too_large",
            "an update of 5001 bytes is larger than the 5000 that this assignment can have",
        ),
        ({"digest": "xyz"}, "invalid", "'xyz' is not a SHA-256"),
        ({"digest": "G" * 64}, "invalid", "is not a SHA-256"),
        ({"metrics": {str(i): 0.0 for i in range(33)}}, "invalid", "at most 32 metrics"),
        ({"metrics": {"x" * 101: 0.0}}, "invalid", "names of 1 to 100 printable characters"),
        ({"metrics": {"": 0.0}}, "invalid", "names of 1 to 100 printable characters"),
        ({"offset": 5}, "out_of_range", "the upload goes on at byte 0, not 5"),
    ],
)
def test_a_header_that_cannot_be_is_refused_before_any_byte(
    store: Store, assignments: Assignments, change: dict[str, object], kind: str, says: str
) -> None:
    name = offer(store)
    with pytest.raises(UploadError, match=says) as caught:
        assignments.check_header(1, header(name, **change), 5000)  # type: ignore[arg-type]
    assert caught.value.kind == kind
    assert not any(assignments.spool.iterdir())


def test_metrics_that_are_no_numbers_are_left_out(store: Store, assignments: Assignments) -> None:
    name = offer(store)
    assignments.append(header(name), DATA)
    assignments.finish(1, header(name, metrics={"loss": math.nan, "accuracy": 0.5, "speed": math.inf}))
    assert updates(store)[0].metrics == {"accuracy": 0.5}


def test_an_evaluation_is_handed_in_without_bytes(store: Store, assignments: Assignments) -> None:
    name = offer(store)
    assert assignments.finish(1, header(name, b"", digest="")) == Receipt(True)
    assert updates(store)[0].bytes == 0
    assert not assignments.upload_path(name).exists()


@pytest.mark.parametrize("closed", [False, True])
def test_after_the_end_an_update_is_not_accepted_and_not_kept(
    store: Store, assignments: Assignments, closed: bool
) -> None:
    """Whether the coordinator has noticed that the time is up, or not yet."""
    name = offer(store)
    assignments.append(header(name), DATA)
    move(store, name, deadline=now() + PAST)
    if closed:
        assignments.expire([name])
    receipt = assignments.finish(1, header(name))
    assert not receipt.accepted
    assert receipt.reason == "too late: the round's deadline has passed; check in for the next"
    assert updates(store) == []
    assert not any(assignments.spool.iterdir())
    if closed:
        later = assignments.check_header(1, header(name), 5000)
        assert later == Receipt(False, "the assignment has ended: the round's deadline has passed")


def test_settled_assignments_leave_no_bytes_behind(store: Store, assignments: Assignments) -> None:
    whole, part = offer(store, number=1), offer(store, number=2)
    hand_in(assignments, whole)
    assignments.append(header(part), DATA[:10])
    assert len(list(assignments.spool.iterdir())) == 2
    assignments.forget([whole, part, "never-seen"])
    assert not any(assignments.spool.iterdir())


# ---- who is there ----------------------------------------------------------------------------------------------------


def test_devices_with_examples_count_as_there_while_they_ask_and_shortly_after(store: Store) -> None:
    with store.write() as session:
        for name, channel, examples, until in (
            ("asks", "stable", 5, 20),
            ("just asked", "stable", 5, 1),
            ("long ago", "stable", 5, -1),
            ("never", "stable", 5, None),
            ("empty", "stable", 0, 20),
            ("elsewhere", "beta", 5, 20),
        ):
            moment = None if until is None else now() + timedelta(seconds=until)
            device_named(session, name, channel=channel, examples=examples, present_until=moment)
    with store.read() as session:
        assert sorted(devices_online(session, "stable").values()) == ["asks", "just asked"]


def test_who_is_there_is_looked_up_in_an_index(store: Store) -> None:
    if not store.is_sqlite:
        pytest.skip("PostgreSQL reads a small table whole, whatever its indexes")
    statement = sa.select(Device.id).where(Device.channel == "stable", Device.present_until >= now())
    with store.engine.connect() as connection:
        text = statement.compile(store.engine, compile_kwargs={"literal_binds": False})
        plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}", tuple(text.construct_params().values())).all()
    assert "ix_devices_channel_present_until (channel=? AND present_until>?)" in str(plan)


def test_a_device_that_accepts_works_and_is_back_soon_after_its_answer(store: Store, assignments: Assignments) -> None:
    with store.write() as session:
        session.execute(sa.update(Device).values(examples=5, present_until=now() + timedelta(seconds=60)))
    offer(store)
    assignments.next_for(1, LEASE_S)
    with store.read() as session:
        assert session.get_one(Device, 1).present_until <= now() + timedelta(seconds=AWAY_S)
        assert session.get_one(Device, 2).present_until > now() + timedelta(seconds=50)


def test_handing_in_counts_as_being_seen(store: Store, assignments: Assignments) -> None:
    hand_in(assignments, offer(store))
    with store.write() as session:
        session.execute(sa.update(Device).values(examples=5))
    with store.read() as session:
        assert devices_online(session, "stable") == {1: "phone"}


def test_a_second_upload_does_not_take_the_place_of_one_that_counts(store: Store, assignments: Assignments) -> None:
    name, other = offer(store), DATA[::-1]
    for data in (DATA, other):  # both begin before either has ended
        assert assignments.check_header(1, header(name, data), 5000) is None
    assignments.append(header(name), DATA)
    assert assignments.finish(1, header(name)) == Receipt(True)
    assignments.append(header(name, other), other)
    assert assignments.finish(1, header(name, other)) == Receipt(True)
    assert assignments.upload_path(name).read_bytes() == DATA
    assert updates(store)[0].digest == hashlib.sha256(DATA).hexdigest()


def test_an_update_that_ends_while_its_assignment_expires_is_either_counted_or_refused(
    store: Store, assignments: Assignments
) -> None:
    for number in range(1, 9):
        name = offer(store, number=number, deadline=timedelta(milliseconds=30))
        threads = [threading.Thread(target=assignments.expire, args=([name],)) for _ in range(2)]
        receipts: list[Receipt] = []
        threads.append(threading.Thread(target=lambda name=name, to=receipts: to.append(hand_in(assignments, name))))  # type: ignore[misc]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assignments.expire([name])
        assert (row(store, name).status == "uploaded") == receipts[0].accepted


def test_no_control_character_of_a_device_is_stored(store: Store, assignments: Assignments) -> None:
    name = offer(store)
    with pytest.raises(UploadError, match="printable"):
        assignments.check_header(1, header(name, metrics={"a\0b": 1.0}), 5000)
    with pytest.raises(UploadError, match="is not a SHA-256"):
        assignments.check_header(1, header(name, b"", digest="x" * 100), 5000)
    with pytest.raises(UploadError, match="holds no assignment"):
        assignments.received(1, "1-1\0")
    assignments.decline(1, name, "low\0 \x1b[31mbattery")
    assert row(store, name).error == "low   [31mbattery"
