"""What a device does with a new model: it keeps the one before, compares them on examples of its own, and goes back if it must."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketfed.client_sdk import Device
from pocketfed.client_sdk.artifacts import Artifact
from pocketfed.client_sdk.errors import ConfigurationError, LinkError
from pocketfed.client_sdk.examples import ExampleStore
from pocketfed.client_sdk.judging import Comparison, compare, score
from pocketfed.client_sdk.local import LocalExamples
from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.client_sdk.trainer import Examples, TrainConfig, evaluate, train
from pocketfed.coordinator import signing
from pocketfed.coordinator.artifacts import (
    BuiltArtifact,
    build_artifact,
    describe_file,
    manifest_bytes,
    publish_artifact,
)
from pocketfed.coordinator.operators import audit_lines
from pocketfed.coordinator.server import CoordinatorServer, ServerConfig
from pocketfed.coordinator.store import Release, Store, put_blob
from pocketfed.model.config import STUDENTS
from pocketfed.model.parameters import Vector, encode_vector
from pocketfed.model.tasks import Dataset
from pocketfed.model.tokenization import train_vocabulary


@pytest.fixture(scope="module")
def trainer(nano_artifact: Artifact) -> PlanTrainer:
    return PlanTrainer(nano_artifact, "full")


def encoded(trainer: PlanTrainer, split: Any) -> Examples:
    index = {label: i for i, label in enumerate(trainer.artifact.manifest.labels)}
    return Examples(trainer.encode([e.text for e in split], None, 32), np.array([index[e.label] for e in split]))


@pytest.fixture(scope="module")
def learned(trainer: PlanTrainer, tiny_dataset: Dataset) -> Vector:
    """A model that is nearly always right on the tiny dataset."""
    theta = trainer.initial_theta()
    config = TrainConfig(epochs=8, learning_rate=3e-3, seed=1)
    return theta + train(trainer, theta, encoded(trainer, tiny_dataset.train), config).delta


class Fleet:
    """A coordinator whose releases are values for the set `full` of one artifact, and a device with 96 examples."""

    def __init__(self, folder: Path, built: BuiltArtifact, dataset: Dataset, **options: Any) -> None:
        self.folder, self.built, self.dataset, self.options = folder, built, dataset, options
        self.store = Store(str(folder / "fleet.db"))
        with self.store.write() as session:
            self.keys = signing.ensure_keys(session, folder / "keys")
            publish_artifact(session, built, "stable", "full", self.keys)
        self.server = CoordinatorServer(self.store, ServerConfig("127.0.0.1:0"))
        self.address = f"127.0.0.1:{self.server.start()}"
        self.reports: list[dict[str, Any]] = []
        self.said: list[str] = []
        self.device = self.open()
        self.device.add_examples((e.text, e.label) for e in dataset.train)

    def open(self) -> Device:
        device = Device(self.address, self.folder / "home", name="phone", on_status=self.said.append, **self.options)
        begin = device._link.begin_check_in

        def listening(*arguments: Any, **told: Any) -> Any:
            if told["report"] is not None:
                report = told["report"]
                self.reports.append({f.name: getattr(report, f.name) for f in report.DESCRIPTOR.fields})
            return begin(*arguments, **told)

        device._link.begin_check_in = listening  # type: ignore[method-assign]
        return device

    def reopen(self) -> None:
        self.device.close()
        self.device = self.open()

    def release(self, theta: Vector) -> int:
        with self.store.write() as session:
            digest = put_blob(session, encode_vector("theta", theta))
            row = Release(
                channel="stable", artifact_version=self.built.version, trainable_set="full", parameters=digest
            )
            session.add(row)
            session.flush()
            return row.id

    def check_in(self) -> None:
        """What the background thread does in one turn, without a long poll."""
        self.device.enrol()
        part = self.device._participation
        part.judge()
        part.failing = True
        part.ask_for_work()

    def shelf(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "home" / "release.json").read_text()))

    def accuracy(self) -> float:
        test = self.dataset.test
        return sum(self.device.predict(e.text).label == e.label for e in test) / len(test)

    def close(self) -> None:
        self.device.close()
        self.server.stop()
        self.store.close()


@pytest.fixture
def fleet(tmp_path: Path, nano_built: BuiltArtifact, tiny_dataset: Dataset) -> Iterator[Fleet]:
    made = Fleet(tmp_path, nano_built, tiny_dataset)
    yield made
    made.close()


# ---- going back ------------------------------------------------------------------------------------------------------


def test_a_release_that_is_worse_on_the_devices_held_out_examples_is_gone_back_from_and_told(
    fleet: Fleet, learned: Vector
) -> None:
    good = fleet.release(learned)
    fleet.check_in()
    assert fleet.accuracy() > 0.9
    worse = fleet.release(np.zeros_like(learned))
    fleet.check_in()  # it is adopted: the publisher's word counts first
    assert fleet.shelf()["id"] == worse
    assert fleet.accuracy() < 0.5
    fleet.check_in()  # and then judged, and told
    assert fleet.accuracy() > 0.9
    (report,) = fleet.reports
    held_out = fleet.device._participation._local.count_held_out()
    assert held_out >= 8
    assert (report["release_id"], report["before_id"], report["examples"]) == (worse, good, held_out)
    assert report["went_back"]
    assert report["correct"] < 0.5 * held_out < 0.9 * held_out <= report["correct_before"]
    assert report["loss_sum"] > report["loss_sum_before"] > 0
    assert any(s.startswith(f"went back to the model before: of {held_out} held-out examples") for s in fleet.said)
    fleet.check_in()
    assert len(fleet.reports) == 1  # told once
    fleet.reopen()
    assert fleet.accuracy() > 0.9  # and it stays so
    better = fleet.release(learned * np.float32(1.0001))
    fleet.check_in()
    assert (fleet.shelf()["id"], fleet.shelf()["before"]["id"], fleet.shelf()["went_back"]) == (better, good, False)


def test_a_release_that_is_as_good_stays_and_that_is_told_too(fleet: Fleet, learned: Vector) -> None:
    fleet.release(learned)
    fleet.check_in()
    newer = fleet.release(learned * np.float32(1.001))
    fleet.check_in()
    fleet.check_in()
    assert fleet.device._models.current().release_id == newer  # type: ignore[union-attr]
    assert [(r["release_id"], r["went_back"]) for r in fleet.reports] == [(newer, False)]


def test_the_report_is_sent_until_a_check_in_has_succeeded_also_after_a_restart(fleet: Fleet, learned: Vector) -> None:
    fleet.release(learned)
    fleet.check_in()
    fleet.release(np.zeros_like(learned))
    fleet.check_in()
    fleet.server.stop()
    with pytest.raises(LinkError, match="cannot be reached"):
        fleet.check_in()
    fleet.reopen()
    fleet.server = CoordinatorServer(fleet.store, ServerConfig(fleet.address))
    fleet.server.start()
    fleet.check_in()
    fleet.check_in()
    assert len(fleet.reports) == 2
    assert fleet.reports[0] == fleet.reports[1]
    assert fleet.accuracy() > 0.9


def test_two_models_of_one_artifact_share_its_files_and_only_the_last_two_are_kept(
    fleet: Fleet, learned: Vector
) -> None:
    fleet.check_in()
    for factor in (1.0, 1.001, 1.002):
        fleet.release(learned * np.float32(factor))
        fleet.check_in()
    home = fleet.folder / "home"
    assert [p.name for p in (home / "artifacts").iterdir()] == [fleet.built.version]
    digests = {fleet.shelf()["digest"], fleet.shelf()["before"]["digest"]}
    assert {p.name for p in home.glob("theta-*")} == {f"theta-{d[:16]}.safetensors" for d in digests}
    assert len(digests) == 2


def test_a_device_does_not_go_back_to_what_the_publisher_no_longer_stands_for(
    fleet: Fleet, learned: Vector, nano_built: BuiltArtifact
) -> None:
    fleet.release(learned)
    fleet.check_in()
    other = with_manifest(nano_built, parent=nano_built.version)
    with fleet.store.write() as session:
        publish_artifact(session, other, "stable", "full", fleet.keys, supersede=True)
    fleet.check_in()
    fleet.check_in()
    (report,) = fleet.reports
    assert report["correct"] < report["correct_before"]
    assert not report["went_back"]
    assert fleet.accuracy() < 0.9


def test_a_model_damaged_on_disk_is_stood_in_for_by_the_one_before_until_it_is_fetched_again(
    fleet: Fleet, learned: Vector
) -> None:
    first = fleet.release(learned)
    fleet.check_in()
    second = fleet.release(learned * np.float32(1.001))
    fleet.check_in()
    theta = fleet.folder / "home" / f"theta-{fleet.shelf()['digest'][:16]}.safetensors"
    fleet.device.close()
    data = bytearray(theta.read_bytes())
    data[-1] ^= 1
    theta.write_bytes(data)
    fleet.device = fleet.open()
    assert fleet.accuracy() > 0.9
    assert fleet.device._models.current().release_id == first  # type: ignore[union-attr]
    fleet.check_in()
    assert fleet.device._models.current().release_id == second  # type: ignore[union-attr]
    assert (fleet.shelf()["id"], fleet.shelf()["before"]["id"]) == (second, first)


# ---- another model under a shipped app -------------------------------------------------------------------------------


def test_another_geometry_tokenizer_task_head_and_trainable_set_arrive_without_an_app_update(
    fleet: Fleet, tmp_path: Path
) -> None:
    fleet.check_in()
    assert fleet.device.predict("play some jazz").label in fleet.dataset.labels
    vocabulary = train_vocabulary(["feed the cat", "walk the dog"], 60)
    config = STUDENTS["nano"].with_changes(vocab_size=len(vocabulary), hidden_size=48, num_hidden_layers=1)
    built = build_artifact(
        tmp_path / "other", config=config, state={}, vocabulary=vocabulary, labels=("cat", "dog", "bird"),
        trainable_sets=("head",), quantized=False, max_length=16, seed=1,
    )  # fmt: skip
    with fleet.store.write() as session:
        publish_artifact(session, built, "stable", "head", fleet.keys)
    fleet.check_in()
    assert set(fleet.device.predict("feed the cat").probabilities) == {"cat", "dog", "bird"}
    fleet.check_in()
    assert fleet.reports == []  # no label of the device is one of both: nothing to compare
    assert fleet.shelf()["went_back"] is False
    opened, opening = list[int](), fleet.device._models._open
    fleet.device._models._open = lambda *a: opened.append(1) or opening(*a)  # type: ignore[method-assign, func-returns-value]
    fleet.check_in()
    assert opened == []  # and that is not found out again at every check-in
    fleet.device.add_examples([("feed the cat", "cat")])
    fleet.check_in()
    assert opened == [1]


def with_manifest(built: BuiltArtifact, **changes: Any) -> BuiltArtifact:
    data = built.manifest | changes
    return BuiltArtifact(hashlib.sha256(manifest_bytes(data)).hexdigest(), data, built.folder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"min_sdk": "9.0"}, "the artifact needs SDK '9.0', this is 0.3.0: update the app"),
        ({"task": "regression", "labels": ["warmth"]}, "is for regression; this app's SDK does classification"),
    ],
)
def test_what_this_sdk_cannot_run_is_refused_told_and_never_tried(
    fleet: Fleet, learned: Vector, nano_built: BuiltArtifact, changes: dict[str, Any], says: str
) -> None:
    fleet.release(learned)
    fleet.check_in()
    held = fleet.shelf()
    other = with_manifest(nano_built, **changes)
    with fleet.store.write() as session:
        publish_artifact(session, other, "stable", "full", fleet.keys)
    for _ in range(2):  # it is not offered again
        fleet.check_in()
    assert says in fleet.device.status()
    assert fleet.shelf() == held
    assert fleet.accuracy() > 0.9
    assert not list((fleet.folder / "home" / "artifacts").glob(f"{other.version}*"))  # not a byte of it was fetched
    with fleet.store.read() as session:
        assert [a.target for a in audit_lines(session) if a.act == "release.refused"] == [f"3 {other.version}"]


@pytest.mark.parametrize("break_it", ["a plan that the runtime refuses", "parameters that give no numbers"])
def test_a_model_that_does_not_run_here_never_takes_the_place_of_one_that_does(
    fleet: Fleet, learned: Vector, nano_built: BuiltArtifact, tmp_path: Path, break_it: str
) -> None:
    fleet.release(learned)
    fleet.check_in()
    held = fleet.shelf()
    if break_it.startswith("parameters"):
        fleet.release(np.full_like(learned, 3e38))
    else:
        folder = tmp_path / "newer"
        shutil.copytree(nano_built.folder, folder)
        name = nano_built.manifest["trainable_sets"]["full"]["predict"]
        (folder / name).write_bytes(b"a plan in words of ten years from now")
        files = nano_built.manifest["files"] | {name: describe_file((folder / name).read_bytes())}
        data = nano_built.manifest | {"files": files}
        (folder / "manifest.json").write_bytes(manifest_bytes(data))
        newer = BuiltArtifact(hashlib.sha256(manifest_bytes(data)).hexdigest(), data, folder)
        with fleet.store.write() as session:
            publish_artifact(session, newer, "stable", "full", fleet.keys)
    fleet.check_in()
    assert fleet.device.status().startswith("keeps its model: ")
    assert fleet.shelf() == held
    assert fleet.accuracy() > 0.9


# ---- what is held out ------------------------------------------------------------------------------------------------


def store_of(folder: Path, texts: list[str]) -> ExampleStore:
    store = ExampleStore(folder / "examples.db")
    store.add((text, "music") for text in texts)
    return store


def test_what_is_held_out_stays_so_and_is_never_trained_on(tmp_path: Path, trainer: PlanTrainer) -> None:
    words = [f"{a}{b}" for a in "aeilnorst" for b in "aeilnorst"]  # letters that the vocabulary has
    texts = [f"play {word}" for word in words]
    store = store_of(tmp_path, texts)
    local = LocalExamples(store, 0.2)
    held, trained = local.held_out([trainer])[0], local.training(trainer, 32)
    assert 8 <= len(held) == local.count_held_out() <= 35
    assert len(trained) == local.count() == 81 - len(held)

    def rows(examples: Examples) -> set[bytes]:
        return {row.tobytes() for row in examples.rows}

    before = rows(held)
    store.add((text, "lights") for text in (*texts[:40], *(f"dim {word}" for word in words)))
    assert before <= rows(local.held_out([trainer])[0])
    assert not rows(local.held_out([trainer])[0]) & rows(local.training(trainer, 32))  # the same text is on one side
    store.close()


def test_few_examples_are_all_trained_on_and_judge_nothing(tmp_path: Path, trainer: PlanTrainer) -> None:
    store = store_of(tmp_path, [f"play song {n}" for n in range(12)])
    for share in (0.0, 0.2):
        local = LocalExamples(store, share)
        assert (local.count(), local.count_held_out(), local.held_out([trainer])) == (12, 0, [])
        assert len(local.training(trainer, 32)) == 12
    store.close()


@pytest.mark.parametrize("share", [-0.1, 0.6, 1.0])
def test_a_share_that_cannot_be_held_out_is_refused_and_the_home_is_free_again(tmp_path: Path, share: float) -> None:
    with pytest.raises(ConfigurationError, match=r"holdout is .*; give the share of examples to hold out, 0 to 0.5"):
        Device("127.0.0.1:1", tmp_path / "home", holdout=share)
    Device("127.0.0.1:1", tmp_path / "home").close()


def test_without_a_holdout_nothing_is_compared(
    tmp_path: Path, nano_built: BuiltArtifact, tiny_dataset: Dataset, learned: Vector
) -> None:
    fleet = Fleet(tmp_path, nano_built, tiny_dataset, holdout=0.0)
    for theta in (learned, np.zeros_like(learned)):
        fleet.release(theta)
        fleet.check_in()
    fleet.check_in()
    assert fleet.reports == []
    assert fleet.accuracy() < 0.5
    fleet.close()


# ---- judging ---------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_evaluation_one_by_one(
    trainer: PlanTrainer, learned: Vector, tiny_dataset: Dataset
) -> None:
    examples = encoded(trainer, tiny_dataset.test)
    right, losses = score(trainer, learned, examples)
    measured = evaluate(trainer, learned, examples)
    assert right.mean() == pytest.approx(measured["accuracy"])
    assert losses.mean() == pytest.approx(measured["loss"], rel=1e-5, abs=1e-6)


def test_a_comparison_counts_what_was_lost_and_won_and_distrusts_losses_that_are_no_numbers() -> None:
    right, wrong = np.array([True, True, True, False]), np.array([True, False, False, True])
    found = compare((wrong, np.full(4, 0.5)), (right, np.full(4, 0.25)))
    assert found == Comparison(4, 2, 3, 2.0, 1.0, lost=2, won=1)
    broken = compare((right, np.array([0.5, np.nan, np.inf, 0.5])), (right, np.full(4, 0.25)))
    assert broken == Comparison(4, 1, 3, 1.0, 1.0, lost=2, won=0)


@pytest.mark.parametrize(
    ("examples", "lost", "won", "margin", "worse"),
    [
        (100, 10, 0, 0.1, False),  # not beyond the margin
        (100, 11, 0, 0.1, True),
        (100, 31, 20, 0.1, False),  # 11 of 51 that differ: 2 * sqrt(51) = 14.3
        (100, 35, 10, 0.1, True),  # 25 > 2 * sqrt(45) = 13.4
        (8, 4, 0, 0.1, False),  # 4 = 2 * sqrt(4): chance
        (8, 5, 0, 0.1, True),
        (100, 11, 0, 1.0, False),  # an app that never wants to go back
        (100, 0, 0, 0.0, False),
    ],
)
def test_worse_is_beyond_the_margin_and_beyond_chance(
    examples: int, lost: int, won: int, margin: float, worse: bool
) -> None:
    assert Comparison(examples, 0, 0, 0.0, 0.0, lost, won).is_worse(margin) is worse
