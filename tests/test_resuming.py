"""A simulation that was stopped or killed goes on to the same bits; whoever may not go on with it is told why."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa

from pocketfed.coordinator.config import LocalTraining, RunConfig, UpdateForm
from pocketfed.coordinator.leadership import claim
from pocketfed.coordinator.progress import Interrupted, RoundResult, simulated_runs, unfinished_runs
from pocketfed.coordinator.store import Checkpoint, Device, Round, Store, get_blob, latest_release
from pocketfed.model.tasks import Dataset
from pocketfed.simulations import resuming
from pocketfed.simulations.device_states import states_beside
from pocketfed.simulations.resuming import SimulationError, digest_of, left_in
from pocketfed.simulations.run import SimulationConfig, SimulationResult, simulate

RUN = RunConfig(rounds=4, min_devices=1, seed=5, local=LocalTraining(batch_size=8, learning_rate=0.005, max_length=16))
KINDS: dict[str, dict[str, Any]] = {
    "error feedback and personal heads": {"update": UpdateForm(codec="topk:0.1", private=("classifier",))},
    "a strategy that remembers, and over-selection": {"strategy": "fedadam", "cohort": 2, "over_selection": 0.5},
    "buffers": {"mode": "fedbuff", "buffer": 2, "cohort": 4, "update": UpdateForm(codec="int8")},
}


def config_for(data: Path, **settings: Any) -> SimulationConfig:
    train = "norms" if "update" in settings else "head"
    return SimulationConfig(data, "nano", devices=4, train=train, run=dataclasses.replace(RUN, **settings))


def told(result: SimulationResult) -> Any:
    """Everything but what the clock says."""
    found = result.to_dict()
    costs = ("device_seconds", "total_device_seconds", "joules", "total_joules", "wall_s")
    found["costs"] = {k: v for k, v in found["costs"].items() if k not in costs}
    return found | {"rounds": [{k: v for k, v in r.items() if k != "seconds"} for r in found["rounds"]]}


def stop_after(number: int) -> Any:
    def on_round(result: RoundResult) -> None:
        if result.number == number:
            raise KeyboardInterrupt

    return on_round


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_simulation_goes_on_to_the_same_bits(tiny_folder: Path, tmp_path: Path, kind: str) -> None:
    config, database = config_for(tiny_folder, **KINDS[kind]), str(tmp_path / "runs.db")
    whole = simulate(config)
    with pytest.raises(KeyboardInterrupt):
        simulate(config, database, stop_after(2))
    store = Store(database)
    assert [run.status for run in simulated_runs(store)] == ["waiting"]
    assert unfinished_runs(store) == []  # of a coordinator
    store.close()
    numbers: list[int] = []
    result = simulate(config, database, lambda r: numbers.append(r.number))
    assert numbers == [3, 4]
    assert result.theta.tobytes() == whole.theta.tobytes()
    assert told(result) == told(whole)


def test_seconds_on_this_machine_add_up_over_processes_where_the_rounds_own_are_a_fleets(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(config_for(tiny_folder, rounds=2), fleet="steady")
    database, slow = str(tmp_path / "runs.db"), itertools.count(0.0, 100.0)  # 100 s pass between any two looks
    monkeypatch.setattr(resuming, "time", SimpleNamespace(perf_counter=lambda: next(slow)))
    with pytest.raises(KeyboardInterrupt):
        simulate(config, database, stop_after(1))
    before = next(slow)
    monkeypatch.setattr(resuming, "time", SimpleNamespace(perf_counter=lambda: 0.0))
    for _ in range(2):  # the second time it has finished
        found = simulate(config, database, resume="must").found
        assert found is not None
        assert found.costs is not None
        assert 100 <= found.costs.wall_s < before


KILLED = """
import os, signal, sys
from pathlib import Path
from pocketfed.client_sdk import flower_app
from pocketfed.coordinator.config import RunConfig
from pocketfed.simulations.run import SimulationConfig, simulate

performing, calls = flower_app.performing, []
def dies(*given, **named):
    calls.append(0)
    if len(calls) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return performing(*given, **named)
flower_app.performing = dies
import json
run = RunConfig.from_dict(json.loads(sys.argv[4]))
simulate(SimulationConfig(Path(sys.argv[1]), "nano", devices=4, train="norms", run=run), sys.argv[2])
"""


def test_a_simulation_killed_within_a_round_goes_on_to_the_same_bits(tiny_folder: Path, tmp_path: Path) -> None:
    config, database = config_for(tiny_folder, update=UpdateForm(codec="topk:0.1")), str(tmp_path / "runs.db")
    words = [str(tiny_folder), database, "11", json.dumps(config.run.to_dict())]  # the third device of the third round
    done = subprocess.run([sys.executable, "-c", KILLED, *words], capture_output=True, check=False)
    assert done.returncode == -9, done.stderr
    result = simulate(config, database, resume="must")
    assert told(result) == told(simulate(config))
    again = simulate(config, database, resume="must")  # it has finished: nothing is trained again
    assert told(again) == told(result)
    assert simulate(config, database).run_id == result.run_id + 1  # whoever does not say so begins anew


def kept_beside(database: Path) -> dict[int, int]:
    """device -> version of its row."""
    with contextlib.closing(sqlite3.connect(states_beside(database))) as connection:
        return dict(connection.execute("SELECT device, version FROM states ORDER BY device, version"))


def test_a_round_writes_the_residuals_of_its_own_devices_and_none_into_the_checkpoint(
    tiny_folder: Path, tmp_path: Path
) -> None:
    config = config_for(tiny_folder, update=UpdateForm(codec="topk:0.1"), cohort=2, rounds=3)
    database = tmp_path / "runs.db"
    result = simulate(config, str(database))
    with contextlib.closing(Store(str(database))) as store, store.read() as session:
        rounds = session.scalars(sa.select(Round).where(Round.number > 0).order_by(Round.number)).all()
        newest = {device: row.number for row in rounds for device in row.cohort or ()}
        state = get_blob(session, session.get_one(Checkpoint, result.run_id).state)
    assert len({tuple(row.cohort or ()) for row in rounds}) > 1  # not the same two each time
    assert kept_beside(database) == dict(sorted(newest.items()))  # one row a device, of the round it was last asked in
    assert len(state) < 4 * result.theta.size  # not even one residual


def test_what_devices_kept_has_to_lie_beside_the_database(tiny_folder: Path, tmp_path: Path) -> None:
    config, database = config_for(tiny_folder, update=UpdateForm(codec="topk:0.1")), tmp_path / "runs.db"
    with pytest.raises(KeyboardInterrupt):
        simulate(config, str(database), stop_after(2))
    beside = states_beside(database)
    beside.rename(tmp_path / "aside.db")
    with pytest.raises(Interrupted, match=r"runs\.devices\.db lacks what 4 devices of run 1 kept; put it back"):
        simulate(config, str(database))
    (tmp_path / "aside.db").rename(beside)
    assert told(simulate(config, str(database), resume="must")) == told(simulate(config))


def test_what_cannot_go_on_is_refused_in_a_sentence(tiny_folder: Path, tmp_path: Path) -> None:
    config, database = config_for(tiny_folder), str(tmp_path / "runs.db")
    with pytest.raises(SimulationError, match="has no simulated run to go on with"):
        simulate(config, database, resume="must")
    with pytest.raises(KeyboardInterrupt):
        simulate(config, database, stop_after(1))
    with pytest.raises(SimulationError, match=r"begun with rounds = '4', not '5'; give that, or begin anew"):
        simulate(config_for(tiny_folder, rounds=5), database, resume="must")
    with pytest.raises(SimulationError, match="begun with devices = '4', not '3'"):
        simulate(dataclasses.replace(config, devices=3), database, resume="must")
    store = Store(database)
    (left,) = simulated_runs(store)
    assert left_in(store) == left
    with claim(store, f"run-{left.run_id}") as mine:
        assert mine
        with pytest.raises(SimulationError, match="is simulated by another process; wait"):
            simulate(config, database, resume="must")
    store.close()
    assert sorted(p.name for p in tmp_path.iterdir() if "lock" in p.name) == []


def test_nothing_is_simulated_where_real_devices_would_get_it(tiny_folder: Path, tmp_path: Path) -> None:
    database = str(tmp_path / "fleet.db")
    with contextlib.closing(Store(database)) as store:
        with store.write() as session:
            session.add(Device(name="phone-1", channel="stable", token_hash="5" * 64))
        with pytest.raises(SimulationError, match="real devices have enrolled, 'phone-1'"):
            simulate(config_for(tiny_folder), database)
        with store.read() as session:
            assert latest_release(session, "stable") is None


def test_the_digest_is_of_what_was_read(tiny_dataset: Dataset) -> None:
    assert digest_of(tiny_dataset) == digest_of(dataclasses.replace(tiny_dataset, name="other"))
    fewer = dataclasses.replace(tiny_dataset, test=tiny_dataset.test[:-1])
    assert digest_of(fewer) != digest_of(tiny_dataset)
