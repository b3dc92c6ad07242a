"""Rounds over a fleet on a virtual clock: who is in them, when they close, and what they cost, checked by hand.

a trains for 10 s, b for 20 s, c for 95 s; downloads and uploads take no time worth mentioning.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from pocketfed.client_sdk.artifacts import Artifact
from pocketfed.client_sdk.flower_app import make_client_app
from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.coordinator.artifacts import BuiltArtifact, publish_artifact
from pocketfed.coordinator.config import LocalTraining, RunConfig
from pocketfed.coordinator.grid import ENOUGH
from pocketfed.coordinator.progress import RoundResult, RunError, create_run
from pocketfed.coordinator.rounds import drive_run
from pocketfed.coordinator.spending import spent_in, uncounted_in
from pocketfed.coordinator.store import Assignment, History, Round, Store, Update, by_clock, device_named, now
from pocketfed.model.parameters import Vector
from pocketfed.model.tasks import Dataset
from pocketfed.simulations.costs import EnergyModel, cost_of
from pocketfed.simulations.fleet import WEEK_S, Dropout, Fleet, FleetDevice, Rules, Visit
from pocketfed.simulations.grids import InProcessGrid
from pocketfed.simulations.run import SimulationConfig, encode_examples, simulate
from pocketfed.simulations.virtual import START, Demand, VirtualClock, VirtualGrid

SECONDS = {"a": 10, "b": 20, "c": 95}
ALWAYS = (Visit(0.0, WEEK_S),)
LOCAL = LocalTraining(batch_size=4, max_length=32)
SPARED = 16


def device(visits: tuple[Visit, ...] = ALWAYS, **others: Any) -> FleetDevice:
    return FleetDevice("all", 1.0, 1e15, 1e15, visits, **others)


class World:
    """Three devices that train the head of the nano student, and whatever fleet they are."""

    def __init__(self, store: Store, built: BuiltArtifact, artifact: Artifact, dataset: Dataset) -> None:
        self.store, self.trainer = store, PlanTrainer(artifact, "head")
        everything = encode_examples(self.trainer, dataset.train, 32)
        self.local = {name: everything.take(range(4 * i, 4 * i + 4)) for i, name in enumerate(SECONDS)}
        self.asked: list[str] = []
        self.results: list[RoundResult] = []
        with store.write() as session:
            publish_artifact(session, built, "stable", "head")
            self.nodes = {device_named(session, name).id: name for name in self.local}

    def local_of(self, context: Any) -> tuple[str, Any]:
        self.asked.append(str(context.node_config["device"]))
        return self.asked[-1], self.local[self.asked[-1]]

    def drive(
        self,
        spool: Path,
        devices: Mapping[str, FleetDevice] | None = None,
        rules: Rules | None = None,
        real: bool = False,
        **settings: Any,
    ) -> Vector:
        chosen = {"min_devices": 1, "rounds": 1, "max_attempts": 1, "seed": 3, "local": LOCAL, "release": False}
        config = RunConfig(**(chosen | settings))
        self.asked, self.results = [], []
        self.clock = VirtualClock()
        with by_clock(self.clock):
            self.run_id = create_run(self.store, config)
            app = make_client_app(lambda: self.trainer, self.local_of)
            computing = InProcessGrid(self.store, self.run_id, app, self.nodes, 0)
            if real:
                return drive_run(self.store, self.run_id, computing, config)
            fleet = Fleet("test", tuple((devices or {}).get(name, device()) for name in SECONDS), rules or Rules())
            tokens = {name: 1000 * s for name, s in SECONDS.items()}
            demand = Demand(tokens, dict.fromkeys(SECONDS, 4))
            grid = VirtualGrid(computing, spool, fleet, self.trainer.size, demand, self.clock, config)
            theta = drive_run(
                self.store, self.run_id, grid, config, on_round=lambda r: self.results.append(grid.told(r))
            )
            grid.finish()
        self.grid, self.device_s, self.training_s = grid, grid.worked.device_s, grid.worked.training_s
        return theta

    def rows(self, table: type[Any] = Assignment, *order: Any) -> list[Any]:
        with self.store.read() as session:
            mine = sa.select(table).where(table.run_id == self.run_id)
            return list(
                session.scalars(mine.order_by(*(order or (table.id if table is Assignment else table.number,))))
            )

    def ended(self, number: int = 1) -> dict[str, tuple[str, float]]:
        """Device -> (status, seconds at which it ended), of the assignments that were offered in a round."""
        found = [row for row in self.rows() if row.round == number]
        return {self.nodes[r.device_id]: (r.status, round((r.finished_at - START).total_seconds(), 3)) for r in found}

    def counted(self) -> list[str]:
        """The devices whose updates each round has aggregated, in order of the rounds."""
        rounds: dict[int, str] = {}
        for row in sorted((r for r in self.rows() if r.status == "aggregated"), key=lambda r: self.nodes[r.device_id]):
            rounds[row.counted_in] = rounds.get(row.counted_in, "") + self.nodes[row.device_id]
        return [rounds[number] for number in sorted(rounds)]


@pytest.fixture
def world(tmp_path: Path, nano_built: BuiltArtifact, nano_artifact: Artifact, tiny_dataset: Dataset) -> Iterator[World]:
    store = Store(str(tmp_path / "fleet.db"))
    yield World(store, nano_built, nano_artifact, tiny_dataset)
    store.close()


def near(seconds: float) -> Any:
    return pytest.approx(seconds, abs=0.02)  # a deadline is looked at a hundredth of a second after it has passed


def test_a_round_that_waits_for_all_takes_as_long_as_the_slowest(world: World, tmp_path: Path) -> None:
    world.drive(tmp_path / "spool", rounds=2)
    assert world.ended(1) == {"a": ("aggregated", 10.0), "b": ("aggregated", 20.0), "c": ("aggregated", 95.0)}
    assert world.ended(2) == {"a": ("aggregated", 105.0), "b": ("aggregated", 115.0), "c": ("aggregated", 190.0)}
    assert [r.virtual_s for r in world.results] == [0.0, near(95), near(95)]
    assert [r.device_s for r in world.results] == [0.0, near(125), near(125)]
    assert [r.dropped for r in world.results] == [{}, {}, {}]
    first = world.rows(Round)[1]
    assert (first.started_at, first.finished_at) == (START, START + timedelta(seconds=95))
    assert first.seconds == near(95)


def test_what_goes_up_takes_time_and_is_no_training(world: World, tmp_path: Path) -> None:
    narrow = dataclasses.replace(device(), up_bps=8 * 4 * world.trainer.size / 5)  # 5 s, and more for the header
    world.drive(tmp_path / "spool", dict.fromkeys(SECONDS, narrow))
    assert world.training_s == near(10 + 20 + 95)
    assert world.device_s > 10 + 20 + 95 + 3 * 5


def test_over_selection_closes_at_the_second_answer_and_does_not_compute_the_third(
    world: World, tmp_path: Path
) -> None:
    world.drive(tmp_path / "spool", cohort=2, over_selection=0.5)
    assert world.ended() == {"a": ("aggregated", 10.0), "b": ("aggregated", 20.0), "c": ("expired", 20.0)}
    assert world.asked == ["a", "b"]
    assert [row.error for row in world.rows()] == [None, None, ENOUGH]
    assert world.rows()[2].phase == "training"
    result = world.results[1]
    assert (result.virtual_s, result.device_s, result.dropped) == (near(20), near(50), {"surplus": 1})


def test_a_straggler_is_cut_off_at_the_deadline(world: World, tmp_path: Path) -> None:
    world.drive(tmp_path / "spool", deadline_s=50.0)
    assert world.ended()["c"] == ("expired", near(50))
    assert world.rows()[2].error == "the round's deadline has passed"
    assert world.asked == ["a", "b"]
    result = world.results[1]
    assert (result.virtual_s, result.device_s, result.dropped) == (near(50), near(80), {"deadline": 1})


def test_a_round_below_its_quorum_at_the_deadline_fails_and_is_tried_again(world: World, tmp_path: Path) -> None:
    """Attempts end after 15 s with a alone; after each the driver rests for a second."""
    world.drive(tmp_path / "spool", deadline_s=15.0, quorum=2, max_attempts=2, max_failed_rounds=3)
    (_, failed) = world.results
    assert (failed.status, failed.reason) == ("failed", "1 of at least 2 updates were usable")
    assert world.ended()["a"][0] == "discarded"
    assert failed.virtual_s == pytest.approx(15 + 1 + 15 + 1, abs=0.05)
    assert failed.dropped == {"deadline": 4}


def test_fedbuff_closes_at_every_second_answer_whatever_round_it_is_for(world: World, tmp_path: Path) -> None:
    """a and b fill four buffers; at 90 a and at 95 c, asked at 0; then b, asked at 80, at 100 and a, asked at 95, at 105."""
    world.drive(tmp_path / "spool", mode="fedbuff", buffer=2, cohort=3, rounds=6)
    assert world.counted() == ["ab", "ab", "ab", "ab", "ac", "ab"]
    assert [r.virtual_s for r in world.results[1:]] == [near(20), near(20), near(20), near(20), near(15), near(10)]
    (late,) = [row for row in world.rows() if world.nodes[row.device_id] == "c" and row.status == "aggregated"]
    assert (late.round, late.counted_in) == (1, 5)
    # b works from 95 on only in the next round's cohort; at the end c (95 to 105) is told to stop.
    assert world.device_s == near(6 * 10 + 5 * 20 + 95 + 10)


def test_time_goes_on_to_when_enough_devices_are_there(world: World, tmp_path: Path) -> None:
    """b comes at 7200 s, when a has gone; both are there from 10800 s on."""
    devices = {
        "a": device((Visit(0.0, 3600.0), Visit(10_800.0, 20_000.0))),
        "b": device((Visit(7200.0, 20_000.0),)),
        "c": device((Visit(50_000.0, 60_000.0),)),
    }
    world.drive(tmp_path / "spool", devices, min_devices=2, wait_s=86_400.0)
    assert world.ended() == {"a": ("aggregated", 10_810.0), "b": ("aggregated", 10_820.0)}
    assert world.results[1].virtual_s == near(10_820)


def test_where_too_few_ever_come_the_run_says_so(world: World, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"3 of at least 4 devices came within 3600 s"):
        world.drive(tmp_path / "spool", min_devices=4, wait_s=3600.0)
    assert world.clock.s == near(3600)


def test_a_device_that_has_to_go_says_so_and_nobody_waits_for_it(world: World, tmp_path: Path) -> None:
    world.drive(tmp_path / "spool", {"c": device((Visit(0.0, 60.0),))})
    assert world.ended()["c"] == ("failed", 60.0)
    assert world.rows()[2].error == "the device's conditions ended while it was training"
    result = world.results[1]
    assert (result.virtual_s, result.device_s, result.dropped) == (near(60), near(90), {"training": 1})


def test_a_battery_ends_a_visit_and_what_was_used_of_it_stays_used(world: World, tmp_path: Path) -> None:
    """(0.5 - 0.2) * 1 Wh at 36 W lasts 30 s: one round of 20 s, then 10 s of the next."""
    low = device((Visit(0.0, WEEK_S, charging=False, battery=0.5),), battery_wh=1.0, watts=36.0)
    world.drive(tmp_path / "spool", {"b": low, "c": low}, rounds=2)
    assert world.ended(1)["c"] == ("failed", 30.0)
    assert world.ended(1)["b"] == ("aggregated", 20.0)
    assert world.ended(2) == {"a": ("aggregated", 40.0), "b": ("failed", 40.0)}  # c has nothing left


def test_a_device_that_is_plugged_in_or_pulled_out_works_on(world: World, tmp_path: Path) -> None:
    """0.3 - 0.2 of 1 Wh at 36 W is 10 s. b: off the charger until 5 s, then on it. c: on it until 50 s, then 10 s more."""
    parts = {"battery_wh": 1.0, "watts": 36.0}
    b = device((Visit(0.0, 5.0, charging=False, battery=0.3), Visit(5.0, WEEK_S)), **parts)
    c = device((Visit(0.0, 50.0), Visit(50.0, WEEK_S, charging=False, battery=0.3)), **parts)
    world.drive(tmp_path / "spool", {"b": b, "c": c})
    assert world.ended() == {"a": ("aggregated", 10.0), "b": ("aggregated", 20.0), "c": ("failed", 60.0)}


def test_a_battery_that_is_empty_is_charged_by_the_next_day(world: World, tmp_path: Path) -> None:
    """It lasts for 15 s of the first day: a round and half of the next."""
    off = {"charging": False, "battery": 0.3}
    days = (Visit(0.0, 86_400.0, **off), Visit(86_400.0, WEEK_S, **(off | {"battery": 0.9})))
    a = device(days, battery_wh=1.5, watts=36.0)
    nobody = device((Visit(WEEK_S - 1, WEEK_S),))
    world.drive(tmp_path / "spool", {"a": a, "b": nobody, "c": nobody}, rounds=3, wait_s=WEEK_S)
    ended = [("aggregated", 10.0), ("failed", 15.0), ("aggregated", 86_410.0)]
    assert [world.ended(n)["a"] for n in (1, 2, 3)] == ended


def test_who_is_told_to_stop_pays_only_for_what_it_has_done(world: World, tmp_path: Path) -> None:
    """c's battery lasts 30 s: 20 s until the round has enough, so 10 s of the next one."""
    low = device((Visit(0.0, WEEK_S, charging=False, battery=0.5),), battery_wh=1.0, watts=36.0)
    world.drive(tmp_path / "spool", {"c": low}, rounds=2, cohort=2, over_selection=0.5)
    assert world.ended(1)["c"] == ("expired", 20.0)
    assert world.ended(2)["c"] == ("failed", 30.0)
    assert world.device_s == near(10 + 20 + 20 + 10 + 20 + 10)


def test_who_is_told_to_stop_was_not_lost_and_is_there_for_the_next_round(world: World, tmp_path: Path) -> None:
    """By this seed c alone would be lost in round 1, before its upload at 95 s: but at 20 s it is told to stop."""
    rules = Rules(Dropout(upload=0.4), away_s=1000.0)
    world.drive(tmp_path / "spool", rules=rules, rounds=2, cohort=2, over_selection=0.5, seed=SPARED)
    assert world.ended(1) == {"a": ("aggregated", 10.0), "b": ("aggregated", 20.0), "c": ("expired", 20.0)}
    assert world.results[1].dropped == {"surplus": 1}
    assert "c" in world.ended(2)
    world.drive(tmp_path / "spool", rules=rules, rounds=2, seed=SPARED)  # waited for, it is lost, and away
    assert world.results[1].dropped == {"upload": 1}
    assert "c" not in world.ended(2)


def test_who_goes_or_is_stopped_while_downloading_is_booked_with_what_had_come(world: World, tmp_path: Path) -> None:
    """a and b 60 s and c 30 s of 100 kbit/s, which the parameters alone take longer; b is there until the deadline."""
    size = 4 * world.trainer.size
    slow = {"down_bps": 8 * size / 100.0}  # 100 s, and more for the header
    goes = dataclasses.replace(device((Visit(0.0, 60.0),)), **slow)
    stays = dataclasses.replace(device(), **slow)
    world.drive(tmp_path / "spool", {"a": goes, "b": stays, "c": device()}, deadline_s=80.0, quorum=1)
    found = {world.nodes[row.device_id]: (row.status, row.phase, row.bytes_down) for row in world.rows()}
    assert found["a"][0] == "failed"
    assert found["a"][2] == pytest.approx(0.6 * size, abs=1)
    assert (found["b"][:2], found["b"][2]) == (("expired", "downloading"), pytest.approx(0.8 * size, rel=0.001))
    spent = spent_in(world.store, world.run_id)
    assert [spent[name].bytes_down for name in "ab"] == [found[name][2] for name in "ab"]
    assert world.results[1].bytes_down == sum(row.bytes_down for row in world.rows())


def test_a_round_tells_who_began_each_phase_and_who_was_lost_in_it(world: World, tmp_path: Path) -> None:
    """a goes while it trains; b answers; c is stopped. The evaluation waits for a, which is not there, and for
    c, which takes 95 / 3 s of it.
    """
    a = device((Visit(0.0, 5.0),))
    world.drive(tmp_path / "spool", {"a": a}, deadline_s=25.0, evaluate_on_devices=True)
    trained = {"began download": 3, "began training": 3, "began upload": 1, "training": 1, "deadline": 1, "offered": 3}
    measured = {"began download": 2, "began training": 2, "began upload": 1, "deadline": 2, "offered": 3}
    assert world.results[1].fates == {"train": trained, "evaluate": measured}


def test_energy_is_what_the_batteries_give(world: World, tmp_path: Path) -> None:
    """2 W for 10 s, 3 W for 20 s, and 5 W for the 50 s until c is told to stop."""
    fleet = {name: device(watts=watts) for name, watts in zip(SECONDS, (2.0, 3.0, 5.0), strict=True)}
    world.drive(tmp_path / "spool", fleet, deadline_s=50.0)
    assert world.grid.worked.joules == pytest.approx(2 * 10 + 3 * 20 + 5 * 50, abs=0.1)


def test_what_no_round_has_counted_was_spent_too(world: World, tmp_path: Path) -> None:
    """FedBuff ends at 20 s with a and b: c has downloaded for 20 of 100 s, and no round has that."""
    size = 4 * world.trainer.size
    slow = dataclasses.replace(device(), down_bps=8 * size / 100.0)
    world.drive(tmp_path / "spool", {"c": slow}, mode="fedbuff", buffer=2, cohort=3)
    up, down = uncounted_in(world.store, world.run_id)
    assert (up, down) == (0, pytest.approx(0.2 * size, rel=0.001))
    costs = cost_of(world.results, spent_in(world.store, world.run_id), 3, EnergyModel(), (up, down), world.grid.worked)
    spent = spent_in(world.store, world.run_id)
    assert costs.bytes_down * 3 == sum(s.bytes_down for s in spent.values()) == world.results[1].bytes_down + down
    assert costs.bytes_up * 3 == sum(s.bytes_up for s in spent.values())
    assert costs.uncounted_bytes_down * 3 == down
    assert (costs.total_device_seconds, costs.total_worked_seconds) == (near(30), near(50))
    assert costs.total_joules == near(4 * 50)


def test_what_is_over_is_forgotten(world: World, tmp_path: Path) -> None:
    """They come for half a minute an hour, off the charger, and about half of them are lost each time."""
    hours = tuple(Visit(3600.0 * h, 3600.0 * h + 30, charging=False, battery=0.9) for h in range(6))
    world.drive(
        tmp_path / "spool",
        {name: device(hours) for name in SECONDS},
        Rules(Dropout(training=0.5), away_s=60.0),
        rounds=5,
        min_devices=3,
        wait_s=WEEK_S,
        max_failed_rounds=9,
    )
    assert world.clock.s > 4 * 3600
    held = world.grid.capture()["virtual"]  # what a checkpoint has
    assert held["worked"] == {}
    assert all(until > world.clock.s for until in held["away"].values())


@pytest.mark.parametrize(
    ("dropout", "phase", "device_s", "closes"),
    [
        # Nobody ever takes the assignment: offers end with the lease, 30 s after they were made.
        (Dropout(download=1.0), "download", 0.0, 30.0),
        # Lost at the end of its training; the lease of c, the last to be heard of, ends 30 s later.
        (Dropout(upload=1.0), "upload", 125.0, 125.0),
    ],
)
def test_a_device_that_is_lost_without_a_word_is_given_up_with_its_lease(
    world: World, tmp_path: Path, dropout: Dropout, phase: str, device_s: float, closes: float
) -> None:
    world.drive(tmp_path / "spool", rules=Rules(dropout, away_s=1000.0))
    result = world.results[1]
    assert (result.status, result.devices, result.dropped) == ("failed", 0, {phase: 3})
    assert result.virtual_s == near(closes + 1)  # a second's rest after a round that failed
    assert result.device_s == near(device_s)
    assert {row.error for row in world.rows()} == {"no heartbeat within the lease"}
    assert world.asked == []


def test_a_device_that_was_lost_is_away_for_a_while(world: World, tmp_path: Path) -> None:
    """Everybody is lost at 10, 20 and 95 s, and back 1000 s later: the next round begins when two are, at 1020."""
    rules = Rules(Dropout(upload=1.0), away_s=1000.0)
    world.drive(tmp_path / "spool", rules=rules, rounds=2, min_devices=2, wait_s=2000.0)
    first, second = (row.started_at for row in world.rows(Round)[1:])
    assert ((first - START).total_seconds(), (second - START).total_seconds()) == (0.0, near(1020))


def test_fault_12_a_third_lost_in_every_phase_and_a_slow_tail_end_within_the_budget(
    tmp_path: Path, tiny_dataset: Dataset
) -> None:
    """Of 24 asked each round about a third survives; 3 are wanted, and no round waits for the deadline of 600 s."""
    (tmp_path / "fleet.toml").write_text(
        "away_s = 0.0\n[dropout]\ndownload = 0.3\ntraining = 0.3\nupload = 0.3\n"
        "[[tiers]]\nshare = 0.9\n[[tiers]]\nname = 'slow'\nshare = 0.1\nms_per_token = 10.0\n"
    )
    data = tmp_path / "data.csv"
    data.write_text("text,label\n" + "".join(f"{e.text},{e.label}\n" for e in tiny_dataset.train))
    run = RunConfig(rounds=3, cohort=3, over_selection=7.0, local=LOCAL, min_devices=24)
    config = SimulationConfig(data, "nano", 24, "iid", "head", run=run, fleet=str(tmp_path / "fleet.toml"))
    result = simulate(config)
    assert [r.devices for r in result.rounds[1:]] == [3, 3, 3]
    assert all(r.virtual_s < 60 for r in result.rounds)  # type: ignore[operator]
    again = simulate(config)
    assert result.theta.tobytes() == again.theta.tobytes()
    wall = {r.number: dataclasses.asdict(r) for r in result.rounds}
    assert wall == {r.number: dataclasses.asdict(r) for r in again.rounds}  # every number, the clock's too
    assert result.to_dict()["virtual_s"] == pytest.approx(sum(r.virtual_s or 0 for r in result.rounds))
    assert result.partition_svg.startswith("<svg")


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "fedbuff", "buffer": 2, "cohort": 4, "rounds": 5},
        {"cohort": 3, "quorum": 2, "max_attempts": 2, "max_failed_rounds": 9, "rounds": 4},
    ],
)
def test_a_stopped_simulation_of_a_fleet_goes_on_to_the_same_numbers(
    tmp_path: Path, tiny_dataset: Dataset, settings: dict[str, Any]
) -> None:
    """Some are lost, nobody charges, and by half of the hours half are there: all of that is as it would have been."""
    (tmp_path / "fleet.toml").write_text(
        f"away_s = 3000.0\navailability = {[1.0, 0.3] * 12}\n[dropout]\ntraining = 0.2\nupload = 0.1\n"
        "[[tiers]]\nms_per_token = 3000.0\nspeed_spread = 1.0\ncharging = 0.3\nbattery_wh = 4.0\n"
    )
    data = tmp_path / "data.csv"
    data.write_text("text,label\n" + "".join(f"{e.text},{e.label}\n" for e in tiny_dataset.train))
    run = RunConfig(min_devices=2, wait_s=1e6, deadline_s=1200.0, seed=2, local=LOCAL, **settings)
    config = SimulationConfig(data, "nano", 8, "iid", "head", run=run, fleet=str(tmp_path / "fleet.toml"))
    whole = simulate(config)
    assert len({why for r in whole.rounds for why in r.dropped or {}}) > 1  # things did happen

    def stop(result: RoundResult) -> None:
        if result.number == 2:
            raise KeyboardInterrupt

    database = str(tmp_path / "runs.db")
    with pytest.raises(KeyboardInterrupt):
        simulate(config, database, stop)
    later = simulate(config, database)
    assert later.theta.tobytes() == whole.theta.tobytes()
    assert [dataclasses.asdict(r) for r in later.rounds] == [dataclasses.asdict(r) for r in whole.rounds]
    assert (later.virtual_s, later.device_s) == (whole.virtual_s, whole.device_s)


def test_what_another_run_has_left_open_in_the_database_is_taken_by_nobody(world: World, tmp_path: Path) -> None:
    alone = world.drive(tmp_path / "spool", rounds=2)
    whole = [dataclasses.asdict(result) for result in world.results]
    with world.store.write() as session, by_clock(VirtualClock()):
        left = session.scalars(sa.select(Assignment).where(Assignment.round == 1)).all()
        for row in left:  # as of a run that was stopped
            values = {"run_id": row.run_id, "round": 9, "config": row.config, "parameters": row.parameters}
            session.add(Assignment(id=f"0-{row.id}", device_id=row.device_id, kind="train", attempt=1, **values))
    again = world.drive(tmp_path / "spool", rounds=2)
    assert again.tobytes() == alone.tobytes()
    assert [dataclasses.asdict(result) for result in world.results] == whole
    with world.store.read() as session:
        stale = sa.select(Assignment.status).where(Assignment.id.startswith("0-"))
        assert list(session.scalars(stale)) == ["offered"] * len(SECONDS)


def test_a_fleet_that_is_always_there_ends_with_the_bits_of_no_fleet(world: World, tmp_path: Path) -> None:
    with_fleet = world.drive(tmp_path / "spool", rounds=2, evaluate_on_devices=True)
    measured = [r.accuracy for r in world.results]
    evaluated = [row for row in world.rows() if row.kind == "evaluate"]
    assert {(row.status, row.finished_at > START) for row in evaluated} == {("aggregated", True)}
    assert measured[1] is not None
    without = world.drive(tmp_path / "spool", rounds=2, evaluate_on_devices=True, real=True)
    assert np.array_equal(with_fleet, without)


def test_every_row_carries_the_clocks_time_and_none_is_earlier_than_the_one_before(
    world: World, tmp_path: Path
) -> None:
    world.drive(tmp_path / "spool", mode="fedbuff", buffer=2, cohort=3, rounds=4)
    moments = [row.at for row in world.rows(History, History.id)]
    assert moments == sorted(moments)
    assert moments[0] == START
    assert moments[-1] == START + timedelta(seconds=world.clock.s)
    for row in world.rows():
        assert row.offered_at <= row.accepted_at <= row.finished_at <= row.deadline
    with world.store.read() as session:
        received = session.execute(sa.select(Update.received_at, Assignment.finished_at).join(Assignment)).all()
    assert received
    assert all(came == ended for came, ended in received)


def test_a_clock_holds_in_its_block_and_no_longer() -> None:
    before = now()
    clock = VirtualClock()
    with by_clock(clock):
        clock.s = 90.0
        assert now() == START + timedelta(seconds=90)
    assert timedelta(0) <= now() - before < timedelta(hours=1)
