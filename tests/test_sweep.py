"""Experiments in TOML, and sweeps: what runs they are, that none is done twice, and that a killed one goes on."""

from __future__ import annotations

import dataclasses
import doctest
import json
from pathlib import Path
from typing import Any

import pytest

from pocketfed.coordinator.config import RunConfigError
from pocketfed.coordinator.leadership import holding
from pocketfed.coordinator.progress import Interrupted
from pocketfed.model.rows import whole_rows
from pocketfed.simulations import experiment, sweep
from pocketfed.simulations.experiment import (
    CONFIGS,
    Cell,
    ExperimentError,
    axis_of,
    cells,
    config_of,
    load,
    narrowed,
    settings_of,
)
from pocketfed.simulations.fleet import FleetError
from pocketfed.simulations.sweep import (
    LEGEND,
    append_row,
    legend,
    markdown,
    read_rows,
    run_sweep,
    table,
    tasks_of,
    write_sweep,
)

SMALL = {"model": "nano", "devices": 3, "train": "head", "rounds": 2, "local": {"max_length": 16, "batch_size": 8}}


def test_the_examples_in_the_module_are_true() -> None:
    assert doctest.testmod(experiment).failed == 0


def test_a_sweep_is_the_product_of_its_axes_seeds_slowest(tmp_path: Path) -> None:
    (tmp_path / "e.toml").write_text(
        'data = "d"\nbaselines = ["local"]\n[local]\nepochs = 2\n[sweep]\nseed = [0, 1]\npartition = ["iid", "by:user"]\n'
        'set = [{ train = "head", "local.learning_rate" = 0.1 }, { label = "all", train = "full" }]\n'
    )
    found = load(str(tmp_path / "e.toml"))
    assert found.baselines == ("local",)
    made = cells(found)
    assert [tuple(c.labels.values()) for c in made] == [
        (seed, partition, set_) for seed in "01" for partition in ("iid", "by:user") for set_ in ("head", "all")
    ]
    first, last = (config_of(cell.values, tmp_path) for cell in (made[0], made[-1]))
    assert (first.train, first.run.local.learning_rate, first.run.local.epochs) == ("head", 0.1, 2)
    assert (last.train, last.run.local.learning_rate, last.partition, last.run.seed) == ("full", 1e-3, "by:user", 1)
    assert first.data == tmp_path / "d"
    assert config_of(settings_of(first)) == first  # what is stored makes the same run again


def test_a_file_s_axis_is_narrowed_by_its_labels() -> None:
    axes = load("first-table").axes
    (kept,) = narrowed(axes, axis_of("set=full"))["set"]
    assert kept.settings["train"] == "full"
    assert [c.settings for c in narrowed(axes, axis_of("partition=by:user"))["partition"]] == [{"partition": "by:user"}]


def test_commas_within_a_value_part_nothing() -> None:
    name, choices = axis_of('update.private=["a","b"],[]')
    assert name == "update.private"
    assert [choice.settings["update.private"] for choice in choices] == [["a", "b"], []]
    assert [c.settings for c in axis_of("seed=0,1")[1]] == [{"seed": 0}, {"seed": 1}]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"partitoin": "iid"}, "there is no setting partitoin; the nearest are partition"),
        ({"local": {"epoch": 1}}, "there is no setting local.epoch; the nearest are local.epochs"),
        ({"devices": "many"}, "devices is 'many'; it must be of type int"),
        ({"hold_out": 2}, "hold_out is 2.0; give a share between 0 and 0.9"),
        ({"energy": {"volts": 3}}, "energy has no 'volts'; it has joules_per_mb_down"),
        ({"data": ""}, "there is no data; set data"),
    ],
)
def test_a_wrong_setting_is_named_with_the_nearest(values: dict[str, Any], told: str) -> None:
    with pytest.raises((ExperimentError, RunConfigError, ValueError), match=told.replace("(", r"\(")):
        config_of({"data": "d", **values})


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x = [", "is not TOML"),
        ("sweep = 3", "sweep is 3"),
        ("[sweep]\nseed = []", r"sweep.seed is \[\]; it must be a list of at least one value"),
        ("[sweep]\nseed = [1, 1]", "one of them twice"),
        ('baselines = ["mine"]', "there is no baseline 'mine'"),
    ],
)
def test_a_file_that_is_no_experiment_is_refused(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "e.toml").write_text(text)
    with pytest.raises(ValueError, match=told):
        load(str(tmp_path / "e.toml"))


def test_what_is_not_there_is_refused_with_what_is() -> None:
    with pytest.raises(ExperimentError, match=r"cannot read gone \(No such file or directory\); .* first-table"):
        load("gone")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_experiment_that_comes_with_pocketfed_can_be_run(path: Path) -> None:
    found = load(path.stem)
    for cell in cells(found):
        config_of(cell.values)
    assert found.axes


def test_the_first_table_has_every_data_set_partition_and_trainable_set() -> None:
    made = [config_of(cell.values) for cell in cells(load("first-table"))]
    assert len(made) == 4 * 4 * 5 * 5
    assert {str(c.data) for c in made} == {"snips", "clinc150", "banking77", "glue/SST-2"}
    assert {c.partition for c in made} == {"iid", "dirichlet:1.0", "dirichlet:0.3", "dirichlet:0.1"}
    assert {c.train for c in made} == {"head", "norms", "lora:8", "last:2", "full"}


# ---- the queue -----------------------------------------------------------------------------------------------------------


def test_two_that_share_a_queue_do_no_run_twice_and_a_stopped_one_goes_on(tiny_folder: Path, tmp_path: Path) -> None:
    tasks = tasks_of([Cell({"seed": str(s)}, {**SMALL, "data": str(tiny_folder), "seed": s}) for s in (0, 1)])
    begun: list[str] = []
    asked = iter([False])  # before the first round; before the second the sweep is stopped

    with pytest.raises(Interrupted):
        run_sweep(
            tmp_path, tasks, on_begin=lambda t: begun.append(f"first {t.key}"), should_stop=lambda: next(asked, True)
        )
    database = tmp_path / "runs" / tasks[0].key / "run.db"
    assert database.exists()
    assert read_rows(tmp_path) == []

    def other(task: Any) -> None:
        begun.append(f"outer {task.key}")
        if task is tasks[0]:  # while the first run is this one's, another process comes
            left = run_sweep(tmp_path, tasks, on_begin=lambda t: begun.append(f"inner {t.key}"))
            assert left == 1

    assert run_sweep(tmp_path, tasks, on_begin=other) == 0
    assert begun == [f"first {tasks[0].key}", f"outer {tasks[0].key}", f"inner {tasks[1].key}"]
    rows = read_rows(tmp_path)
    assert sorted(row["key"] for row in rows) == sorted(task.key for task in tasks)
    assert not database.exists()
    assert list(tmp_path.glob("*.lock")) == []
    assert json.loads((database.parent / "run.json").read_text())["config"]["rounds"] == 2
    run_sweep(tmp_path, tasks, on_begin=lambda t: pytest.fail("it is done"))


def test_a_run_is_named_by_what_its_fleet_is(tiny_folder: Path, tmp_path: Path) -> None:
    def key(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        return tasks_of([Cell({}, {**SMALL, "data": str(tiny_folder), "fleet": str(tmp_path / name)})])[0].key

    slow, fast = "[[tiers]]\nms_per_token = 9.0\n", "[[tiers]]\nms_per_token = 1.0\n"
    assert key("a.toml", slow) != key("a.toml", fast) == key("a.toml", fast)
    with pytest.raises(FleetError, match="no setting speed"):  # before the first run begins
        key("a.toml", "speed = 1\n")


def test_a_run_is_named_by_what_its_model_is_and_not_by_where_it_lies(tiny_folder: Path, tmp_path: Path) -> None:
    def key(name: str, weights: bytes) -> str:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(weights)
        (folder / "README.md").write_text(name)
        return tasks_of([Cell({}, {**SMALL, "data": str(tiny_folder), "model": str(folder)})])[0].key

    assert key("a", b"1") == key("b", b"1") != key("a", b"2")


def test_a_row_that_was_torn_by_a_kill_costs_that_row_alone(tmp_path: Path) -> None:
    append_row(tmp_path / "results.jsonl", {"key": "a", "labels": {}})
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"key": "b", "lab')
    append_row(tmp_path / "results.jsonl", {"key": "c", "labels": {}})
    assert [row["key"] for row in read_rows(tmp_path)] == ["a", "c"]


def test_a_lock_is_one_processes_and_leaves_no_file(tmp_path: Path) -> None:
    with holding(tmp_path / "k.lock") as mine, holding(tmp_path / "k.lock") as again:
        assert (mine, again) == (True, False)
    assert list(tmp_path.iterdir()) == []


def test_a_table_has_mean_smallest_and_largest_over_seeds(tmp_path: Path) -> None:
    rows = [
        {
            "key": f"{set_}{seed}",
            "labels": {"seed": str(seed), "set": set_, "partition": "a|b"},
            "accuracy": accuracy,
            "central": None,
            "bytes_up": up,
            "bytes_down": up,
        }
        for set_, up in (("head", 500), ("full", 2_500_000))
        for seed, accuracy in enumerate((0.5, 0.75, 1.0))
    ]
    columns, lines = table([*rows, rows[0]])
    assert columns == ["set", "partition", "seeds", "accuracy", "B up", "B down"]
    assert lines[0] == ["head", "a|b", "3", "0.7500 [0.5000, 1.0000]", "500", "500"]
    assert lines[1][4] == "2,500,000"
    assert "| head | a\\|b | 3 | 0.7500 [0.5000, 1.0000] |" in markdown(columns, lines)
    write_sweep(rows, tmp_path, "t")
    assert "kB up and down a device and round" in (tmp_path / "bytes-0.svg").read_text()
    assert legend(columns) == [("B up", LEGEND["B up"]), ("B down", LEGEND["B down"])]
    assert "| B down | that it is sent, the artifact left out |" in (tmp_path / "report.md").read_text()
    timed = [row | {"virtual_h": 0.25} for row in rows]
    assert (table(timed)[0][-1], table(timed)[1][0][-1]) == ("fleet's min", "15")


def test_what_is_done_is_read_once_and_again_only_by_who_has_a_lock(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = tasks_of([Cell({"seed": str(s)}, {**SMALL, "data": str(tiny_folder), "seed": s}) for s in range(5)])
    for task in tasks:
        append_row(tmp_path / "results.jsonl", {"key": task.key, "labels": {}})
    reads: list[Path] = []
    monkeypatch.setattr(sweep, "whole_rows", lambda path: (reads.append(path), whole_rows(path))[1])
    assert run_sweep(tmp_path, tasks) == 0
    assert len(reads) == 1
    with holding(tmp_path / "0123456789abcdef.lock"):
        other = dataclasses.replace(tasks[0], key="0123456789abcdef")
        assert run_sweep(tmp_path, [other, *tasks]) == 1
    assert len(reads) == 2
