"""Releases in stages: whose turn it is, how devices judge, what halts one and takes it back; with real servers and databases."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import sqlalchemy as sa

from pocketfed.client_sdk import Device
from pocketfed.client_sdk.artifacts import Artifact
from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.client_sdk.trainer import Examples, TrainConfig, train
from pocketfed.coordinator import signing
from pocketfed.coordinator.artifacts import BuiltArtifact, manifest_bytes, publish_artifact
from pocketfed.coordinator.config import RunConfig, RunConfigError
from pocketfed.coordinator.enrolment import create_key
from pocketfed.coordinator.operators import Actor, OperatorError, acting, audit_lines
from pocketfed.coordinator.progress import begin_run, create_run, finish_run
from pocketfed.coordinator.releases import (
    add_release,
    become,
    events,
    halt,
    open_releases,
    pause,
    promote,
    release_for,
    roll_back,
    shares,
)
from pocketfed.coordinator.reports import comparisons
from pocketfed.coordinator.rollout import (
    Comparison,
    ReleaseError,
    Rollout,
    bucket,
    compare,
    judge,
    sdk_fits,
    version_key,
)
from pocketfed.coordinator.server import CoordinatorServer, ServerConfig
from pocketfed.coordinator.store import (
    Audit,
    Release,
    ReleaseReport,
    Run,
    Store,
    latest_release,
    now,
    put_artifact,
    put_blob,
)
from pocketfed.coordinator.store import Device as DeviceRow
from pocketfed.model.parameters import encode_vector
from pocketfed.model.tasks import Dataset
from pocketfed.protos import distribution_pb2, distribution_pb2_grpc, fleet_pb2, fleet_pb2_grpc

PATIENCE_S = 20.0
THETA = np.arange(3, dtype=np.float32)
STAGED = Rollout(percent=50, margin=0.02, min_devices=3)


# ---- whose turn it is ------------------------------------------------------------------------------------------------


def test_a_device_has_its_place_for_good_and_all_places_are_as_likely() -> None:
    names = [f"device-{i}" for i in range(10_000)]
    places = [bucket("stable", name) for name in names]
    digest = hashlib.sha256(b"stable\0device-0").hexdigest()
    assert places[0] == int(digest[:8], 16) / 2**32 * 100  # of every platform, process and release
    assert all(0 <= place < 100 for place in places)
    counts = np.bincount([int(place // 5) for place in places], minlength=20)
    assert ((counts - 500) ** 2 / 500).sum() < 43.8  # chi-square of 19 degrees, 99.9 %
    first, more = ({n for n, p in zip(names, places, strict=True) if p < percent} for percent in (10, 30))
    assert first < more
    other = np.array([bucket("beta", name) for name in names])
    assert abs(np.corrcoef(places, other)[0, 1]) < 0.03  # who is first on one channel is not so on the next


@pytest.mark.parametrize(
    ("version", "least", "most", "fits"),
    [
        ("0.10.0", "0.9", "", True), ("0.2.0", "0.2", "0.2", True), ("0.2", "0.2.0", "0.2.0", True),
        ("0.2.7", "", "0.2", True), ("0.3.0", "", "0.2", False), ("0.3.0", "", "0.3.0", True),
        ("0.3.1", "", "0.3.0", False), ("0.3.0rc1", "0.3.0", "", False), ("0.3.0-beta.2", "0.3", "", False),
        ("0.3.0+local", "0.3.0", "", True), ("0.3.0.post1", "0.3.0", "", True), ("1", "0.3", "", True),
        ("", "0.1", "", False), ("", "", "", True), ("v0.3", "0.1", "", False), ("0.3\n", "0.4", "", False),
        ("9" * 10_000, "0.1", "", False), ("٣.0", "0.1", "", False), ("0..3", "0.1", "", False), ("-1", "", "9", False),
        ("0.3.0" + "\0" * 10_000, "0.1", "", False), ("1." * 1000, "", "9", False),
    ],
)  # fmt: skip
def test_versions_are_compared_as_numbers_and_what_is_none_fits_no_range(
    version: str, least: str, most: str, fits: bool
) -> None:
    assert sdk_fits(version, least, most) is fits


def test_a_longer_version_is_not_a_newer_one() -> None:
    assert version_key("0.3.0") == version_key("0.3")
    assert version_key("0.3.0.0.1") is not None


# ---- how it is judged ------------------------------------------------------------------------------------------------


@dataclass
class Said:
    examples: int
    correct: int
    correct_before: int
    loss_sum: float = 0.0
    loss_sum_before: float = 0.0
    went_back: bool = False


def verdict(*reports: Said, margin: float = 0.02, loss_margin: float = 0.1, least: int = 3) -> str:
    return compare("", reports, margin, loss_margin, least).verdict


def test_a_cohort_that_loses_more_than_the_margin_says_worse_and_the_numbers_are_means() -> None:
    found = compare(
        "pilot", [Said(10, 5, 8, 20, 10), Said(10, 6, 8, 10, 10, True), Said(20, 10, 16, 40, 20)], 0.1, 1, 3
    )
    # (10 * 0.5 + 10 * 0.6 + 20 * 0.5) / 40, (10 * 2 + 10 * 1 + 20 * 2) / 40
    assert found == Comparison("pilot", 3, 40, pytest.approx(0.525), 0.8, 1.75, 1.0, 1, "worse")


def test_a_difference_counts_beyond_the_margin_only_and_only_of_enough_devices() -> None:
    same, lower = Said(100, 80, 80), Said(100, 78, 80)
    assert verdict(same, same, same) == "fine"
    assert verdict(lower, lower, lower) == "fine"  # 0.02 lower is not more than 0.02
    assert verdict(lower, lower, lower, margin=0.019) == "worse"
    assert verdict(Said(10, 0, 10), Said(10, 0, 10)) == "few"
    assert verdict(Said(10, 9, 5), Said(10, 9, 5), Said(10, 9, 5)) == "fine"


def test_chance_is_not_taken_for_harm() -> None:
    reports = [
        Said(4, 3, 4),
        Said(4, 4, 3),
        Said(4, 3, 4),
        Said(4, 4, 4),
        Said(4, 4, 4),
    ]  # 0.05 lower, all of it one example
    assert verdict(*reports) == "unclear"
    assert verdict(*[Said(400, 380, 400)] * 5) == "worse"  # 0.05 lower everywhere


def test_loss_decides_where_accuracy_is_no_better() -> None:
    assert verdict(*[Said(10, 5, 5, 12, 10)] * 3) == "worse"  # 0.2 nats an example
    assert verdict(*[Said(10, 5, 5, 11, 10)] * 3) == "fine"  # 0.1 is not more than 0.1
    assert verdict(*[Said(10, 6, 5, 12, 10)] * 3) == "fine"  # more confident, and right more often
    # One diverges: as 20 nats, not as 1e300
    assert compare("", [Said(1, 0, 0, 1e300, 0)] * 3, 0.02, 0.1, 3).loss == 20.0


def test_one_device_alone_makes_nothing_worse_whatever_it_says() -> None:
    draw = random.Random(0)
    for count in [*range(2, 30)] * 20:
        honest = [Said(n, 0, 0, 1.0, 1.0) for n in (draw.choice((1, 2, 7, 1000)) for _ in range(count - 1))]
        loud = draw.choice((Said(10**6, 0, 10**6), Said(1, 0, 1), Said(10**6, 0, 0, 1e308, 0.0), Said(3, 0, 3, 60, 0)))
        assert verdict(*honest, loud, least=2) in ("fine", "unclear")


def test_a_large_report_counts_as_two_of_the_median_at_most() -> None:
    found = compare("", [Said(10, 10, 10), Said(10, 10, 10), Said(10**6, 0, 10**6)], 0.02, 0.1, 3)
    assert found.accuracy == pytest.approx(2 / 4)
    assert found.examples == 10**6 + 20


def test_the_rule_of_three_standard_errors_by_hand() -> None:
    # Mean 0.75, deviations 0.25 and -0.25: error sqrt(2 * 0.0625 * 2 / 1) / 2 = 0.25, and 0.75 is not more than three of it
    assert judge([1.0, 0.5], [1.0, 1.0], 0.02) == "unclear"
    assert judge([0.99, 0.51], [1.0, 1.0], 0.02) == "worse"


@pytest.mark.parametrize(("count", "needed"), [(5, 4), (10, 6), (20, 7), (100, 9)])
def test_so_many_devices_have_to_lie_together(count: int, needed: int) -> None:
    for liars in range(count + 1):
        says = judge([1.0] * liars + [0.0] * (count - liars), [1.0] * count, 0.02)
        assert (says == "worse") is (liars >= needed)


@pytest.mark.parametrize(("harm", "least", "most"), [(0.0, 0.0, 0.05), (0.05, 0.7, 0.85), (0.1, 0.98, 1.0)])
def test_chance_halts_few_releases_and_harm_most(harm: float, least: float, most: float) -> None:
    """60 devices with 10 examples each report one after the other; a tenth of the answers change, as many for the better."""
    rng = np.random.default_rng(0)
    halted = 0
    for _ in range(300):
        lost, won = rng.binomial(10, 0.05 + harm, 60), rng.binomial(10, 0.05, 60)
        worse_by = [float(d) for d in (lost - won) / 10]
        halted += any(judge(worse_by[:n], [1.0] * n, 0.02) == "worse" for n in range(5, 61))
    assert least <= halted / 300 <= most


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"percent": 0}, "0 % of the devices cannot be"), ({"percent": 100.5}, "100.5 % of the devices cannot be"),
        ({"percent": float("nan")}, "cannot be"), ({"margin": -0.1}, "the margin is -0.1"),
        ({"loss_margin": float("inf")}, "the loss_margin is inf"), ({"min_devices": 1}, "min_devices is 1; give 2 or more"),
        ({"automatic": True}, "nobody judges cannot go on by itself"), ({"min_sdk": "new"}, "'new' is not a version"),
    ],
)  # fmt: skip
def test_a_rollout_that_cannot_be_is_refused_in_a_sentence(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ReleaseError, match=says):
        Rollout(**values)


# ---- a coordinator and bare devices ----------------------------------------------------------------------------------


class Bare:
    """A device by its calls alone."""

    def __init__(
        self, link: grpc.Channel, name: str, key: str = "", sdk: str = "0.2.0", channel: str = "stable"
    ) -> None:
        self.fleet = fleet_pb2_grpc.FleetStub(link)
        self.distribution = distribution_pb2_grpc.DistributionStub(link)
        self.name, self.sdk, self.holds = name, sdk, 0
        token = name.ljust(43, "-")
        self.fleet.Enrol(
            fleet_pb2.EnrolRequest(
                name=name, protocol=1, token=token, enrolment_key=key, sdk_version=sdk, channel=channel
            )
        )
        self.metadata = (("authorization", f"Bearer {token}"),)

    def ask(self, wait_s: float = 0.0, **values: Any) -> Any:
        request = fleet_pb2.CheckInRequest(
            protocol=1, sdk_version=self.sdk, wait_s=wait_s, **({"release_id": self.holds} | values)
        )
        return self.fleet.CheckIn.future(request, metadata=self.metadata)

    def check_in(self, **values: Any) -> int:
        """Takes what it is given; returns that release's number, 0 for none."""
        reply = self.ask(**values).result(PATIENCE_S)
        self.holds = int(reply.release.id) or self.holds
        self.waits = reply.wait.reason
        return int(reply.release.id)

    def report(self, release: int, before: int, examples: int, correct: int, correct_before: int, **more: Any) -> Any:
        said = fleet_pb2.ReleaseReport(
            release_id=release,
            before_id=before,
            examples=examples,
            correct=correct,
            correct_before=correct_before,
            **more,
        )
        return self.ask(report=said)

    def latest(self, channel: str = "stable") -> distribution_pb2.GetManifestReply:
        request = distribution_pb2.GetManifestRequest(channel=channel)
        return self.distribution.GetManifest(request, metadata=self.metadata)


class Fleet:
    """A served database with release 1 live on `stable`: version a…, parameters THETA."""

    def __init__(self, database: str, folder: Path) -> None:
        self.store = Store(database)
        for letter in "abc":
            self.put(letter)
        self.release("a")
        self.server = CoordinatorServer(self.store, ServerConfig("127.0.0.1:0"), folder / "spool")
        self.link = grpc.insecure_channel(f"127.0.0.1:{self.server.start()}")
        self.numbers = itertools.count()

    def put(self, letter: str) -> None:
        with self.store.write() as session:
            data = encode_vector("theta", THETA)
            entry = {"theta": {"sha256": put_blob(session, data), "bytes": len(data)}}
            sets = {"head": {"initial": "theta", "size": 3}}
            put_artifact(session, {"trainable_sets": sets, "files": entry, "name": letter}, letter * 64, [data])

    def release(self, letter: str, scale: float = 1.0, rollout: Rollout | None = None, channel: str = "stable") -> int:
        with self.store.write() as session:
            digest = put_blob(session, encode_vector("theta", scale * THETA))
            made = Release(channel=channel, artifact_version=letter * 64, trainable_set="head", parameters=digest)
            return add_release(session, made, rollout or Rollout(), "ann").id

    def devices(self, count: int, low: float = 0, high: float = 100, cohort: str = "", **options: Any) -> list[Bare]:
        """Whose places on `stable` are from `low` to below `high`."""
        key = ""
        if cohort:
            with self.store.write() as session:
                key = create_key(session, count, cohort=cohort)[1]
        named = (f"device-{i}" for i in self.numbers)
        return [
            Bare(self.link, name, key, **options)
            for name in itertools.islice((n for n in named if low <= bucket("stable", n) < high), count)
        ]

    def state(self, release: int) -> str:
        with self.store.read() as session:
            return session.get_one(Release, release).state

    def history(self, release: int) -> list[tuple[str, float, str]]:
        with self.store.read() as session:
            return [(e.state, e.percent, e.who) for e in events(session, release)]

    def audit(self, act: str) -> list[Audit]:
        with self.store.read() as session:
            return [a for a in audit_lines(session) if a.act == act]

    def close(self) -> None:
        self.link.close()
        self.server.stop()
        self.store.close()


@pytest.fixture
def fleet(database: str, tmp_path: Path) -> Iterator[Fleet]:
    made = Fleet(database, tmp_path)
    yield made
    made.close()


def results(calls: Sequence[Any]) -> list[Any]:
    return [call.result(PATIENCE_S) for call in calls]


def test_fault_30_a_release_that_is_worse_for_one_cohort_is_halted_and_taken_back_by_itself(fleet: Fleet) -> None:
    pilots, others = fleet.devices(4, 0, 50, "pilot"), fleet.devices(6, 0, 50, "others")
    (outside,) = fleet.devices(1, 50, 100, "pilot")
    everyone = [*pilots, *others, outside]
    assert [device.check_in() for device in everyone] == [1] * 11
    new = fleet.release("b", rollout=STAGED)
    assert [device.check_in() for device in everyone] == [new] * 10 + [0]
    # Better for the many, worse for the few: a mean over all would not show it.
    results([device.report(new, 1, 50, 45, 40, loss_sum=25, loss_sum_before=30) for device in others])
    results([device.report(new, 1, 20, 10, 16) for device in pilots[:2]])
    assert fleet.state(new) == "staged"  # two of three
    with fleet.store.read() as session:
        made = comparisons(session, session.get_one(Release, new))
    assert [(c.cohort, c.devices, c.verdict) for c in made] == [("others", 6, "fine"), ("pilot", 2, "few")]
    waits = [pilots[0].ask(PATIENCE_S), others[0].ask(PATIENCE_S)]
    assert fleet.state(new) == "staged"
    back = pilots[2].report(new, 1, 20, 11, 16).result(PATIENCE_S).release
    assert fleet.state(new) == "halted"
    assert (back.id, back.artifact_version) == (new + 1, "a" * 64)
    assert [reply.release.id for reply in results(waits)] == [back.id] * 2  # who waits is told at once
    assert [pilots[3].check_in(), pilots[3].check_in()] == [back.id, 0]  # the second time it says so
    assert outside.check_in() == 0  # it never had it, and runs what the others go back to
    (line,) = fleet.audit("release.halt")
    assert (line.who, line.target, line.outcome) == ("coordinator", f"{new} {'b' * 64}", "done")
    assert line.detail == (
        f"release {back.id} takes its place: cohort 'pilot': accuracy 0.5167 after 0.8000, loss 0.000 after 0.000, "
        "3 devices, 60 examples"
    )
    assert fleet.history(new) == [("staged", 50.0, "ann"), ("halted", 50.0, "coordinator")]
    with fleet.store.read() as session:
        assert latest_release(session, "stable").id == back.id  # type: ignore[union-attr]
        assert shares(session, "stable") == {1: 1, back.id: 1, new: 9}
    (late,) = fleet.devices(1, cohort="late")
    assert late.check_in() == late.latest().release.id == back.id


def test_reports_that_come_all_at_once_halt_a_release_once(fleet: Fleet) -> None:
    devices = fleet.devices(12)
    new = fleet.release("b", rollout=Rollout(percent=100, min_devices=4))  # live at once, and watched
    replies = results([device.report(new, 1, 10, 2, 9) for device in devices])
    assert fleet.state(new) == "halted"
    assert len(fleet.audit("release.halt")) == 1
    assert {r.release.id for r in replies} <= {new, new + 1}
    with fleet.store.read() as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(ReleaseReport)) == 12
        assert session.scalar(sa.select(sa.func.max(Release.id))) == new + 1
        assert (shares(session, "stable"), fleet.state(1)) == ({0: 12}, "superseded")


def test_devices_beyond_the_percentage_keep_what_they_have_and_promoting_takes_in_more(fleet: Fleet) -> None:
    first, second, last = (fleet.devices(1, *where)[0] for where in ((0, 10), (10, 30), (30, 100)))
    for device in (first, second, last):
        assert device.check_in() == 1
    new = fleet.release("b", rollout=Rollout(percent=10))
    assert [d.check_in() for d in (first, second, last)] == [new, 0, 0]
    assert [d.latest().release.id for d in (first, second, last)] == [new, 1, 1]
    assert second.latest().version == "a" * 64
    with fleet.store.write() as session:
        promote(session, new, "ann", 30)
    assert [d.check_in() for d in (first, second, last)] == [0, new, 0]
    with fleet.store.write() as session:
        pause(session, new, "ann")
    (newcomer,) = fleet.devices(1, 0, 10)
    assert newcomer.check_in() == newcomer.latest().release.id == 1
    assert first.check_in() == 0  # and keeps it
    with fleet.store.write() as session:
        promote(session, new, "bob")
    assert [d.check_in() for d in (newcomer, first, second, last)] == [new, 0, 0, new]
    assert fleet.history(new) == [
        ("staged", 10.0, "ann"), ("staged", 30.0, "ann"), ("paused", 30.0, "ann"), ("live", 100.0, "bob"),
    ]  # fmt: skip
    assert fleet.history(1) == [("live", 100.0, "ann"), ("superseded", 100.0, "bob")]


def test_an_sdk_out_of_range_keeps_its_release_and_hears_why(fleet: Fleet) -> None:
    (old,), (now,), (odd,) = (fleet.devices(1, sdk=sdk) for sdk in ("0.2.9", "0.3.1", "'; DROP TABLE releases\0" * 9))
    for device in (old, now, odd):
        device.check_in()
    new = fleet.release("b", rollout=Rollout(min_sdk="0.3", max_sdk="0.4"))
    assert [d.check_in() for d in (old, now, odd)] == [0, new, 0]
    assert old.waits.endswith(f"; release {new} is for SDK 0.3 up to 0.4, not '0.2.9': update the app")
    assert "update the app" in odd.waits
    assert [d.latest().release.id for d in (old, now)] == [1, new]
    assert fleet.state(1) == "live"  # for the old ones
    assert fleet.release("c", rollout=Rollout(min_sdk="0.3", max_sdk="0.4")) == new + 1
    assert (fleet.state(1), fleet.state(new)) == ("live", "superseded")
    assert fleet.release("c") == new + 2
    assert (fleet.state(1), fleet.state(new + 1)) == ("superseded", "superseded")
    assert [d.check_in() for d in (old, now, odd)] == [new + 2] * 3


def test_a_channel_that_has_nothing_for_an_sdk_says_so(fleet: Fleet) -> None:
    fleet.release("a", rollout=Rollout(min_sdk="0.3"), channel="beta")
    (device,) = fleet.devices(1, sdk="0.2.0", channel="beta")
    with pytest.raises(grpc.RpcError) as caught:
        device.latest("beta")
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND  # type: ignore[attr-defined]
    assert "release 2 is for SDK 0.3 or newer, not '0.2.0': update the app" in caught.value.details()  # type: ignore[attr-defined]


def test_a_device_reports_once_and_what_cannot_be_is_not_kept(fleet: Fleet) -> None:
    (inside,), (outside,) = fleet.devices(1, 0, 50), fleet.devices(1, 50, 100)
    new = fleet.release("b", rollout=STAGED)
    elsewhere = fleet.release("a", channel="beta")
    assert {device.check_in() for device in (inside, outside)} == {new, 1}
    for values in (
        (new, 1, 0, 0, 0), (new, 1, 10, 11, 0), (new, 1, 10, 0, 11), (new, 1, 10**6 + 1, 0, 0), (new, 1, 2**32 - 1, 0, 0),
        (1, new, 10, 5, 5), (new, new, 10, 5, 5), (new, 0, 10, 5, 5), (99, 1, 10, 5, 5), (2**64 - 1, 1, 10, 5, 5),
        (elsewhere, 1, 10, 5, 5), (elsewhere, new, 10, 5, 5),
    ):  # fmt: skip
        results([inside.report(*values)])
    for loss in (float("nan"), float("inf"), -1.0):
        results([inside.report(new, 1, 10, 5, 5, loss_sum=loss), inside.report(new, 1, 10, 5, 5, loss_sum_before=loss)])
    results([outside.report(new, 1, 10, 0, 10)])  # it was not for this device
    with fleet.store.read() as session:
        assert session.scalars(sa.select(ReleaseReport)).all() == []
    results([inside.report(new, 1, 10, 7, 8, went_back=True)])
    results([inside.report(new, 1, 10, 0, 10)])
    with fleet.store.read() as session:
        (kept,) = session.scalars(sa.select(ReleaseReport)).all()
        assert (kept.correct, kept.correct_before, kept.went_back, kept.cohort) == (7, 8, True, None)
        assert shares(session, "stable") == {1: 2}  # one by itself has gone back


def test_hostile_reports_of_one_device_or_of_one_key_do_not_halt_what_others_find_good(fleet: Fleet) -> None:
    good, bad = fleet.devices(4, cohort="pilot"), fleet.devices(1, cohort="pilot")
    new = fleet.release("b", rollout=Rollout(min_devices=5))
    results([d.report(new, 1, 10, 9, 9) for d in good])
    results([d.report(new, 1, 10**6, 0, 10**6, loss_sum=1e308) for d in bad])
    assert fleet.state(new) == "live"
    with fleet.store.read() as session:
        (found,) = comparisons(session, session.get_one(Release, new))
    assert (found.devices, found.verdict) == (5, "unclear")


def test_only_reports_beside_the_parent_are_judged(fleet: Fleet) -> None:
    devices = fleet.devices(6)
    second = fleet.release("b")
    third = fleet.release("c", rollout=Rollout(min_devices=3))
    results(
        [d.report(third, 1, 10, 0, 10) for d in devices[:3]]
    )  # beside its grandparent: it says nothing of this step
    assert fleet.state(third) == "live"
    results([d.report(third, second, 10, 0, 10) for d in devices[3:]])
    assert fleet.state(third) == "halted"
    # What runs again has another number and the same content: a report beside either of them counts.
    fourth = fleet.release("b", 2.0, Rollout(min_devices=3))
    results(
        [d.report(fourth, before, 10, 0, 10) for d, before in zip(devices, (second, third + 1, second), strict=False)]
    )
    assert fleet.state(fourth) == "halted"


def test_an_automatic_release_goes_up_its_steps_and_stops_where_it_is_worse(fleet: Fleet) -> None:
    plan = Rollout(percent=5, min_devices=2, automatic=True)
    new = fleet.release("b", rollout=plan)
    seen = []
    for low, high in ((0, 5), (5, 20), (20, 50)):
        devices = fleet.devices(2, low, high)
        results([devices[0].report(new, 1, 10, 9, 9)])
        seen.append(fleet.history(new)[-1])
        results([devices[1].report(new, 1, 10, 9, 9)])
    assert seen == [("staged", 5.0, "ann"), ("staged", 20.0, "coordinator"), ("staged", 50.0, "coordinator")]
    assert (fleet.state(new), fleet.state(1)) == ("live", "superseded")
    assert [a.target for a in fleet.audit("release.promote")] == [f"{new} {p} %" for p in (100, 50, 20)]
    late = fleet.devices(8, cohort="late")
    results([d.report(new, 1, 10, 0, 10) for d in late])
    assert fleet.state(new) == "halted"  # live, and judged as long as nothing follows it
    assert late[0].check_in(release_id=new) == new + 1


def test_a_release_worse_by_what_may_be_chance_does_not_go_on_by_itself(fleet: Fleet) -> None:
    new = fleet.release("b", rollout=Rollout(percent=50, min_devices=2, automatic=True))
    first, second = fleet.devices(2, 0, 50)
    results([first.report(new, 1, 10, 9, 9), second.report(new, 1, 10, 8, 9)])
    assert fleet.history(new) == [("staged", 50.0, "ann")]
    with fleet.store.write() as session:
        promote(session, new, "ann", automatic=False)  # all the way, by hand
    assert fleet.state(new) == "live"


def test_a_newer_release_ends_the_stages_of_the_one_before(fleet: Fleet) -> None:
    (early,), (late,) = fleet.devices(1, 0, 10), fleet.devices(1, 10, 100)
    canary = fleet.release("b", rollout=Rollout(percent=50))
    assert early.check_in() == canary
    following = fleet.release("c", rollout=Rollout(percent=10))
    assert fleet.state(canary) == "superseded"
    assert (early.check_in(), late.check_in()) == (following, 1)
    with fleet.store.read() as session:
        assert session.get_one(Release, following).parent_id == 1  # what everybody else runs
    with fleet.store.write() as session:
        halt(session, session.get_one(Release, following), "the operator's test")
    assert (early.check_in(), late.check_in()) == (following + 1, 0)


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda s: promote(s, 1, "ann"), "release 1 is live, so there is nothing to promote"),
        (lambda s: promote(s, 2, "ann", 5), "release 2 has 50 % of the devices, more than 5; what they have they keep"),
        (lambda s: promote(s, 2, "ann", 101), "101 % of the devices cannot be"),
        (lambda s: promote(s, 9, "ann"), "there is no release 9"),
        (lambda s: promote(s, 2**63, "ann"), "there is no release 9223372036854775808"),
        (lambda s: pause(s, 1, "ann"), "release 1 is live, so there is nothing to pause"),
        (lambda s: roll_back(s, None, "stable", "9"), "there is no release 9"),
        (lambda s: roll_back(s, None, "beta", "1"), "release 1 is on 'stable', not on 'beta'"),
        (lambda s: roll_back(s, None, "stable", "c" * 8), "0 versions on 'stable' begin with 'cccccccc'"),
        (lambda s: roll_back(s, None, "stable", "x'; --"), "is no release's number and not the beginning of a version"),
    ],
)  # fmt: skip
def test_what_a_release_cannot_become_is_refused_in_a_sentence(tmp_path: Path, act: Any, says: str) -> None:
    fleet = Fleet(str(tmp_path / "fleet.db"), tmp_path)
    fleet.release("b", rollout=Rollout(percent=50))
    with fleet.store.write() as session, pytest.raises(ReleaseError, match=says):
        act(session)
    fleet.close()


def test_an_operator_goes_back_by_number_or_version_and_devices_follow(fleet: Fleet) -> None:
    (device,) = fleet.devices(1)
    fleet.release("b")
    assert device.check_in() == 2
    with fleet.store.write() as session:
        assert roll_back(session, None, "stable", "1", "ann").artifact_version == "a" * 64
    assert (device.check_in(), device.latest().version) == (3, "a" * 64)
    assert fleet.state(2) == "rolled_back"
    with fleet.store.write() as session:
        assert roll_back(session, None, "stable", "bbb", "ann").artifact_version == "b" * 64
    assert (device.check_in(), fleet.state(3)) == (4, "rolled_back")


def test_a_viewer_changes_no_release_and_the_audit_says_who_tried(fleet: Fleet) -> None:
    new = fleet.release("b", rollout=STAGED)
    with (
        pytest.raises(OperatorError, match="promote needs operator"),
        acting(fleet.store, Actor("eve", "viewer"), "promote", str(new)) as session,
    ):
        promote(session, new, "eve")
    for act, change in (("pause", pause), ("promote", promote)):
        with acting(fleet.store, Actor("ann", "operator"), act, str(new)) as session:
            change(session, new, "ann")
    lines = [(a.who, a.outcome) for act in ("promote", "pause") for a in fleet.audit(act)]
    assert lines == [("ann", "done"), ("eve", "refused"), ("ann", "done")]
    assert fleet.state(new) == "live"


def test_the_first_release_of_a_channel_is_for_all(fleet: Fleet) -> None:
    with pytest.raises(ReleaseError, match="the first release goes to all of them"):
        fleet.release("a", rollout=STAGED, channel="new")


def test_what_a_device_runs_is_remembered_and_nonsense_is_not(fleet: Fleet) -> None:
    (device,) = fleet.devices(1)

    def remembered(**values: Any) -> int | None:
        device.ask(**values).result(PATIENCE_S)
        with fleet.store.read() as session:
            return session.scalars(sa.select(DeviceRow.release_id).where(DeviceRow.name == device.name)).one()

    assert remembered(release_id=0) is None
    assert remembered(release_id=1) == 1
    second = fleet.release("b")
    assert remembered(release_id=second, refused_release=second, refusal="unsigned") == 1  # it knows 2 and runs 1
    assert remembered(release_id=second) == second
    assert remembered(release_id=77) is None
    assert remembered(release_id=2**64 - 1) is None
    assert remembered(release_id=fleet.release("a", channel="beta")) is None  # another channel's


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_a_runs_result_goes_out_in_stages_and_the_next_run_starts_from_what_is_live(fleet: Fleet) -> None:
    config = RunConfig(rollout=10, rollout_devices=3, rollout_margin=0.05, rollout_auto=True)
    run = create_run(fleet.store, config)
    begin_run(fleet.store, run)
    finish_run(fleet.store, run, config, 2 * THETA)
    with fleet.store.read() as session:
        made = session.get_one(Release, 2)
        assert (made.state, made.percent, made.margin, made.min_devices, made.automatic) == (
            "staged",
            10,
            0.05,
            3,
            True,
        )
        assert (made.parent_id, made.run_id) == (1, run)
        assert latest_release(session, "stable").id == 1  # type: ignore[union-attr]
        early = next(n for n in (f"d{i}" for i in itertools.count()) if bucket("stable", n) < 10)
        assert release_for(session, "stable", early, "")[0] is made
        assert release_for(session, "stable", early, "", among=[])[0] is None
    with pytest.raises(RunConfigError, match="rollout: 0 % of the devices cannot be"):
        RunConfig(rollout=0)
    with pytest.raises(RunConfigError, match="rollout: the margin is 2"):
        RunConfig(rollout=10, rollout_margin=2.0)


@pytest.mark.parametrize("halted", [True, False])
def test_a_run_keeps_the_artifact_it_began_with_and_is_released_only_if_the_channel_has_it_still(
    fleet: Fleet, halted: bool
) -> None:
    config = RunConfig()
    if halted:
        fleet.release("b", rollout=Rollout(min_devices=3))
    run = create_run(fleet.store, config)
    begin_run(fleet.store, run)
    if halted:  # what it trains is taken back meanwhile
        with fleet.store.write() as session:
            halt(session, session.get_one(Release, 2), "worse")
    else:  # something else is on trial meanwhile
        fleet.release("b", rollout=STAGED)
    finish_run(fleet.store, run, config, THETA)
    with fleet.store.read() as session:
        ended = session.get_one(Run, run)
        other = ("a" if halted else "b") * 12
        assert (ended.status, ended.reason) == (
            "finished",
            f"not released: 'stable' has gone on to the artifact {other}",
        )


# ---- signed ----------------------------------------------------------------------------------------------------------


class Signed:
    """A served, signed fleet of the nano artifact in two versions, and a real device in its first ten per cent."""

    def __init__(self, folder: Path, built: BuiltArtifact) -> None:
        self.folder, self.first = folder, built
        data = built.manifest | {"parent": built.version}
        self.second = BuiltArtifact(hashlib.sha256(manifest_bytes(data)).hexdigest(), data, built.folder)
        self.store = Store(str(folder / "fleet.db"))
        self.publish(self.first)
        self.server = CoordinatorServer(self.store, ServerConfig("127.0.0.1:0"))
        self.address = f"127.0.0.1:{self.server.start()}"
        self.link = grpc.insecure_channel(self.address)
        self.early = (f"phone-{i}" for i in itertools.count() if bucket("stable", f"phone-{i}") < 10)
        self.devices: list[Device] = []
        self.device = self.open()
        self.bare = [Bare(self.link, next(self.early)) for _ in range(3)]

    def open(self) -> Device:
        name = next(self.early)
        # It leaves going back to the coordinator.
        self.devices.append(Device(self.address, self.folder / name, name=name, fallback_margin=1.0))
        return self.devices[-1]

    def publish(self, built: BuiltArtifact, rollout: Rollout | None = None, trainable_set: str = "head") -> int:
        with self.store.write() as session:
            self.keys = signing.ensure_keys(session, self.folder / "keys")
            return publish_artifact(session, built, "stable", trainable_set, self.keys, rollout=rollout).id

    def check_in(self, device: Device | None = None) -> str:
        """One turn of a device's background thread; the version of its newest release then."""
        device = device or self.device
        device.enrol()
        part = device._participation
        part.judge()
        part.failing = True  # it does not wait
        part.ask_for_work()
        return str(self.shelf(device)["artifact"])

    def shelf(self, device: Device) -> dict[str, Any]:
        return dict(json.loads((device.home / "release.json").read_text()))

    def may_train(self, version: str) -> None:
        self.device._models._vouched(version, release=False)

    def words(self, version: str) -> list[dict[str, Any]]:
        """What any device may hear of a version."""
        reply = self.bare[0].distribution.GetManifest(
            distribution_pb2.GetManifestRequest(version=version), metadata=self.bare[0].metadata
        )
        return [json.loads(reply.signed.statement)]

    def close(self) -> None:
        for device in self.devices:
            device.close()
        self.link.close()
        self.server.stop()
        self.store.close()


@pytest.fixture
def signed(tmp_path: Path, nano_built: BuiltArtifact) -> Iterator[Signed]:
    made = Signed(tmp_path, nano_built)
    yield made
    made.close()


def test_fault_30_a_signed_fleet_goes_back_by_itself_although_the_coordinator_has_no_key(
    signed: Signed, nano_artifact: Artifact, tiny_dataset: Dataset
) -> None:
    """Real devices: they measure, they tell, they go back; the new artifact's parameters are untrained."""
    trainer = PlanTrainer(nano_artifact, "full")
    texts, index = [e.text for e in tiny_dataset.train], {label: i for i, label in enumerate(tiny_dataset.labels)}
    examples = Examples(trainer.encode(texts, None, 32), np.array([index[e.label] for e in tiny_dataset.train]))
    start = trainer.initial_theta()
    learned = start + train(trainer, start, examples, TrainConfig(epochs=8, learning_rate=3e-3, seed=1)).delta
    with signed.store.write() as session:
        digest = put_blob(session, encode_vector("theta", learned))
        version = signed.first.version
        made = Release(channel="stable", artifact_version=version, trainable_set="full", parameters=digest)
        parent = add_release(session, made, Rollout(), "run").id
    devices = [signed.device, signed.open(), signed.open()]
    for device in devices:
        device.add_examples((e.text, e.label) for e in tiny_dataset.train)
        assert signed.check_in(device) == signed.first.version
    new = signed.publish(signed.second, Rollout(percent=10, min_devices=3), "full")
    for file in (signed.folder / "keys").iterdir():
        file.unlink()  # the publisher takes the keys home
    assert {signed.check_in(device) for device in devices} == {signed.second.version}
    (before,) = signed.words(signed.first.version)
    assert not before["rollback"]  # the way back is signed, and nobody hears of it yet
    assert [signed.check_in(device) for device in devices] == [
        signed.second.version, signed.second.version, signed.first.version,
    ]  # fmt: skip  # the third report is enough, and its answer holds the way back
    with signed.store.read() as session:
        (found,) = comparisons(session, session.get_one(Release, new))
        (line,) = [a for a in audit_lines(session) if a.act.startswith("release.")]
    assert (found.devices, found.verdict) == (3, "worse")
    assert found.accuracy < 0.5 < 0.9 < found.accuracy_before
    assert (line.act, line.target) == ("release.halt", f"{new} {signed.second.version}")
    (after,) = signed.words(signed.first.version)
    assert after["rollback"]
    assert after["sequence"] == after["oldest"] > before["sequence"]  # nor is the halted one trained on
    for device in devices:
        assert signed.check_in(device) == signed.first.version
        assert signed.shelf(device)["id"] == new + 1 == parent + 2
        right = sum(device.predict(e.text).label == e.label for e in tiny_dataset.test)
        assert right > 0.9 * len(tiny_dataset.test)


def test_what_a_device_holds_of_an_artifact_is_not_downloaded_again(signed: Signed) -> None:
    link = signed.device._link
    download, came = link.download, []

    def counting(digest: str, first_chunk: int = 0) -> Iterator[bytes]:
        for data in download(digest, first_chunk):
            came.append(len(data))
            yield data

    link.download = counting  # type: ignore[method-assign]
    assert signed.check_in() == signed.first.version
    sizes = {name: entry["bytes"] for name, entry in signed.first.manifest["files"].items()}
    (initial,) = [sizes[s["initial"]] for n, s in signed.first.manifest["trainable_sets"].items() if n == "head"]
    assert sum(came) == sum(sizes.values()) + initial  # the artifact, and the release's parameters
    came.clear()
    signed.publish(signed.second)  # other plans by name; every file is held
    assert signed.check_in() == signed.second.version
    assert sum(came) <= initial
    came.clear()
    with signed.store.write() as session:
        roll_back(session, signed.keys, "stable", signed.first.version)
    assert signed.check_in() == signed.first.version
    assert sum(came) <= initial


def test_a_way_back_that_is_not_needed_any_more_is_gone(signed: Signed) -> None:
    def withheld() -> list[int]:
        with signed.store.read() as session:
            return [w.withheld_for for w in session.scalars(sa.select(signing.Signature)) if w.withheld_for is not None]

    staged = signed.publish(signed.second, Rollout(percent=10))
    assert withheld() == [staged]
    again = signed.publish(signed.second, Rollout(percent=20))
    assert withheld() == [again]
    with signed.store.write() as session:
        promote(session, again, "ann")
    assert withheld() == [again]  # it is judged still
    last = signed.publish(signed.second, Rollout(percent=50))  # other parameters, the same plans: nothing to sign for
    with signed.store.write() as session:
        promote(session, last, "ann")
    assert withheld() == []


def test_a_round_on_the_version_before_goes_on_while_a_new_one_is_on_trial(signed: Signed) -> None:
    assert signed.check_in() == signed.first.version
    signed.publish(signed.second, Rollout(percent=10))
    assert signed.check_in() == signed.second.version
    signed.may_train(signed.first.version)
    third = signed.second.manifest | {"parent": signed.second.version}
    signed.publish(BuiltArtifact(hashlib.sha256(manifest_bytes(third)).hexdigest(), third, signed.first.folder), STAGED)
    assert signed.check_in() not in (signed.first.version, signed.second.version)
    signed.may_train(signed.first.version)  # what is live may be trained on


def test_a_revoked_key_in_the_middle_of_a_rollout_leaves_all_words_good(signed: Signed) -> None:
    assert signed.check_in() == signed.first.version
    new = signed.publish(signed.second, Rollout(percent=10, min_devices=3))
    assert signed.check_in() == signed.second.version
    (name,) = signed.keys.signing
    with signed.store.write() as session:
        left = signing.revoke_signing_key(session, signed.keys, name)
        assert signing.sign_again(session, left) == ["stable"]
    versions = (signed.first.version, signed.second.version)
    old, now = (signed.words(version)[0] for version in versions)
    assert now["oldest"] <= old["sequence"] < now["sequence"]
    assert not old["rollback"]
    results([device.report(new, 1, 10, 4, 9) for device in signed.bare])
    (back,) = signed.words(signed.first.version)
    assert back["sequence"] > now["sequence"]
    assert signed.check_in() == signed.first.version


# ---- two versions of the SDK, and who may speak ------------------------------------------------------------------------


def test_a_release_is_taken_back_to_what_all_devices_it_was_for_can_run(fleet: Fleet) -> None:
    old, new = fleet.devices(3, 0, 50, sdk="0.2.0"), fleet.devices(3, 0, 50, sdk="0.3.0")
    newer = fleet.release("b", rollout=Rollout(min_sdk="0.3"))  # the first one stays, for the others
    assert [device.check_in() for device in (*old, *new)] == [1] * 3 + [newer] * 3
    tried = fleet.release("c", rollout=STAGED)
    assert [device.check_in() for device in (*old, *new)] == [tried] * 6
    with fleet.store.read() as session:
        assert session.get_one(Release, tried).parent_id == 1
    results([device.report(tried, 1, 50, 10, 45) for device in old])
    assert fleet.state(tried) == "halted"
    assert [device.check_in() for device in (*old, *new)] == [tried + 1] * 6
    with fleet.store.read() as session:
        assert session.get_one(Release, tried + 1).artifact_version == "a" * 64


def test_stages_for_sdks_that_nothing_live_is_for_are_refused(fleet: Fleet) -> None:
    fleet.release("b", rollout=Rollout(min_sdk="0.3"))
    fleet.release("c", rollout=Rollout())  # for all: ends both
    fleet.release("b", rollout=Rollout(min_sdk="0.4"))
    with fleet.store.write() as session:
        first = next(r for r in open_releases(session, "stable") if r.min_sdk == "")
        become(session, first, "rolled_back", "ann", "")
    with pytest.raises(
        ReleaseError, match=r"nothing live on 'stable' is for the same versions of the SDK.*--min-sdk 0\.4"
    ):
        fleet.release("a", rollout=STAGED)


def test_a_revoked_devices_report_counts_no_more(fleet: Fleet) -> None:
    devices = fleet.devices(6, 0, 50)
    assert [device.check_in() for device in devices] == [1] * 6
    tried = fleet.release("b", rollout=STAGED)
    assert [device.check_in() for device in devices] == [tried] * 6
    with fleet.store.write() as session:
        for device in devices:
            session.scalars(sa.select(DeviceRow).where(DeviceRow.name == device.name)).one().revoked_at = now()
    for device in devices:  # its credential was right a moment ago, and the gate remembers that
        with pytest.raises(grpc.RpcError, match="revoked"):
            device.report(tried, 1, 50, 0, 50).result(PATIENCE_S)
    assert fleet.state(tried) == "staged"


def test_a_run_asks_only_devices_that_the_live_release_is_for(fleet: Fleet) -> None:
    old, new = fleet.devices(2, sdk="0.2.0"), fleet.devices(2, sdk="0.3.0")
    fleet.release("b", rollout=Rollout(min_sdk="0.3"))
    results([device.ask(examples=5) for device in (*old, *new)])
    assert sorted(fleet.server.online("stable").values()) == sorted(device.name for device in new)
