"""A federated run on one machine: data, student, artifact, partition, and rounds over virtual devices."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from pocketfed.client_sdk.artifacts import Artifact, open_artifact
from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.client_sdk.trainer import Examples, evaluate
from pocketfed.coordinator.answers import enrol_virtual
from pocketfed.coordinator.artifacts import build_artifact, publish_artifact
from pocketfed.coordinator.config import RunConfig
from pocketfed.coordinator.progress import RoundResult, create_run, give_up
from pocketfed.coordinator.rounds import drive_run
from pocketfed.coordinator.store import Store
from pocketfed.model.parameters import Vector
from pocketfed.model.tasks import Dataset, Example, read_dataset
from pocketfed.simulations.backends import parse_backend
from pocketfed.simulations.partition import partition


class SimulationError(ValueError):
    """A simulation that cannot be set up."""


@dataclass(frozen=True)
class SimulationConfig:
    """What to simulate.

    Args:
        model: a preset (a student that starts untrained) or a model folder.
        train: the trainable set; empty: `full` for a preset, `lora:8` for a model folder.
        partition: iid, dirichlet:ALPHA or by:COLUMN.
        run: rounds, cohort, strategy, local training and seed.
        backend: where devices train, one of `backends.BACKENDS`.
    """

    data: Path
    model: str = "micro"
    devices: int = 10
    partition: str = "iid"
    train: str = ""
    run: RunConfig = field(default_factory=RunConfig)
    backend: str = "in-process"


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
) -> SimulationResult:
    """Run a simulation; the same configuration gives the same bits.

    Args:
        database: where to keep the run, for the dashboard; by default nowhere.
        on_step: told, in words, what is being prepared.

    Raises:
        SimulationError, BackendError, DataError, PartitionError, ConfigError, the coordinator's: what is wrong with the request.
    """
    parse_backend(config.backend)
    on_step("reading the data")
    dataset = read_dataset(config.data).with_test(seed=config.run.seed)
    if not dataset.test:
        raise SimulationError(f"{config.data} leaves no example to test on; give more data or a test split")
    parts = partition(dataset.train, config.partition, config.devices, config.run.seed)
    with tempfile.TemporaryDirectory(prefix="pocketfed-") as scratch:
        on_step("building the artifact")
        max_length = config.run.local.max_length
        artifact = prepare_artifact(
            config.model, dataset, config.train, Path(scratch) / "artifact", config.run.seed, max_length
        )
        with _open_store(database, Path(scratch)) as store:
            return _simulate(config, store, dataset, parts, artifact, Path(scratch), on_round, on_step, should_stop)


def _simulate(
    config: SimulationConfig,
    store: Store,
    dataset: Dataset,
    parts: Sequence[Sequence[int]],
    artifact: Artifact,
    scratch: Path,
    on_round: Callable[[RoundResult], None],
    on_step: Callable[[str], None],
    should_stop: Callable[[], bool],
) -> SimulationResult:
    from pocketfed.coordinator.artifacts import read_artifact
    from pocketfed.simulations.grids import Material, make_grid
    from pocketfed.simulations.prefix import open_prefix_cache

    trainable_set = next(iter(artifact.manifest.sets))
    cache = open_prefix_cache(artifact, trainable_set, scratch)
    trainer = PlanTrainer(artifact, trainable_set, cache=cache)
    on_step("tokenizing")
    max_length = config.run.local.max_length
    train_examples = encode_examples(trainer, dataset.train, max_length)
    test_examples = encode_examples(trainer, dataset.test, max_length)
    names = device_names(config.devices)
    held = dict(zip(names, parts, strict=True))

    built = read_artifact(artifact.folder)
    with store.write() as session:
        publish_artifact(session, built, config.run.channel, trainable_set)
        nodes = enrol_virtual(session, config.run.channel, {name: len(held[name]) for name in names})
    run_id = create_run(store, config.run)
    try:
        grid = make_grid(config.backend, store, run_id, nodes, Material(trainer, train_examples, held, scratch))
    except Exception as error:
        give_up(store, run_id, str(error))
        raise
    rounds: list[RoundResult] = []

    def remember(result: RoundResult) -> None:
        rounds.append(result)
        on_round(result)

    on_step("training")
    try:
        theta = drive_run(
            store,
            run_id,
            grid,
            config.run,
            lambda values: evaluate(trainer, values, test_examples),
            remember,
            should_stop=should_stop,
        )
    except BaseException as error:
        give_up(store, run_id, str(error) or type(error).__name__)  # nobody comes back to a simulation
        raise
    finally:
        grid.close()
        if cache is not None:
            cache.close()
    model = built.manifest["model"] | {
        "trainable_set": trainable_set,
        "trainable_parameters": trainer.size,
        "artifact": built.version,
    }
    return SimulationResult(
        tuple(rounds), theta, model, config.run.seed, len(dataset.test), dataset.test_source, run_id, dataset.skipped
    )
