"""A federated run on one machine: data, student, artifact, partition, and rounds over virtual devices."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocketfed.client_sdk.artifacts import Artifact
from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.client_sdk.trainer import Examples, evaluate
from pocketfed.coordinator.answers import enrol_virtual, real_device
from pocketfed.coordinator.artifacts import publish_artifact
from pocketfed.coordinator.progress import RoundResult, create_run, results_of
from pocketfed.coordinator.rounds import drive_run, recall_end
from pocketfed.coordinator.spending import spent_in, uncounted_in
from pocketfed.coordinator.store import Store, by_clock
from pocketfed.model.parameters import Vector
from pocketfed.model.tasks import Dataset, read_dataset
from pocketfed.simulations.backends import parse_backend
from pocketfed.simulations.costs import EnergyModel, cost_of
from pocketfed.simulations.device_states import DeviceStates, states_beside
from pocketfed.simulations.findings import Findings, Material, find, keep_lines
from pocketfed.simulations.fleet import Fleet
from pocketfed.simulations.fleet_files import load_fleet
from pocketfed.simulations.partition import label_counts, partition
from pocketfed.simulations.prefix import PrefixCaches
from pocketfed.simulations.preparing import device_names, encode_examples, prepare_artifact
from pocketfed.simulations.resuming import (
    Resume,
    SimulationError,
    Stopwatch,
    digest_of,
    digest_of_fleet,
    run_to_drive,
)
from pocketfed.simulations.served import hold_out
from pocketfed.simulations.simulation import SimulationConfig, SimulationResult
from pocketfed.simulations.virtual import Demand, VirtualClock, VirtualGrid

if TYPE_CHECKING:
    from pocketfed.coordinator.artifacts import BuiltArtifact
    from pocketfed.simulations.grids import InProcessGrid

__all__ = ["SimulationConfig", "SimulationResult", "device_names", "encode_examples", "prepare_artifact", "simulate"]


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
    caches: PrefixCaches | None = None,
) -> SimulationResult:
    """Run a simulation; the same configuration gives the same bits.

    A run that was stopped or killed goes on from the last round it committed, to those same bits.

    Args:
        database: where to keep the run, for the dashboard; by default nowhere.
        on_step: told, in words, what is being prepared.
        lines: of baselines.LINES, what to compare the result with.
        resume: which run of the same configuration goes on: one that is "unfinished", "any", or there "must" be one.
        kept: a folder of what runs can share (see `findings.find`).
        caches: what frozen parts made of texts, where several simulations of a process share it.

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
    if fleet is not None and config.energy != EnergyModel():
        raise SimulationError(
            f"the energy of the fleet {fleet.name!r} is that of its own watts; set them in its file, or leave out energy"
        )
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
                caches or opened.enter_context(contextlib.closing(PrefixCaches(Path(scratch)))),
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
    caches: PrefixCaches

    @cached_property
    def data(self) -> dict[str, Any]:
        sizes = {"train": len(self.dataset.train), "test": len(self.dataset.test), "labels": len(self.dataset.labels)}
        return {"name": self.dataset.name, "sha256": digest_of(self.dataset), **sizes}


@dataclass(frozen=True)
class _Prepared:
    """What comes of a setting: examples as the trainer takes them, the artifact as it is published, all that makes the run."""

    trainer: PlanTrainer
    trainable_set: str
    train: Examples
    test: Examples
    built: BuiltArtifact
    made_of: Mapping[str, Any]


@dataclass(frozen=True)
class _Driven:
    """A run that has ended. wall_s: of this machine, where the rounds' own seconds are a fleet's."""

    run_id: int
    rounds: Sequence[RoundResult]
    theta: Vector
    grid: InProcessGrid
    virtual: VirtualGrid | None
    wall_s: float | None


def _simulate(
    setting: _Setting,
    on_round: Callable[[RoundResult], None],
    on_step: Callable[[str], None],
    should_stop: Callable[[], bool],
    lines: Collection[str],
    kept: Path | None,
) -> SimulationResult:
    config, dataset = setting.config, setting.dataset
    prepared = _prepare(setting, on_step)
    driven = _drive(setting, prepared, on_round, on_step, should_stop)
    found = _judge(setting, prepared, driven, lines, kept, on_step)
    if setting.is_kept and found.lines:
        keep_lines(setting.store, driven.run_id, found.lines)
    trainer, built, virtual = prepared.trainer, prepared.built, driven.virtual
    made = {"trainable_set": prepared.trainable_set, "trainable_parameters": trainer.size, "artifact": built.version}
    title = f"{dataset.name}, {config.partition}"
    return SimulationResult(
        rounds=tuple(driven.rounds),
        theta=driven.theta,
        model=built.manifest["model"] | made,
        seed=config.run.seed,
        test_examples=len(dataset.test),
        test_source=dataset.test_source,
        run_id=driven.run_id,
        skipped=dataset.skipped,
        found=found,
        data=setting.data,
        virtual_s=round(setting.clock.s, 6) if virtual else None,
        device_s=round(virtual.worked.device_s, 6) if virtual else None,
        dealt=(label_counts(dataset.train, list(setting.parts.values()), dataset.labels), dataset.labels, title),
    )


def _prepare(setting: _Setting, on_step: Callable[[str], None]) -> _Prepared:
    """
    Raises:
        SimulationError: real devices would get what is simulated.
    """
    from pocketfed.coordinator.artifacts import read_artifact

    config, store, dataset, artifact = setting.config, setting.store, setting.dataset, setting.artifact
    with store.read() as session:
        enrolled = real_device(session)
    if enrolled is not None:
        raise SimulationError(
            f"in {store.name} real devices have enrolled, {enrolled!r} for one, and what is simulated would be released to them; "
            "give another --database"
        )
    trainable_set = next(iter(artifact.manifest.sets))
    trainer = PlanTrainer(artifact, trainable_set, cache=setting.caches.cache_for(artifact, trainable_set))
    on_step("tokenizing")
    train, test = (
        encode_examples(trainer, part, config.run.local.max_length) for part in (dataset.train, dataset.test)
    )
    made_of = config.made_of() | {"data_sha256": setting.data["sha256"]}
    if setting.fleet is not None:  # its file may say something else by the time the run goes on
        made_of["fleet_sha256"] = digest_of_fleet(setting.fleet)
    return _Prepared(trainer, trainable_set, train, test, read_artifact(artifact.folder), made_of)


def _drive(
    setting: _Setting,
    prepared: _Prepared,
    on_round: Callable[[RoundResult], None],
    on_step: Callable[[str], None],
    should_stop: Callable[[], bool],
) -> _Driven:
    """From where the run was left, or from its beginning, to its end."""
    config, store, trainer = setting.config, setting.store, prepared.trainer

    def begin() -> int:
        with store.write() as session:
            publish_artifact(session, prepared.built, config.run.channel, prepared.trainable_set)
        return create_run(store, config.run, prepared.made_of)

    described = {"config": config.run.to_dict(), "simulation": prepared.made_of}
    with run_to_drive(store, described, prepared.built.version, setting.resume, begin) as (run_id, has_finished):
        rounds = results_of(store, run_id)
        if rounds:
            on_step(f"going on with run {run_id} after round {rounds[-1].number} of {config.run.rounds}")
        grid, virtual = _open_grid(setting, run_id, trainer, prepared.train)

        def remember(result: RoundResult) -> None:
            result = virtual.told(result) if virtual else result
            rounds.append(result)
            on_round(result)

        on_step("training")
        grid.stopwatch = Stopwatch() if virtual else None
        if has_finished:
            theta = recall_end(store, run_id, virtual or grid)
        else:
            theta = drive_run(
                store,
                run_id,
                virtual or grid,
                config.run,
                lambda values: evaluate(trainer, values, prepared.test),
                remember,
                virtual.assignments.forget if virtual else lambda assignment_ids: None,
                should_stop=should_stop,
            )
        if grid.states is not None:
            grid.states.committed()
        if virtual:
            rounds = [virtual.told(result) for result in rounds]  # also those of before it was stopped
            virtual.finish()
    return _Driven(run_id, rounds, theta, grid, virtual, grid.stopwatch.seconds if grid.stopwatch else None)


def _judge(
    setting: _Setting,
    prepared: _Prepared,
    driven: _Driven,
    lines: Collection[str],
    kept: Path | None,
    on_step: Callable[[str], None],
) -> Findings:
    """What the run has cost, how well its devices are served, and what it is compared with."""
    config, dataset, virtual = setting.config, setting.dataset, driven.virtual
    costs = cost_of(
        driven.rounds,
        spent_in(setting.store, driven.run_id),
        config.devices,
        config.energy,
        uncounted_in(setting.store, driven.run_id),
        virtual.worked if virtual else None,
        driven.wall_s,
    )
    node_of = {name: node for node, name in driven.grid.devices.items()}
    material = Material(
        prepared.trainer,
        (dataset.train, prepared.train),
        (dataset.test, prepared.test),
        setting.parts,
        setting.aside,
        config.partition,
    )
    return find(
        material,
        config.run,
        driven.rounds,
        driven.theta,
        prepared.trainer.initial_theta(),
        lambda name: driven.grid.private_of(node_of[name]),
        costs,
        lines,
        kept,
        on_step,
    )


def _open_grid(
    setting: _Setting, run_id: int, trainer: PlanTrainer, examples: Examples
) -> tuple[InProcessGrid, VirtualGrid | None]:
    """Where devices work, and with a fleet what decides when; what they keep is brought back by whoever drives the run."""
    from pocketfed.simulations import grids

    config, store = setting.config, setting.store
    sizes = {name: len(part) for name, part in setting.parts.items()}
    drawn = setting.fleet.devices if setting.fleet is not None else ()
    tiers = {name: device.tier for name, device in zip(sizes, drawn, strict=False)}
    with store.write() as session:
        nodes = enrol_virtual(session, config.run.channel, sizes, tiers)
    material = grids.DeviceMaterial(trainer, examples, setting.parts, setting.scratch)
    grid = grids.make_grid(config.backend, store, run_id, nodes, material)
    setting.opened.callback(grid.close)
    grid.remembers = setting.is_kept
    if setting.is_kept and store.file is not None:
        grid.states = DeviceStates(states_beside(store.file), run_id)
    if setting.fleet is None:
        return grid, None
    lengths = [len(row) for row in examples.rows]
    demand = Demand({name: sum(lengths[i] for i in part) for name, part in setting.parts.items()}, sizes)
    spool = setting.scratch / "spool"
    return grid, VirtualGrid(grid, spool, setting.fleet, trainer.size, demand, setting.clock, config.run)
