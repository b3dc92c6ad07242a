"""What a simulation says: figures over devices, the lines beside it, costs, and pages that need nothing but themselves."""

from __future__ import annotations

import dataclasses
import doctest
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketfed.client_sdk.artifacts import Artifact
from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.client_sdk.trainer import Examples, TrainConfig, evaluate, train
from pocketfed.coordinator.config import LocalTraining, RunConfig, UpdateForm
from pocketfed.coordinator.progress import RoundResult
from pocketfed.coordinator.spending import Spent
from pocketfed.model.tasks import Dataset, Example
from pocketfed.simulations import baselines, charts, costs, report, served, sweep
from pocketfed.simulations.baselines import LINES, BaselineError, budget, parse_lines, training
from pocketfed.simulations.comparison import names_of, write_comparison
from pocketfed.simulations.costs import CostError, EnergyModel, FleetWork, cost_of
from pocketfed.simulations.experiment import settings_of
from pocketfed.simulations.plots import plots
from pocketfed.simulations.report import ReportError, describe, read_run, write_report
from pocketfed.simulations.resuming import SimulationError
from pocketfed.simulations.run import SimulationConfig, SimulationResult, encode_examples, simulate
from pocketfed.simulations.served import hold_out, spread_of, yardstick

HOSTILE = '</text><script src="//x">|`[a](b)` \0‮'
RUN = RunConfig(
    name=f"run {HOSTILE}",
    rounds=2,
    min_devices=1,
    local=LocalTraining(batch_size=8, learning_rate=0.005, max_length=16),
)


@pytest.fixture(scope="module")
def config(tiny_folder: Path) -> SimulationConfig:
    return SimulationConfig(tiny_folder, "nano", devices=6, train="head", partition="by:user", hold_out=0.25, run=RUN)


@pytest.fixture(scope="module")
def result(config: SimulationConfig) -> SimulationResult:
    return simulate(config, lines=LINES)


def test_the_examples_in_the_modules_are_true() -> None:
    for module in (baselines, charts, costs, report, served, sweep):
        assert doctest.testmod(module).failed == 0


# ---- over devices --------------------------------------------------------------------------------------------------------


def test_mean_tenth_percentile_and_worst_decile_of_eleven_devices() -> None:
    """0.0, 0.1, ..., 1.0: the mean is 0.5; rank 10 % of the way is the second; the lowest two are more than a tenth."""
    found = spread_of({f"d{i:02d}": i / 10 for i in range(11)}, "a test")
    assert found is not None
    assert (found.mean, found.p10, found.worst_decile) == pytest.approx((0.5, 0.1, 0.05))
    assert (found.devices, found.source) == (11, "a test")
    assert spread_of({}) is None


def test_what_a_device_holds_out_is_never_trained_on_and_the_same_again() -> None:
    parts = {"a": [1, 3, 5, 7, 9, 11, 13, 15], "b": [0, 2, 4]}
    kept, aside = hold_out(parts, 0.25, seed=3)
    assert {name: len(part) for name, part in aside.items()} == {"a": 2, "b": 0}
    assert {name: sorted(kept[name] + aside[name]) for name in parts} == parts
    assert (kept, aside) == hold_out(parts, 0.25, seed=3)
    assert hold_out(parts, 0.0, seed=3)[0] == parts


@pytest.fixture
def trainer(nano_artifact: Artifact) -> PlanTrainer:
    return PlanTrainer(nano_artifact, "head")


def test_by_label_a_device_sees_the_recalls_in_its_own_shares(trainer: PlanTrainer, tiny_dataset: Dataset) -> None:
    train_, test = (encode_examples(trainer, part, 16) for part in (tiny_dataset.train, tiny_dataset.test))
    labels, start = np.asarray(train_.labels), trainer.initial_theta()
    config = TrainConfig(epochs=30, learning_rate=0.05)
    theta = start + train(trainer, start, train_.take(np.flatnonzero(labels == 1)), config).delta
    ones, twos = np.flatnonzero(labels == 1)[:3].tolist(), np.flatnonzero(labels == 2)[:1].tolist()
    stick = yardstick(
        trainer, (tiny_dataset.train, train_), (tiny_dataset.test, test), {"d": ones + twos}, {"d": []}, "iid"
    )
    assert stick is not None
    assert stick.source == "the test, by label as on the device"
    recall = {n: evaluate(trainer, theta, test.take(np.flatnonzero(test.labels == n)))["accuracy"] for n in (1, 2)}
    assert recall == {1: 1.0, 2: 0.0}
    assert stick.accuracy(trainer, theta, "d") == 0.75
    personal = stick.measure(trainer, lambda device: theta, np.zeros_like(theta))
    assert personal is not None
    assert personal.mean == 0.75


def test_a_speaker_of_the_test_is_measured_on_what_that_speaker_says(trainer: PlanTrainer) -> None:
    said = [Example("play jazz", "music", user=u) for u in ("ann", "bob", "ann", "cid")]
    examples = encode_examples(trainer, said, 16)
    given = ((said, examples), (said, examples), {"d0": [0], "d1": [1, 3], "d2": [1]}, {}, "by:user")
    stick = yardstick(trainer, *given)
    assert stick is not None
    assert {name: len(own) for name, own in stick.own.items()} == {"d0": 2, "d1": 2, "d2": 1}
    strangers = [dataclasses.replace(e, user="eve") for e in said]
    stick = yardstick(trainer, given[0], (strangers, examples), *given[2:])
    assert stick is not None
    assert stick.source == "the test, by label as on the device"


# ---- lines ---------------------------------------------------------------------------------------------------------------


def test_lines_get_the_epochs_that_a_device_goes_through() -> None:
    run = RunConfig(rounds=12, cohort=5, local=LocalTraining(epochs=2, proximal_mu=0.1, max_steps=3))
    assert budget(run, devices=10) == 12  # 24 epochs for those that are asked, and half are
    together, alone = training(run, 10, together=True), training(run, 10, together=False)
    assert (together.epochs, together.max_steps, alone.max_steps) == (12, 180, 18)
    assert together.proximal_mu == 0.0
    falling = dataclasses.replace(run, round_schedule="cosine")
    assert (together.schedule, training(falling, 10, together=True).schedule) == ("constant", "cosine")
    assert parse_lines("local, central") == ("central", "local")
    assert (parse_lines("none"), parse_lines("all")) == ((), LINES)
    with pytest.raises(
        BaselineError, match="no baseline 'centre'; choose of central, local, previous, or none, or all"
    ):
        parse_lines("centre")


def test_the_central_line_is_the_devices_loop_over_all_data_measured_after_each_epoch(
    trainer: PlanTrainer, tiny_dataset: Dataset, tmp_path: Path
) -> None:
    examples, test = (encode_examples(trainer, part, 16) for part in (tiny_dataset.train, tiny_dataset.test))
    theta, config = trainer.initial_theta(), TrainConfig(epochs=3, learning_rate=0.01, seed=4)
    line, trained = baselines.central(trainer, theta, examples, test, config)
    assert trained.tobytes() == (theta + train(trainer, theta, examples, config).delta).tobytes()
    assert sorted(line.curve) == [0, 1, 2, 3]
    first = theta + train(trainer, theta, examples, dataclasses.replace(config, epochs=1)).delta
    assert line.curve[1] == evaluate(trainer, first, test)["accuracy"]
    key = baselines.key_of("x", theta, (examples, test), config)
    assert key != baselines.key_of("x", theta, (examples, test), dataclasses.replace(config, seed=5))
    made: list[int] = []

    def make() -> Any:
        made.append(0)
        return line, trained

    for _ in range(2):
        kept, kept_theta = baselines.kept_central(tmp_path, key, trainer.size, make)
        assert kept == line
        assert kept_theta.tobytes() == trained.tobytes()
    assert made == [0]


def test_each_device_alone_learns_its_own_label_and_no_other(trainer: PlanTrainer, tiny_dataset: Dataset) -> None:
    examples, test = (encode_examples(trainer, part, 16) for part in (tiny_dataset.train, tiny_dataset.test))
    labels = np.asarray(examples.labels)
    parts: dict[str, Examples] = {f"d{n}": examples.take(np.flatnonzero(labels == n)) for n in range(4)}
    config = TrainConfig(epochs=30, learning_rate=0.05)
    line = baselines.local(trainer, trainer.initial_theta(), parts, test, config, None)
    assert line.on_test is not None
    assert dict(line.on_test.values) == {f"d{n}": 0.25 for n in range(4)}  # a quarter of the test has it
    assert (line.accuracy, line.devices, line.epochs) == (0.25, 4, 30)


def test_a_device_that_cannot_train_alone_is_left_out_and_said(trainer: PlanTrainer, tiny_dataset: Dataset) -> None:
    examples = encode_examples(trainer, tiny_dataset.train, 16)
    parts = {"a": examples.take([0, 1]), "b": examples.take([])}
    line = baselines.local(trainer, trainer.initial_theta(), parts, examples, TrainConfig(), None)
    assert (line.devices, line.why) == (1, "b: the device has no labelled examples; add some before it takes part")


# ---- costs ---------------------------------------------------------------------------------------------------------------


def row(number: int, devices: int, up: int, down: int) -> RoundResult:
    return RoundResult(number, "finished", 0.5, 1.0, None, devices, 0, up, down, 2.0)


def test_costs_of_two_rounds_added_up_by_hand() -> None:
    rounds = [row(0, 0, 0, 0), row(1, 2, 2_000_000, 8_000_000), row(2, 2, 2_000_000, 4_000_000)]
    spent = {
        "a": Spent(3_000_000, 7_000_000, 30.0, 2, 4_000_000, 2),
        "b": Spent(1_000_000, 5_000_000, 10.0, 2, 4_000_000, 2),
    }
    found = cost_of(rounds, spent, 4, EnergyModel(watts=2, joules_per_mb_up=1, joules_per_mb_down=0.5))
    assert (found.bytes_up, found.bytes_down, found.most_bytes_up) == (1_000_000, 3_000_000, 3_000_000)
    assert (found.device_seconds, found.total_device_seconds, found.seconds_are) == (10.0, 40.0, "measured")
    assert (found.total_joules, found.joules) == (2 * 40 + 4 + 6, 22.5)
    assert (found.wall_s, found.virtual_s) == (6.0, None)
    assert (found.worked_seconds, found.tier_watts) == (None, None)
    work = FleetWork(training_s=100.0, device_s=160.0, joules=640.0, virtual_s=7200.0, watts={"all": 4.0})
    fleet = cost_of(rounds, spent, 4, EnergyModel(), (0, 400_000), work)
    assert (fleet.device_seconds, fleet.seconds_are, fleet.virtual_s) == (25.0, "fleet", 7200.0)
    assert (fleet.worked_seconds, fleet.total_worked_seconds) == (40.0, 160.0)
    assert (fleet.bytes_up, fleet.bytes_down, fleet.uncounted_bytes_down) == (1_000_000, 3_100_000, 100_000)
    assert (fleet.joules, fleet.total_joules, fleet.energy) == (160.0, 640.0, None)  # 4 W, whatever EnergyModel says
    assert (found.round_bytes_up, found.round_bytes_down) == (1_000_000, 2_000_000)  # 4 MB down were the artifact
    with pytest.raises(CostError, match=r"energy.watts is -1; it must be a finite number"):
        EnergyModel(watts=-1)


# ---- a run ---------------------------------------------------------------------------------------------------------------


def test_every_run_reports_devices_lines_and_costs(result: SimulationResult) -> None:
    found = result.found
    assert found is not None
    assert found.served is not None
    assert found.costs is not None
    assert (found.served.devices, found.served.source) == (6, "what they hold out")
    assert found.lines["previous"].accuracy == result.rounds[0].accuracy
    assert found.lines["central"].epochs == found.lines["local"].epochs == 2
    assert found.costs.bytes_up == sum(r.bytes_up for r in result.rounds) / 6
    assert found.costs.total_device_seconds > 0
    assert found.costs.bytes_down > found.costs.bytes_up  # the artifact
    assert found.costs.round_bytes_down == found.costs.round_bytes_up  # theta, and a difference of it


def test_personal_heads_are_measured_as_each_device_has_them(config: SimulationConfig) -> None:
    run = dataclasses.replace(RUN, rounds=6, update=UpdateForm(private=("classifier",)))
    own = simulate(dataclasses.replace(config, train="norms", partition="by:label", devices=4, run=run))
    assert own.found is not None
    assert own.found.served is not None
    assert own.found.served.mean == 1.0  # each device has one label, and a head that has seen only that
    assert own.rounds[-1].accuracy is not None
    assert own.rounds[-1].accuracy < 0.6  # the head that the coordinator has never learned anything


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def read_page(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text())
    return reader


def test_a_report_needs_nothing_but_itself_and_escapes_every_name(
    config: SimulationConfig, result: SimulationResult, tmp_path: Path
) -> None:
    run = describe(result, settings_of(config), RUN.name)
    write_report(run, tmp_path, result.partition_svg)
    page = read_page(tmp_path / "report.html")
    assert {"script", "link", "img", "iframe", "object", "base"}.isdisjoint(page.tags)
    links = [value or "" for name, value in page.attributes if name in ("src", "href", "xlink:href", "data", "action")]
    assert [link[:40] for link in links if not link.startswith("data:image/png;base64,")] == []
    assert not re.search(r"https?:|url\(|@import", (tmp_path / "report.html").read_text())
    assert page.tags.count("svg") == 4
    assert '</text><script src="//x">|`[a](b)` ��' in page.text  # as text, what turns it around taken out
    assert "�" in page.text
    assert str(result.found.served.worst_decile if result.found and result.found.served else "")[:6] in page.text
    assert "prefers-color-scheme:dark" in (tmp_path / "report.html").read_text()
    assert ET.parse(tmp_path / "partition.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"
    for name in ("rounds", "bytes", "devices"):
        svg = ET.parse(tmp_path / f"{name}.svg").getroot()
        assert svg.tag == "{http://www.w3.org/2000/svg}svg"
        labels = ["".join(t.itertext()) for t in svg.iter("{http://www.w3.org/2000/svg}text")]
        assert {"rounds": "round", "bytes": "MB up and down a device, the artifact's download included"}.get(
            name, "device, the worst-served first"
        ) in labels
    markdown = (tmp_path / "report.md").read_text()
    assert "![rounds](rounds.svg)" in markdown
    assert "\\<script" in markdown
    assert not re.search(r"(?<!\\)<script|(?<!\\)\[a\]\(b\)", markdown)
    assert read_run(tmp_path)["final"]["parameters_sha256"] == result.to_dict()["final"]["parameters_sha256"]
    assert list(tmp_path.glob("*.partial")) == []


def section(markdown: str, heading: str) -> list[list[str]]:
    """The rows of a table below its head."""
    lines = markdown.split(f"## {heading}\n\n")[1].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_a_fleets_report_says_where_assignments_ended_and_what_all_of_it_cost(
    config: SimulationConfig, result: SimulationResult, tmp_path: Path
) -> None:
    """About half are lost before their download; the others train for less than a second and upload until the deadline."""
    write_report(describe(result, settings_of(config), RUN.name), tmp_path / "no fleet")
    without = (tmp_path / "no fleet" / "report.md").read_text()
    assert "Where assignments ended" not in without
    assert "3 W x seconds of training + 2.3 J a MB up" in without
    (tmp_path / "f.toml").write_text(
        "[dropout]\ndownload = 0.5\n[[tiers]]\nname = 'thin'\nupload_mbps = 1e-6\nwatts = 2.5\n"
    )
    run = dataclasses.replace(RUN, rounds=1, deadline_s=5.0, wait_s=600.0, max_attempts=1)
    told = simulate(dataclasses.replace(config, fleet=str(tmp_path / "f.toml"), run=run))
    assert told.found is not None
    assert told.found.costs is not None
    write_report(describe(told, settings_of(config), "t"), tmp_path)
    page = (tmp_path / "report.md").read_text()
    (download, training, upload) = section(page, "Where assignments ended")
    lost = int(download[2])
    assert download == ["download", "6", str(lost), f"{lost / 6:.1%}"]
    assert training == ["training", str(6 - lost), "0", "0.0%"]
    assert upload == ["upload", str(6 - lost), "0", "0.0%"]
    (stopped,) = section(page, "Told to stop by the round")
    assert stopped == ["the round's deadline came first", str(6 - lost), f"{(6 - lost) / 6:.1%}"]
    costs = dict(section(page, "Costs"))
    assert told.found.costs.total_worked_seconds == pytest.approx(5 * (6 - lost), abs=0.1)
    assert told.found.costs.total_joules == pytest.approx(2.5 * 5 * (6 - lost), abs=0.3)
    assert costs["the estimate"].endswith("which also drain the batteries: thin 2.5 W")
    assert "download, training and upload, s of all devices" in costs
    assert told.found.costs.total_device_seconds < 1  # of training


def test_a_fleets_energy_is_its_own(config: SimulationConfig) -> None:
    with pytest.raises(SimulationError, match="the energy of the fleet 'steady' is that of its own watts; set them in"):
        simulate(dataclasses.replace(config, fleet="steady", energy=EnergyModel(watts=9.0)))


def test_runs_are_laid_over_each_other_with_what_differs(
    config: SimulationConfig, result: SimulationResult, tmp_path: Path
) -> None:
    run = describe(result, settings_of(config), "one")
    other = json.loads(json.dumps(run, default=str)) | {"title": "two"}
    other["config"]["local"]["epochs"] = 7
    write_comparison([run, other], tmp_path)
    page = read_page(tmp_path / "report.html")
    assert page.tags.count("svg") == 2
    rows = [line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("| local.")]
    assert rows == ["| local.epochs | 1 | 7 |"]
    assert "| setting | one | two |" in (tmp_path / "report.md").read_text()
    with pytest.raises(ReportError, match="1 run cannot be compared"):
        write_comparison([run], tmp_path)


def test_runs_of_one_name_are_called_by_what_differs_and_changed_data_are_no_secret(
    config: SimulationConfig, result: SimulationResult, tmp_path: Path
) -> None:
    run = json.loads(json.dumps(describe(result, settings_of(config), "simulate d.jsonl"), default=str))
    other = json.loads(json.dumps(run))
    other["config"]["local"]["learning_rate"], other["config"]["partition"] = 0.25, "iid"
    assert names_of([run, other]) == ["learning_rate 0.005, partition by:user", "learning_rate 0.25, partition iid"]
    assert names_of([run, run]) == ["1 simulate d.jsonl", "2 simulate d.jsonl"]
    other["data"]["sha256"], other["lines"]["central"]["curve"] = "0" * 64, {"0": 0.0, "2": 0.5}
    write_comparison([run, other], tmp_path)
    markdown = (tmp_path / "report.md").read_text()
    assert "# 2 runs compared: the data changed between them" in markdown
    assert f"| data, SHA-256 | {run['data']['sha256'][:16]} | {'0' * 16} |" in markdown
    served = run["devices"]
    figures = " | ".join(report.figure(served[key]) for key in ("mean", "p10", "worst_decile"))
    assert f"| learning\\_rate 0.25, partition iid | federated | {figures} |" in markdown
    labels = [text for text in ET.parse(tmp_path / "rounds.svg").getroot().itertext() if text]
    whose = [text for text in labels if "all data in one place" in text]
    assert whose == [f"{name}: all data in one place" for name in names_of([run, other])]
    assert labels.count("the model before") == 1  # of both the same: drawn once


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 99}', '{"format": 1, "rounds": [], "config": {}}'])
def test_what_is_no_report_is_refused_in_a_sentence(tmp_path: Path, content: str) -> None:
    with pytest.raises(ReportError, match=r"cannot read .*run.json \(No such file or directory\); give the folder"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ReportError, match=r"run.json is not the run.json of a --report of this version"):
        read_run(tmp_path)


def texts_of(svg: str) -> list[str]:
    return ["".join(text.itertext()) for text in ET.fromstring(svg).iter("text")]


def test_rounds_are_whole_wherever_points_lie_and_long_numbers_have_room() -> None:
    curve = charts.Series("central", [(0, 0.1), (0.5, 0.2), (1, 0.3), (3, 0.4)])
    assert [t for t in texts_of(charts.chart("t", "round", "y", [curve], whole_x=True))[1:] if "." not in t][:4] == [
        "0", "1", "2", "3",
    ]  # fmt: skip
    svg = charts.chart("t", "x", "y", [charts.Series("s", [(0, 0), (0.0004, 123456)])])
    (last,) = [t for t in ET.fromstring(svg).iter("text") if t.text == "0.0004"]
    assert float(last.attrib["x"]) + charts.DIGIT * len("0.0004") / 2 <= charts.WIDTH
    assert all(float(t.attrib["x"]) >= 20 + charts.DIGIT * len(t.text or "") for t in ET.fromstring(svg).iter("text")
               if t.attrib.get("text-anchor") == "end")  # fmt: skip


def test_levels_on_one_height_take_turns() -> None:
    levels = [charts.Series(name, [(0, y), (2, y)], "level") for name, y in (("a", 0.5), ("b", 0.9), ("c", 0.5))]
    paths = [p.attrib for p in ET.fromstring(charts.chart("t", "x", "y", levels)).iter("path")]
    drawn = {p["class"]: p for p in paths if p["class"].startswith("line") and "H" in p["d"]}
    assert (drawn["line c0"]["stroke-dasharray"], drawn["line c2"]["stroke-dasharray"]) == ("6 6", "6 6")
    assert (drawn["line c0"]["stroke-dashoffset"], drawn["line c2"]["stroke-dashoffset"]) == ("0", "-6")
    assert "stroke-dashoffset" not in drawn["line c1"]


def test_the_fleets_clock_is_told_in_what_fits_it(config: SimulationConfig, result: SimulationResult) -> None:
    run = describe(result, settings_of(config), "one")
    for seconds, word, last in ((30.0, "seconds", "60"), (1800.0, "minutes", "60"), (36000.0, "hours", "20")):
        timed = run | {"rounds": [r | {"virtual_s": seconds * (r["round"] > 0)} for r in run["rounds"]]}
        shown = texts_of(plots([timed], ["federated"])["clock"])
        assert {word, last} <= set(shown)


def test_axes_have_round_numbers_and_nothing_is_drawn_of_nothing() -> None:
    assert charts.ticks(0.0, 0.0) != []
    assert charts.chart("t", "x", "y", []) == ""
    svg = charts.chart("t", "x", "y", [charts.Series("s", [(1, 0.5), (float("nan"), 0.5), (1000, 0.75)])], log_x=True)
    root = ET.fromstring(svg)
    labels = ["".join(t.itertext()) for t in root.iter("text")]
    assert {"1", "10", "100", "1000"} <= set(labels)
    assert len(list(root.iter("circle"))) == 3  # two points and the legend
