"""A federated run on one machine: data, student, artifact, partition, and rounds over virtual devices."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketfed.client_sdk.artifacts import Artifact, open_artifact
from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.client_sdk.trainer import Examples, evaluate
from pocketfed.coordinator.answers import enrol_virtual, real_device
from pocketfed.coordinator.artifacts import build_artifact, publish_artifact
from pocketfed.coordinator.config import RunConfig
from pocketfed.coordinator.progress import RoundResult, create_run, results_of
from pocketfed.coordinator.rounds import drive_run, recall_end
from pocketfed.coordinator.spending import spent_in
from pocketfed.coordinator.store import Store, by_clock
from pocketfed.model.parameters import Vector
from pocketfed.model.tasks import Dataset, Example, read_dataset
from pocketfed.simulations.backends import parse_backend
from pocketfed.simulations.costs import EnergyModel, cost_of
from pocketfed.simulations.findings import Findings, Material, find, keep_lines
from pocketfed.simulations.fleet import Fleet
from pocketfed.simulations.fleet_files import load_fleet
from pocketfed.simulations.partition import label_counts, partition
from pocketfed.simulations.partition_picture import draw_partition
from pocketfed.simulations.resuming import Resume, SimulationError, digest_of, digest_of_fleet, plain, run_to_drive
from pocketfed.simulations.served import hold_out
from pocketfed.simulations.virtual import Demand, VirtualClock, VirtualGrid


@dataclass(frozen=True)
class SimulationConfig:
    """What to simulate.

    Args:
        model: a preset (a student that starts untrained) or a model folder.
        train: the trainable set; empty: `full` for a preset, `lora:8` for a model folder.
        partition: as `partition` takes it.
        fleet: as `load_fleet` takes it; empty: all devices are always there and take no time.
        hold_out: share of its examples that each device never trains on, to be measured on.
        energy: what a second of training and a megabyte cost.
        run: rounds, cohort, strategy, local training and seed.
        backend: where devices train, one of `backends.BACKENDS`.

    Raises:
        SimulationError: hold_out is no share.
    """

    data: Path
    model: str = "micro"
    devices: int = 10
    partition: str = "iid"
    train: str = ""
    run: RunConfig = field(default_factory=RunConfig)
    fleet: str = ""
    hold_out: float = 0.0
    energy: EnergyModel = field(default_factory=EnergyModel)
    backend: str = "in-process"

    def __post_init__(self) -> None:
        if not 0 <= self.hold_out <= 0.9:
            raise SimulationError(f"hold_out is {self.hold_out!r}; give a share between 0 and 0.9")

    def made_of(self) -> dict[str, Any]:
        """Everything but the run's own settings, as it is stored with the run."""
        return {k: v for k, v in plain(dataclasses.asdict(self)).items() if k not in ("run", "energy", "backend")}


@dataclass(frozen=True)
class SimulationResult:
    """rounds[0] is the start. theta: (P,) the final parameters."""

    rounds: tuple[RoundResult, ...]
    theta: Vector
    model: Mapping[str, Any]
    seed: int
    test_examples: int
    test_source: str
    run_id: int
    skipped: Mapping[str, int] = field(default_factory=dict)  # rows of the data that could not be used, by reason
    virtual_s: float | None = None  # with a fleet: its time from beginning to end
    device_s: float | None = None  # with a fleet: for which devices worked, what no round has counted included
    dealt: tuple[NDArray[np.int64], Sequence[str], str] | None = None  # (devices, labels) counts, the labels, a title
    found: Findings | None = None
    data: Mapping[str, Any] = field(default_factory=dict)  # its name, digest and sizes

    @cached_property
    def partition_svg(self) -> str:
        """A picture of who holds which labels; drawn when somebody asks for it."""
        return draw_partition(*self.dealt) if self.dealt is not None else ""

    def to_dict(self) -> dict[str, Any]:
        """What `simulate --json` writes."""
        last = self.rounds[-1]
        return {
            "rounds": [r.to_dict() for r in self.rounds],
            "final": {
                "accuracy": last.accuracy,
                "loss": last.loss,
                "test_examples": self.test_examples,
                "test_source": self.test_source,
                "parameters_sha256": sha256(self.theta.tobytes()).hexdigest(),
            },
            "model": dict(self.model),
            "seed": self.seed,
            "skipped": dict(self.skipped),
            **({} if self.virtual_s is None else {"virtual_s": self.virtual_s, "device_s": self.device_s}),
            "data": dict(self.data),
            **(self.found.to_dict() if self.found else {}),
        }


def prepare_artifact(model: str, dataset: Dataset, train: str, folder: Path, seed: int, max_length: int) -> Artifact:
    """Build the artifact that a preset's or a model folder's student makes for a data set's labels.

    An untrained student's vocabulary is trained on the training texts: fine in a simulation; a real fleet's texts never
    come together, so there it has to come from a public corpus (`pocketfed distill`).
    """
    from pocketfed.model.checkpoints import load, tokens_of
    from pocketfed.model.config import STUDENTS, preset
    from pocketfed.model.tokenization import train_vocabulary

    given = Path(model)
    if model in STUDENTS or not given.exists():
        config = preset(model)
        vocabulary = train_vocabulary([t for e in dataset.train for t in (e.text, e.text_pair) if t], config.vocab_size)
        config = config.with_changes(vocab_size=len(vocabulary))
        built = build_artifact(
            folder,
            config=config,
            state={},
            vocabulary=vocabulary,
            labels=dataset.labels,
            trainable_sets=[train or "full"],
            quantized=False,
            max_length=max_length,
            preset=model,
            seed=seed,
        )
    else:
        checkpoint = load(given)
        built = build_artifact(
            folder,
            config=checkpoint.config,
            state=checkpoint.state,
            vocabulary=tokens_of(checkpoint),
            labels=dataset.labels,
            trainable_sets=[train or "lora:8"],
            quantized=checkpoint.quantization == "int8",
            head_labels=checkpoint.labels,
            max_length=max_length,
            preset=given.name,
            seed=seed,
        )
    return open_artifact(built.folder, built.version)


def encode_examples(trainer: PlanTrainer, examples: Sequence[Example], max_length: int) -> Examples:
    """Labelled examples as ids and label indices."""
    index = {label: i for i, label in enumerate(trainer.artifact.manifest.labels)}
    usable = [e for e in examples if e.label in index]
    rows = trainer.encode([e.text for e in usable], [e.text_pair for e in usable], max_length)
    return Examples(rows, np.array([index[e.label or ""] for e in usable], np.int64), truncated=rows.truncated)


def device_names(count: int) -> list[str]:
    """device-000 … : their order is that of their numbers."""
    width = max(3, len(str(count - 1)))
    return [f"device-{i:0{width}d}" for i in range(count)]


@contextlib.contextmanager
def _open_store(database: str | None, folder: Path) -> Iterator[Store]:
    store = Store(database or str(folder / "simulation.db"))
    try:
        yield store
    finally:
        store.close()


def simulate(
    config: SimulationConfig,
    database: str | None = None,
    on_round: Callable[[RoundResult], None] = lambda result: None,
    on_step: Callable[[str], None] = lambda step: None,
    should_stop: Callable[[], bool] = lambda: False,
    lines: Collection[str] = (),
    resume: Resume = "unfinished",
    kept: Path | None = None,
) -> SimulationResult:
    """Run a simulation; the same configuration gives the same bits.

    A run that was stopped or killed goes on from the last round it committed, to those same bits.

    Args:
        database: where to keep the run, for the dashboard; by default nowhere.
        on_step: told, in words, what is being prepared.
        lines: of baselines.LINES, what to compare the result with.
        resume: which run of the same configuration goes on: one that is "unfinished", "any", or there "must" be one.
        kept: a folder of what runs can share (see `findings.find`).

    Raises:
        SimulationError, BackendError, DataError, PartitionError, ConfigError, the coordinator's: what is wrong with the request.
    """
    parse_backend(config.backend)
    on_step("reading the data")
    dataset = read_dataset(config.data).with_test(seed=config.run.seed)
    if not dataset.test:
        raise SimulationError(f"{config.data} leaves no example to test on; give more data or a test split")
    dealt = partition(dataset.train, config.partition, config.devices, config.run.seed)
    fleet = load_fleet(config.fleet, config.devices, config.run.seed) if config.fleet else None
    parts, aside = hold_out(
        dict(zip(device_names(config.devices), dealt, strict=True)), config.hold_out, config.run.seed
    )
    with tempfile.TemporaryDirectory(prefix="pocketfed-") as scratch:
        on_step("building the artifact")
        max_length = config.run.local.max_length
        artifact = prepare_artifact(
            config.model, dataset, config.train, Path(scratch) / "artifact", config.run.seed, max_length
        )
        clock = VirtualClock()
        with (
            _open_store(database, Path(scratch)) as store,
            by_clock(clock) if fleet else contextlib.nullcontext(),
            contextlib.ExitStack() as opened,
        ):
            setting = _Setting(
                config,
                store,
                dataset,
                parts,
                aside,
                artifact,
                database is not None,
                resume,
                Path(scratch),
                fleet,
                clock,
                opened,
            )
            return _simulate(setting, on_round, on_step, should_stop, lines, kept)


@dataclass(frozen=True)
class _Setting:
    """What a run is made of. parts, aside: device -> places in dataset.train that it trains on, and that it holds out.

    opened: what is closed once the run has ended.
    """

    config: SimulationConfig
    store: Store
    dataset: Dataset
    parts: Mapping[str, Sequence[int]]
    aside: Mapping[str, Sequence[int]]
    artifact: Artifact
    is_kept: bool
    resume: Resume
    scratch: Path
    fleet: Fleet | None
    clock: VirtualClock
    opened: contextlib.ExitStack

    @cached_property
    def data(self) -> dict[str, Any]:
        sizes = {"train": len(self.dataset.train), "test": len(self.dataset.test), "labels": len(self.dataset.labels)}
        return {"name": self.dataset.name, "sha256": digest_of(self.dataset), **sizes}


def _simulate(
    setting: _Setting,
    on_round: Callable[[RoundResult], None],
    on_step: Callable[[str], None],
    should_stop: Callable[[], bool],
    lines: Collection[str],
    kept: Path | None,
) -> SimulationResult:
    from pocketfed.coordinator.artifacts import read_artifact
    from pocketfed.simulations import grids
    from pocketfed.simulations.prefix import open_prefix_cache

    config, store, dataset, artifact = setting.config, setting.store, setting.dataset, setting.artifact
    with store.read() as session:
        enrolled = real_device(session)
    if enrolled is not None:
        raise SimulationError(
            f"in {store.name} real devices have enrolled, {enrolled!r} for one, and what is simulated would be released to them; "
            "give another --database"
        )
    trainable_set = next(iter(artifact.manifest.sets))
    cache = open_prefix_cache(artifact, trainable_set, setting.scratch)
    if cache is not None:
        setting.opened.callback(cache.close)
    trainer = PlanTrainer(artifact, trainable_set, cache=cache)
    on_step("tokenizing")
    max_length = config.run.local.max_length
    train_examples = encode_examples(trainer, dataset.train, max_length)
    test_examples = encode_examples(trainer, dataset.test, max_length)
    built = read_artifact(artifact.folder)
    made_of = config.made_of() | {"data_sha256": setting.data["sha256"]}
    if setting.fleet is not None:  # its file may say something else by the time the run goes on
        made_of["fleet_sha256"] = digest_of_fleet(setting.fleet)

    def begin() -> int:
        with store.write() as session:
            publish_artifact(session, built, config.run.channel, trainable_set)
        return create_run(store, config.run, made_of)

    described = {"config": config.run.to_dict(), "simulation": made_of}
    with run_to_drive(store, described, built.version, setting.resume, begin) as (run_id, has_finished):
        rounds = results_of(store, run_id)
        if rounds:
            on_step(f"going on with run {run_id} after round {rounds[-1].number} of {config.run.rounds}")
        with store.write() as session:
            sizes = {n: len(part) for n, part in setting.parts.items()}
            drawn = setting.fleet.devices if setting.fleet is not None else ()
            tiers = {name: device.tier for name, device in zip(sizes, drawn, strict=False)}
            nodes = enrol_virtual(session, config.run.channel, sizes, tiers)
        material = grids.Material(trainer, train_examples, setting.parts, setting.scratch)
        grid = grids.make_grid(config.backend, store, run_id, nodes, material)
        setting.opened.callback(grid.close)
        grid.remembers = setting.is_kept
        virtual = None
        if setting.fleet is not None:
            lengths = [len(row) for row in train_examples.rows]
            tokens = {name: sum(lengths[i] for i in part) for name, part in setting.parts.items()}
            demand = Demand(tokens, {name: len(part) for name, part in setting.parts.items()})
            spool, clock = setting.scratch / "spool", setting.clock
            virtual = VirtualGrid(grid, spool, setting.fleet, trainer.size, demand, clock, config.run)

        def remember(result: RoundResult) -> None:
            result = virtual.told(result) if virtual else result
            rounds.append(result)
            on_round(result)

        on_step("training")
        began = time.perf_counter()
        if has_finished:
            theta = recall_end(store, run_id, virtual or grid)
        else:
            theta = drive_run(
                store,
                run_id,
                virtual or grid,
                config.run,
                lambda values: evaluate(trainer, values, test_examples),
                remember,
                virtual.assignments.forget if virtual else lambda assignment_ids: None,
                should_stop=should_stop,
            )
        if virtual:
            rounds = [virtual.told(result) for result in rounds]  # also those of before it was stopped
            virtual.finish()
    node_of = {name: node for node, name in nodes.items()}
    found = find(
        Material(
            trainer,
            (dataset.train, train_examples),
            (dataset.test, test_examples),
            setting.parts,
            setting.aside,
            config.partition,
        ),
        config.run,
        rounds,
        theta,
        trainer.initial_theta(),
        lambda name: grid.private_of(node_of[name]),
        cost_of(
            rounds,
            spent_in(store, run_id),
            config.devices,
            config.energy,
            virtual.training_s if virtual else None,
            setting.clock.s if virtual else None,
            time.perf_counter() - began if virtual else None,
        ),
        lines,
        kept,
        on_step,
    )
    if setting.is_kept and found.lines:
        keep_lines(store, run_id, found.lines)
    model = built.manifest["model"] | {
        "trainable_set": trainable_set,
        "trainable_parameters": trainer.size,
        "artifact": built.version,
    }
    return SimulationResult(
        rounds=tuple(rounds),
        theta=theta,
        model=model,
        seed=config.run.seed,
        test_examples=len(dataset.test),
        test_source=dataset.test_source,
        run_id=run_id,
        skipped=dataset.skipped,
        found=found,
        data=setting.data,
        virtual_s=round(setting.clock.s, 6) if virtual else None,
        device_s=round(virtual.device_s, 6) if virtual else None,
        dealt=(
            label_counts(dataset.train, list(setting.parts.values()), dataset.labels),
            dataset.labels,
            f"{dataset.name}, {config.partition}",
        ),
    )
