"""How `serve` drives a run: created or gone on with, told of, patient with the database and the disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pocketfed.cli.output import CommandError, print_round, print_round_header, write_json

if TYPE_CHECKING:
    from logging import Logger

    from pocketfed.coordinator.config import RunConfig
    from pocketfed.coordinator.grid import FleetGrid
    from pocketfed.coordinator.server import CoordinatorServer
    from pocketfed.coordinator.store import Store
    from pocketfed.model.tasks import Example

T = TypeVar("T")


def _say() -> Logger:
    """What `serve` tells whoever started it."""
    import logging

    return logging.getLogger("pocketfed.serve")


def unfinished(store: Store, resume: bool) -> list[tuple[int, RunConfig]]:
    """Runs that a coordinator has left, with their configurations; given up instead if they are not to go on."""
    from pocketfed.coordinator.config import RunConfig
    from pocketfed.coordinator.progress import give_up, unfinished_runs
    from pocketfed.coordinator.store import Run

    left = []
    for run_id in unfinished_runs(store):
        if resume:
            with store.read() as session:
                left.append((run_id, RunConfig.from_dict(session.get_one(Run, run_id).config)))
        else:
            give_up(store, run_id, "given up by the operator")
            with store.read() as session:
                name = session.get_one(Run, run_id).name
            note(store, "run.stop", name, f"run {run_id} given up")
            _say().info("run %d: given up", run_id, extra={"run": run_id})
    return left


def check_run(config: RunConfig) -> Sequence[Example]:
    """The run's test examples; a strategy or test data that cannot be used is told before anything is written."""
    from pocketfed.coordinator.strategy import make_strategy
    from pocketfed.model.tasks import read_dataset

    make_strategy(config.strategy, config.strategy_options)
    if not config.test_data:
        return ()
    dataset = read_dataset(config.test_data, labelled=False)
    return dataset.test or dataset.train


def grid_of(store: Store, server: CoordinatorServer, run_id: int, config: RunConfig) -> FleetGrid:
    from pocketfed.coordinator.grid import FleetGrid
    from pocketfed.coordinator.progress import starting_theta
    from pocketfed.coordinator.strategy import asks_more

    _, size = starting_theta(store, run_id)
    offer_s = min(config.lease_s, config.offer_s)
    forms = not config.update.plain or asks_more(config.strategy)
    return FleetGrid(server.assignments, run_id, lambda: server.online(config.channel, forms), size, offer_s)


def drive(
    store: Store,
    server: CoordinatorServer,
    run_id: int | None,
    config: RunConfig,
    test: Sequence[Example],
    json: Path | None,
    should_stop: Callable[[], bool],
    log_format: str = "text",
) -> None:
    """Drive a run, or a new one, to its end. Where the database or the disk fails, the run waits for them."""
    import contextlib
    import tempfile
    from hashlib import sha256

    from pocketfed.coordinator.operators import local_admin, noting
    from pocketfed.coordinator.progress import create_run, results_of
    from pocketfed.coordinator.rounds import drive_run
    from pocketfed.coordinator.store import OUTAGES, Run, StoreError

    known = run_id is not None
    told = f"on {config.channel}" + (", where it was left" if known else "")
    with noting(store, local_admin(), "run.start", config.name, told):
        run_id = create_run(store, config) if run_id is None else run_id
    grid = grid_of(store, server, run_id, config)
    _say().info("run %d: waiting for %d devices", run_id, config.min_devices, extra={"run": run_id})
    _say().info("run %d collects: %s", run_id, config.update, extra={"run": run_id})
    tell_round = _teller(run_id, log_format)
    with tempfile.TemporaryDirectory(prefix="pocketfed-") as scratch:
        evaluate = _test_set(store, run_id, config, test, Path(scratch)) if test else None
        forget = server.assignments.forget
        try:
            theta = _patiently(
                lambda: drive_run(store, run_id, grid, config, evaluate, tell_round, forget, should_stop), should_stop
            )
        finally:
            if should_stop():
                with contextlib.suppress(StoreError, *OUTAGES):
                    note(store, "run.stop", config.name)
    if json is not None:
        write_json(
            json,
            {
                "run": run_id,
                "rounds": [result.to_dict() for result in results_of(store, run_id)],
                "seed": config.seed,
                "parameters_sha256": sha256(theta.tobytes()).hexdigest(),
            },
        )
    with store.read() as session:
        kept_back = session.get_one(Run, run_id).reason
    to = f"{config.rollout:g} % of {config.channel!r}" if config.rollout < 100 else repr(config.channel)
    released = f"; released on {to}" if config.release else ""
    _say().info("run %d finished%s", run_id, f"; {kept_back}" if kept_back else released, extra={"run": run_id})


def _teller(run_id: int, log_format: str) -> Callable[[Any], None]:
    """Tells of each round: a row of a table, or a line of the log."""
    if log_format == "text":
        print_round_header()
        return print_round
    told = ("status", "devices", "failed", "accuracy", "loss", "seconds")

    def tell(result: Any) -> None:
        fields = {name: getattr(result, name) for name in told} | {"run": run_id, "round": result.number}
        _say().info("round %d %s%s", result.number, result.status, _because(result.reason), extra=fields)

    return tell


def _because(reason: str | None) -> str:
    return f": {reason}" if reason else ""


def _patiently(drive: Callable[[], T], should_stop: Callable[[], bool]) -> T:
    """Again, after ever longer pauses, while the database cannot be reached or the disk is full."""
    import time

    from pocketfed.coordinator.store import is_outage

    pause = 1.0
    while True:
        try:
            return drive()
        except Exception as error:
            if not is_outage(error) or should_stop():
                raise
            why = " ".join(str(getattr(error, "orig", None) or error).split())
            _say().warning("cannot go on: %s; trying again in %.0f s", why, pause)
        end = time.monotonic() + pause
        while time.monotonic() < end and not should_stop():
            time.sleep(0.1)
        pause = min(60.0, pause * 2)


def _test_set(
    store: Store, run_id: int, config: RunConfig, test: Sequence[Example], scratch: Path
) -> Callable[[Any], Mapping[str, float]]:
    """Measures theta on the run's test_data, with the very plans that devices use."""
    from pocketfed.client_sdk.artifacts import open_artifact
    from pocketfed.client_sdk.plan_trainer import PlanTrainer
    from pocketfed.client_sdk.trainer import evaluate
    from pocketfed.coordinator.artifacts import export_artifact
    from pocketfed.coordinator.store import Run
    from pocketfed.simulations.run import encode_examples

    with store.read() as session:
        run = session.get_one(Run, run_id)
        export_artifact(session, run.artifact_version, scratch / "artifact")
        trainer = PlanTrainer(open_artifact(scratch / "artifact", run.artifact_version), run.trainable_set)
    examples = encode_examples(trainer, test, config.local.max_length)
    if not len(examples):
        known = ", ".join(trainer.artifact.manifest.labels[:10])
        raise CommandError(f"no example of test_data {config.test_data} has a label of the artifact ({known})")
    return lambda theta: evaluate(trainer, theta, examples)


def note(store: Store, act: str, target: str, detail: str = "") -> None:
    """A line in the audit: whoever may run this command has done that."""
    from pocketfed.coordinator.operators import local_admin, record

    with store.write() as session:
        record(session, local_admin().name, act, target, "done", detail)
