"""Where virtual devices' work is done makes no difference: the same bits, or with many devices in a step nearly so."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from pocketfed.client_sdk.artifacts import Artifact
from pocketfed.client_sdk.outgoing import Kept
from pocketfed.client_sdk.outgoing import UpdateForm as Form
from pocketfed.client_sdk.perform import Reply, Task
from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.client_sdk.trainer import Batch, Examples, TrainConfig, make_batch
from pocketfed.coordinator.answers import Answer, enrol_virtual, write_answers
from pocketfed.coordinator.artifacts import BuiltArtifact, publish_artifact
from pocketfed.coordinator.config import LocalTraining, RunConfig, UpdateForm
from pocketfed.coordinator.progress import RoundResult, create_run
from pocketfed.coordinator.rounds import drive_run
from pocketfed.coordinator.store import Assignment, Device, History, Store, StoreError, Update, now
from pocketfed.model.parameters import Vector
from pocketfed.model.tasks import Dataset
from pocketfed.simulations import batched, grids
from pocketfed.simulations.backends import BackendError, parse_backend
from pocketfed.simulations.batched import gradients, grouped, stack
from pocketfed.simulations.grids import DeviceMaterial, make_grid
from pocketfed.simulations.prefix import SEVERAL, PrefixCaches, open_prefix_cache, prefix_key
from pocketfed.simulations.processes import pack_reply, pack_task, unpack_reply, unpack_task
from pocketfed.simulations.run import encode_examples
from pocketfed.simulations.sharing import open_shared, share

SIZES = (3, 16, 7, 1, 12, 9)  # examples of each device: ragged batches, different numbers of steps
LOCAL = LocalTraining(learning_rate=3e-3, batch_size=4, max_length=32, epochs=2, proximal_mu=0.1, schedule="cosine")
TOPK = UpdateForm(codec="topk:0.2", metrics=("loss", "steps"))


@dataclasses.dataclass
class Ended:
    theta: Vector
    rounds: list[RoundResult]
    rows: list[Any]  # of each assignment: status, examples, bytes up, digest


class Simulated:
    """The same six devices on any backend."""

    def __init__(self, built: BuiltArtifact, artifact: Artifact, dataset: Dataset, folder: Path) -> None:
        self.built, self.artifact, self.dataset, self.folder = built, artifact, dataset, folder
        self.numbers = itertools.count()

    def material(self, trainable_set: str) -> DeviceMaterial:
        trainer = PlanTrainer(self.artifact, trainable_set)
        starts = np.concatenate([[0], np.cumsum(SIZES)])
        parts = {f"d{i}": range(starts[i], starts[i + 1]) for i in range(len(SIZES))}
        scratch = self.folder / str(next(self.numbers))
        scratch.mkdir()
        return DeviceMaterial(trainer, encode_examples(trainer, self.dataset.train, 32), parts, scratch)

    def run(self, backend: str, trainable_set: str, material: DeviceMaterial | None = None, **settings: Any) -> Ended:
        material = material or self.material(trainable_set)
        store = Store(str(material.scratch / "run.db"))
        with store.write() as session:
            publish_artifact(session, self.built, "stable", trainable_set)
            nodes = enrol_virtual(session, "stable", {name: len(part) for name, part in material.parts.items()})
        config = RunConfig(**{"min_devices": 1, "rounds": 2, "seed": 3, "local": LOCAL} | settings)
        run_id = create_run(store, config)
        rounds: list[RoundResult] = []
        grid = make_grid(backend, store, run_id, nodes, material)
        try:
            theta = drive_run(store, run_id, grid, config, on_round=rounds.append)
        finally:
            grid.close()
        columns = (Assignment.id, Assignment.status, Update.num_examples, Update.bytes, Update.digest)
        with store.read() as session:
            asked = sa.select(*columns).outerjoin(Update, Update.assignment_id == Assignment.id)
            rows = [tuple(row) for row in session.execute(asked.order_by(Assignment.id))]
        store.close()
        return Ended(theta, rounds, rows)


@pytest.fixture(scope="module")
def simulated(
    nano_built: BuiltArtifact, nano_artifact: Artifact, tiny_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> Simulated:
    return Simulated(nano_built, nano_artifact, tiny_dataset, tmp_path_factory.mktemp("simulated"))


# ---- the same bits -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sequential(simulated: Simulated) -> Ended:
    return simulated.run("in-process", "lora:4", update=TOPK)


@pytest.mark.parametrize("backend", ["processes:1", "processes:2"])
def test_a_pool_of_any_size_ends_with_the_same_bits_residuals_of_error_feedback_included(
    simulated: Simulated, sequential: Ended, backend: str
) -> None:
    there = simulated.run(backend, "lora:4", update=TOPK)
    assert there.theta.tobytes() == sequential.theta.tobytes()
    assert there.rows == sequential.rows
    assert [(r.bytes_up, r.bytes_down, r.devices) for r in there.rounds] == [
        (r.bytes_up, r.bytes_down, r.devices) for r in sequential.rounds
    ]


def test_a_pool_ends_with_the_same_bits_where_updates_are_of_older_rounds(simulated: Simulated) -> None:
    buffers: dict[str, Any] = {"mode": "fedbuff", "buffer": 2, "cohort": 5, "rounds": 4}
    alone, there = (simulated.run(backend, "head", **buffers) for backend in ("in-process", "processes:2"))
    counted = [int(row_id.split("-")[1]) for row_id, status, *_ in alone.rows if status == "aggregated"]
    assert len(counted) == 8
    assert max(counted.count(number) for number in counted) > 2  # some came late
    assert there.theta.tobytes() == alone.theta.tobytes()
    assert there.rows == alone.rows


@pytest.fixture
def ray() -> Iterator[None]:
    """What it leaves to the garbage collector warns; not within the next test."""
    pytest.importorskip("ray", reason="Ray is not installed")
    yield
    gc.collect()


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_flowers_ray_backend_ends_with_the_same_bits(simulated: Simulated, sequential: Ended) -> None:
    try:
        there = simulated.run(
            "ray:2", "lora:4", update=TOPK
        )  # two actors: who is done first is not who was asked first
    except BackendError as error:
        pytest.skip(str(error))  # the machine is too busy for Ray's own 30 s
    assert there.theta.tobytes() == sequential.theta.tobytes()
    assert there.rows == sequential.rows


def children() -> set[str]:
    """Of this process: their ids."""
    return {pid for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux tells a process's children so")
@pytest.mark.usefixtures("ray")
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_of_a_ray_that_does_not_start_no_process_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import services

    from pocketfed.simulations import flower_ray

    started: list[set[str]] = []
    before = children()

    def fail(*given: object) -> None:
        started.append(children() - before)
        raise OSError("no such node")

    monkeypatch.setattr(services, "get_node", fail)  # what Ray asks last, once its processes run
    monkeypatch.setattr(flower_ray, "TRIES", 2)
    with pytest.raises(BackendError, match="Ray did not start: no such node; try again"):
        flower_ray.start_ray(1)
    assert len(started) == 2
    assert all(started)
    assert children() <= before


# ---- many devices in a step --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable_set", ["head", "norms", "lora:4"])
def test_devices_in_one_step_get_the_gradients_that_each_would_get_alone(
    simulated: Simulated, trainable_set: str
) -> None:
    material = simulated.material(trainable_set)
    trainer, student = material.trainer, stack(material.trainer)
    assert student is not None
    random = np.random.default_rng(1)
    asked: list[tuple[Vector, Batch]] = []
    for i, part in enumerate(material.parts.values()):
        theta = trainer.initial_theta()
        theta += random.standard_normal(theta.size).astype(np.float32) * np.float32(0.05)
        examples = material.examples.take(part)
        weights = random.random(len(part)).astype(np.float32) if i == 1 else None
        asked.append((theta, make_batch(dataclasses.replace(examples, weights=weights), range(len(part)), 0.1)))
    for told, (theta, batch) in zip(gradients(student, trainer, asked), asked, strict=True):
        loss, right, gradient = trainer.gradient(theta, batch)
        assert told[0] == pytest.approx(loss, abs=1e-5)
        assert told[1] == right
        assert np.abs(gradient).max() > 1e-3
        assert np.abs(told[2] - gradient).max() < 1e-5


@pytest.mark.parametrize(
    ("trainable_set", "optimizer"), [("head", "adamw"), ("head", "sgd"), ("norms", "sgd"), ("lora:4", "sgd")]
)
def test_two_rounds_of_devices_in_one_step_end_where_one_after_another_does(
    simulated: Simulated, trainable_set: str, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ragged batches, unequal numbers of steps, FedProx, a schedule and early stopping are each device's own.

    AdamW divides by the gradient's size: where that is hardly more than rounding, so is what it makes of it. Hence SGD.
    """
    local = dataclasses.replace(LOCAL, optimizer=optimizer, momentum=0.5, holdout=0.25, patience=1)
    alone = simulated.run("in-process", trainable_set, local=local)
    together = simulated.run("batched", trainable_set, local=local)
    monkeypatch.setattr(batched, "DEVICES", 2)  # and however many there are at a time
    by_twos = simulated.run("batched", trainable_set, local=local)
    assert np.abs(alone.theta - simulated.material(trainable_set).trainer.initial_theta()).max() > 1e-3
    assert np.abs(together.theta - alone.theta).max() < 1e-5
    assert np.abs(by_twos.theta - together.theta).max() < 1e-5
    assert [row[:4] for row in together.rows] == [row[:4] for row in alone.rows]


@pytest.mark.parametrize("trainable_set", ["norms", "lora:4"])
def test_with_the_default_optimizer_too_it_makes_no_difference_how_many_are_at_work_at_a_time(
    simulated: Simulated, trainable_set: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert LOCAL.optimizer == "adamw"
    together = simulated.run("batched", trainable_set)  # 64 at a time: all six
    monkeypatch.setattr(batched, "DEVICES", 2)
    by_twos = simulated.run("batched", trainable_set)
    assert np.abs(together.theta - simulated.material(trainable_set).trainer.initial_theta()).max() > 1e-3
    assert np.abs(by_twos.theta - together.theta).max() < 1e-5


def test_a_step_holds_at_most_so_many_tokens_padding_counted_and_nobody_is_left_out(simulated: Simulated) -> None:
    def batch(rows: int, tokens: int, smoothing: float = 0.0) -> Batch:
        ids = np.zeros((rows, tokens), np.int64)
        return Batch(ids, ids, np.zeros(rows, np.int64), label_smoothing=smoothing)

    shapes = [batch(4, 8), batch(2, 10), batch(4, 10), batch(9, 50), batch(1, 3), batch(4, 8, 0.1)]
    assert grouped(shapes, 100) == [[4, 0], [1, 2], [3], [5]]  # 2 * 4 * 8, 2 * 4 * 10; 9 * 50 is one device's
    assert grouped(shapes, 120) == [[4, 0, 1], [2], [3], [5]]  # 3 * 4 * 10
    assert grouped(shapes, 10**6) == [[4, 0, 1, 2, 3], [5]]  # another smoothing is another step
    assert grouped(shapes, 8, per_token=False) == [[4, 1], [0, 2], [3], [5]]
    assert grouped([], 100) == []


def test_devices_in_one_step_share_its_seconds(simulated: Simulated) -> None:
    material = simulated.material("head")
    ended = simulated.run("batched", "head", material, rounds=1, local=dataclasses.replace(LOCAL, epochs=20))
    with contextlib.closing(Store(str(material.scratch / "run.db"))) as store, store.read() as session:
        seconds = [metrics["seconds"] for metrics in session.scalars(sa.select(Update.metrics))]
    assert len(seconds) == len(SIZES)
    assert min(seconds) > 0
    assert sum(seconds) < ended.rounds[1].seconds  # each by its own clock would have taken all of the round


def test_a_device_that_fails_in_a_step_fails_alone(simulated: Simulated) -> None:
    material = simulated.material("head")
    nothing = dataclasses.replace(material, parts={**material.parts, "d1": range(0)})
    ended = simulated.run("batched", "head", nothing, rounds=1)
    assert [row[1] for row in ended.rows] == [
        "aggregated",
        "failed",
        "aggregated",
        "aggregated",
        "aggregated",
        "aggregated",
    ]
    assert (ended.rounds[1].devices, ended.rounds[1].failed) == (5, 1)


def test_what_has_no_batched_form_runs_one_after_another_and_says_so(
    simulated: Simulated, caplog: pytest.LogCaptureFixture
) -> None:
    assert stack(simulated.material("full").trainer) is None
    assert "full has no batched form here: its devices train one after another" in caplog.text


# ---- what goes to other processes --------------------------------------------------------------------------------------


def test_a_task_and_a_reply_come_out_of_their_bytes_as_they_went_in() -> None:
    theta, left = np.arange(3, dtype=np.float32), np.full(2, 0.5, np.float32)
    config = TrainConfig(seed=2**64 - 1, max_grad_norm=math.inf)
    task = Task("train", theta, config, 4, "d1", Form("topk:0.1", private=("head",), metrics=("loss",)), True)
    told, kept = unpack_task(pack_task(task, Kept(left)))
    assert dataclasses.replace(told, theta=theta) == dataclasses.replace(task, theta=theta)
    assert (told.theta.tolist(), kept.residual.tolist(), kept.private.size) == ([0, 1, 2], [0.5, 0.5], 0)
    reply = unpack_reply(pack_reply(Reply(b"x\0y", theta, 7, {"loss": 0.1}, Kept(left, theta))))
    assert isinstance(reply, Reply)
    assert (reply.data, reply.num_examples, reply.metrics) == (b"x\0y", 7, {"loss": 0.1})
    assert (reply.delta.tolist(), reply.kept.private.tolist()) == ([0, 1, 2], [0, 1, 2])
    assert unpack_reply(pack_reply("NoExamples: none")) == "NoExamples: none"


@pytest.mark.parametrize("labels", [np.array([0, 2, 1]), (np.array([1, -1]), np.array([0]), np.array([2, 1, -1]))])
def test_examples_of_every_task_are_shared_whole(simulated: Simulated, labels: Any) -> None:
    rows = [np.array([5, 6], np.int64), np.array([7], np.int64), np.array([8, 9, 5], np.int64)]
    material = simulated.material("head")
    parts = {"a": [2, 0], "b": range(1, 2), "c": []}
    weights = np.array([1, 0.5, 0], np.float32)
    mine = dataclasses.replace(material, examples=Examples(rows, labels, weights, 3), parts=parts)
    there = open_shared(share(mine))
    assert [row.tolist() for row in there.examples.rows] == [[5, 6], [7], [8, 9, 5]]
    assert [np.asarray(x).tolist() for x in there.examples.labels] == [np.asarray(x).tolist() for x in labels]
    assert there.examples.weights is not None
    assert (there.examples.weights.tolist(), there.examples.truncated) == ([1, 0.5, 0], 3)
    assert {name: list(part) for name, part in there.parts.items()} == {"a": [2, 0], "b": [1], "c": []}
    assert there.trainer.identity == material.trainer.identity


@pytest.mark.parametrize(
    ("backend", "why"),
    [
        ("grpc", "there is no backend 'grpc'; choose one of in-process"),
        ("batched:3", "there is no backend 'batched:3'"),
        ("processes:0", "'processes:0' asks for '0' processes; give a whole number from 1 to 1024"),
        ("processes:two", "asks for 'two' processes"),
    ],
)
def test_a_backend_that_cannot_be_is_refused(backend: str, why: str) -> None:
    with pytest.raises(BackendError, match=why):
        parse_backend(backend)


def test_without_ray_its_backend_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"run: pip install 'pocketfed\[ray\]'"):
        parse_backend("ray:2")


# ---- what the frozen part makes of a text ------------------------------------------------------------------------------


def test_the_prefix_reads_every_text_once_for_all_devices_rounds_and_epochs_also_where_memory_is_short(
    simulated: Simulated, tmp_path: Path
) -> None:
    plain = simulated.run("in-process", "head")
    material = simulated.material("head")
    width = material.trainer.set.hidden_size
    cache = open_prefix_cache(simulated.artifact, "head", tmp_path, memory_bytes=10 * 4 * width)
    assert cache is not None
    trainer = PlanTrainer(simulated.artifact, "head", cache=cache)
    read: list[bytes] = []
    run_prefix = trainer.run_prefix
    trainer.run_prefix = lambda ids: (read.extend(map(bytes, ids)), run_prefix(ids))[1]  # type: ignore[method-assign]
    ended = simulated.run("in-process", "head", dataclasses.replace(material, trainer=trainer))
    held = [i for part in material.parts.values() for i in part]
    assert sorted(read) == sorted({bytes(material.examples.rows[i]) for i in held})  # two rounds of two epochs
    assert (cache.memory.bytes, cache.disk.bytes) == (10 * 4 * width, (len(read) - 10) * 4 * width)
    assert ended.theta.tobytes() == plain.theta.tobytes()
    cache.close()
    again = open_prefix_cache(simulated.artifact, "head", tmp_path)
    assert again is not None
    assert sum(again.get(material.examples.rows[i]) is not None for i in held) > 0  # the next simulation finds them
    again.close()


def test_the_environment_bounds_the_cache_in_megabytes(
    simulated: Simulated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POCKETFED_CACHE_MB", "3")
    with contextlib.closing(PrefixCaches(tmp_path)) as caches:
        cache = caches.cache_for(simulated.artifact, "head")
        assert cache is not None
        assert (cache.memory.limit_bytes, cache.disk.limit_bytes) == (3 << 20, 16384 << 20)
        monkeypatch.setenv("POCKETFED_CACHE_DISK_MB", "much")
        with pytest.raises(BackendError, match="POCKETFED_CACHE_DISK_MB is 'much'; set it to a whole number of MB"):
            open_prefix_cache(simulated.artifact, "head", tmp_path)


def test_simulations_that_freeze_the_same_blocks_share_what_those_made_of_a_text(
    simulated: Simulated, tmp_path: Path
) -> None:
    with contextlib.closing(PrefixCaches(tmp_path)) as caches:
        first = caches.cache_for(simulated.artifact, "head")
        assert first is not None
        assert caches.cache_for(simulated.artifact, "head") is first
        assert caches.cache_for(simulated.artifact, "norms") is None  # it freezes none
        first.put(np.array([5, 6]), np.ones(simulated.artifact.manifest.set_named("head").hidden_size, np.float32))
        for name in map(str, range(SEVERAL)):  # other models
            files = dict(simulated.artifact.manifest.files)
            files["backbone.bin"] = dataclasses.replace(files["backbone.bin"], sha256=name * 64)
            manifest = dataclasses.replace(simulated.artifact.manifest, files=files)
            caches.cache_for(dataclasses.replace(simulated.artifact, manifest=manifest), "head")
        assert first.memory.bytes == 0  # it was closed: no more than SEVERAL are held
        assert caches.cache_for(simulated.artifact, "head") is not first


def test_a_cache_is_of_one_prefix_and_one_backbone_and_full_it_keeps_what_it_has(
    simulated: Simulated, tmp_path: Path
) -> None:
    artifact = simulated.artifact
    for name in ("backbone.bin", artifact.manifest.set_named("head").prefix):
        files = {**artifact.manifest.files, name: dataclasses.replace(artifact.manifest.files[name], sha256="0" * 64)}
        other = dataclasses.replace(artifact, manifest=dataclasses.replace(artifact.manifest, files=files))
        assert prefix_key(other, "head") != prefix_key(artifact, "head")
    assert open_prefix_cache(artifact, "norms", tmp_path) is None
    width = artifact.manifest.set_named("head").hidden_size
    cache = open_prefix_cache(artifact, "head", tmp_path, 4 * width, 4 * width)
    assert cache is not None
    for i in range(5):
        cache.begin()
        cache.put(np.array([i]), np.full(width, i, np.float32))
    kept = [cache.get(np.array([i])) for i in range(5)]
    assert [None if row is None else row.tolist() for row in kept] == [[0.0] * width, [1.0] * width, None, None, None]
    cache.close()


# ---- many answers at a time --------------------------------------------------------------------------------------------


def test_answers_are_written_many_at_a_time_with_the_rows_that_one_by_one_would_make(
    simulated: Simulated, sequential: Ended, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grids, "BUNCH", 1)
    assert simulated.run("in-process", "lora:4", update=TOPK).rows == sequential.rows


def test_an_answer_to_what_is_not_open_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "run.db"))
    with store.write() as session:
        nodes = enrol_virtual(session, "stable", {"b": 2, "a": 1})
        again = enrol_virtual(session, "stable", {"a": 5, "c": 0})
    assert list(nodes.values()) == ["b", "a"]
    assert {name for node, name in again.items() if node in nodes} == {"a"}
    with store.read() as session:
        assert dict(session.execute(sa.select(Device.name, Device.examples)).all()) == {"b": 2, "a": 5, "c": 0}
    with (
        pytest.raises(StoreError, match="assignment 1-1-1-1-train is not open and cannot become failed"),
        store.write() as session,
    ):
        write_answers(session, [Answer("1-1-1-1-train", 1, now(), now(), error="no room")])
    with store.read() as session:
        assert session.scalars(sa.select(History)).all() == []
    store.close()


def test_a_fleets_tiers_are_kept_with_its_devices_as_much_of_each_as_a_row_holds(database: str) -> None:
    with contextlib.closing(Store(database)) as store:
        with store.write() as session:
            enrol_virtual(session, "stable", {"a": 1, "b": 2}, {"a": "low\0" + 60 * "x"})
        with store.read() as session:
            told = dict(session.execute(sa.select(Device.name, Device.tier)).all())
    assert told == {"a": "low " + 46 * "x", "b": None}
