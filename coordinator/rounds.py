"""One round after another: sample, offer, screen, aggregate, measure, remember."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import sqlalchemy as sa

from pocketfed.coordinator import flwr_compat  # noqa: F401 - first: it silences flwr before flwr is imported

# isort: split
from flwr.app import Array, ArrayRecord, ConfigRecord
from flwr.serverapp.strategy import Strategy

from pocketfed.coordinator.assignments import OPEN
from pocketfed.coordinator.config import RunConfig
from pocketfed.coordinator.grid import Cohort, RecordedGrid, Stopped
from pocketfed.coordinator.sampling import sample_cohort
from pocketfed.coordinator.screening import Tally, screen, screen_measured, with_common_metrics
from pocketfed.coordinator.standing import recall, set_aside
from pocketfed.coordinator.store import (
    Artifact,
    Assignment,
    Metric,
    Release,
    Round,
    Run,
    Store,
    Update,
    get_blob,
    latest_release,
    now,
    put_blob,
)
from pocketfed.coordinator.strategy import THETA, make_strategy
from pocketfed.coordinator.validation import Limits
from pocketfed.model.parameters import Vector, decode_vector, encode_vector

Evaluate = Callable[[Vector], Mapping[str, float]]  # theta (P,) -> {"loss", "accuracy", ...}


class RunError(RuntimeError):
    """A run that cannot start or did not end well."""


@dataclass(frozen=True)
class RoundResult:
    """What one round ended with; `accuracy` and `loss` are None where nothing was measured."""

    number: int
    status: str
    accuracy: float | None
    loss: float | None
    train_loss: float | None
    devices: int
    failed: int
    bytes_up: int
    bytes_down: int
    seconds: float
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON files have it: the number is called `round`."""
        values = dataclasses.asdict(self)
        return {"round": values.pop("number"), **values}


@dataclass(frozen=True)
class Driven:
    """A run under way: everything that stays the same from round to round."""

    store: Store
    id: int
    grid: RecordedGrid
    strategy: Strategy
    limits: Limits
    config: RunConfig
    evaluate: Evaluate | None
    on_settled: Callable[[list[str]], None]


def create_run(store: Store, config: RunConfig) -> int:
    """A run of the channel's newest release, waiting to be driven. Returns its id.

    Raises:
        RunError: nothing is released on the channel, or the artifact lacks the trainable set.
    """
    with store.write() as session:
        release = latest_release(session, config.channel)
        if release is None:
            raise RunError(
                f"nothing is published on channel {config.channel!r} of {store.name}; run `pocketfed publish` first"
            )
        manifest = get_manifest(session, release.artifact_version)
        chosen = config.trainable_set or release.trainable_set
        if chosen not in manifest["trainable_sets"]:
            raise RunError(
                f"the artifact on {config.channel!r} has no trainable set {chosen!r}, "
                f"only {', '.join(manifest['trainable_sets'])}"
            )
        run = Run(
            name=config.name,
            channel=config.channel,
            config=config.to_dict(),
            artifact_version=release.artifact_version,
            trainable_set=chosen,
            seed=config.seed,
            rounds_planned=config.rounds,
        )
        session.add(run)
        session.flush()
        return run.id


def get_manifest(session: Any, version: str) -> dict[str, Any]:
    return dict(session.get_one(Artifact, version).manifest)


def starting_theta(store: Store, run_id: int) -> tuple[Vector, int]:
    """What the run starts from, and its size: the channel's release if of the same artifact and set, else its own."""
    with store.read() as session:
        run = session.get_one(Run, run_id)
        manifest = get_manifest(session, run.artifact_version)
        described = manifest["trainable_sets"][run.trainable_set]
        digest = manifest["files"][described["initial"]]["sha256"]
        release = latest_release(session, run.channel)
        if release is not None and (release.artifact_version, release.trainable_set) == (
            run.artifact_version,
            run.trainable_set,
        ):
            digest = release.parameters
        return decode_vector(THETA, get_blob(session, digest), described["size"]), described["size"]


def drive_run(
    store: Store,
    run_id: int,
    grid: RecordedGrid,
    config: RunConfig,
    evaluate: Evaluate | None = None,
    on_round: Callable[[RoundResult], None] = lambda result: None,
    on_settled: Callable[[list[str]], None] = lambda assignment_ids: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Vector:
    """Drive a run to its end. Returns the final theta (P,).

    Args:
        evaluate: measures theta after every round, and before the first.
        on_round: told of every round as it has been committed.
        on_settled: given the assignments whose updates are no longer needed.

    Raises:
        RunError: the run failed; the reason is in the store too.
        StrategyError: the strategy or its options do not exist.
    """
    grid.should_stop = should_stop
    _set_run(store, run_id, status="running", started_at=now())
    try:
        strategy = make_strategy(config.strategy, config.strategy_options)
        theta, size = starting_theta(store, run_id)
        limits = Limits.of(size, config)
        run = Driven(store, run_id, grid, strategy, limits, config, evaluate, on_settled)
        on_round(_measure_start(store, run_id, theta, evaluate))
        failed_in_a_row = 0
        for number in range(1, config.rounds + 1):
            grid.set_aside = set_aside(store, run_id, config.max_offences)
            devices = grid.wait_available(config.min_devices, config.wait_s, should_stop)
            if should_stop():
                raise RunError(f"stopped before round {number}")
            if len(devices) < config.min_devices:
                raise RunError(
                    f"{len(devices)} of at least {config.min_devices} devices came within {config.wait_s:g} s; "
                    "start more or lower min_devices"
                )
            cohort = sample_cohort(devices, config.cohort, config.seed, number)
            theta, outcome = _run_round(run, number, cohort, theta)
            on_round(outcome)
            failed_in_a_row = failed_in_a_row + 1 if outcome.status == "failed" else 0
            if failed_in_a_row >= config.max_failed_rounds:
                raise RunError(f"{failed_in_a_row} rounds failed in a row, the last because {outcome.reason}")
        _finish_run(store, run_id, config, theta)
        grid.announce_release()
    except BaseException as error:
        reason = str(error) if isinstance(error, RunError | Stopped) else f"{type(error).__name__}: {error}"
        on_settled(_give_up(store, run_id, reason[:500]))
        if isinstance(error, Stopped):
            raise RunError(reason) from None
        raise
    return theta


def _set_run(store: Store, run_id: int, **values: Any) -> None:
    with store.write() as session:
        run = session.get_one(Run, run_id)
        for name, value in values.items():
            setattr(run, name, value)


def _give_up(store: Store, run_id: int, reason: str) -> list[str]:
    """The run has failed, and with it its open round and what devices still work on. Returns all of its assignments."""
    with store.write() as session:
        run = session.get_one(Run, run_id)
        run.status, run.reason, run.finished_at = "failed", reason, now()
        session.execute(
            sa.update(Round)
            .where(Round.run_id == run_id, Round.status == "running")
            .values(status="failed", reason=reason, finished_at=now())
        )
        session.execute(
            sa.update(Assignment)
            .where(Assignment.run_id == run_id, Assignment.status.in_(OPEN))
            .values(status="expired", error="the run has ended", finished_at=now())
        )
        return list(session.scalars(sa.select(Assignment.id).where(Assignment.run_id == run_id)))


def _assignments_of(store: Store, run_id: int, number: int) -> list[str]:
    """All of a round's assignments, those that expired included."""
    with store.read() as session:
        mine = sa.select(Assignment.id).where(Assignment.run_id == run_id, Assignment.round == number)
        return list(session.scalars(mine))


def _measure_start(store: Store, run_id: int, theta: Vector, evaluate: Evaluate | None) -> RoundResult:
    started, begin = time.perf_counter(), now()
    measured = dict(evaluate(theta)) if evaluate else {}
    seconds = time.perf_counter() - started
    with store.write() as session:
        session.add(
            Round(
                run_id=run_id,
                number=0,
                status="finished",
                parameters=put_blob(session, encode_vector(THETA, theta)),
                accuracy=measured.get("accuracy"),
                loss=measured.get("loss"),
                seconds=seconds,
                started_at=begin,
                finished_at=now(),
            )
        )
    return RoundResult(0, "finished", measured.get("accuracy"), measured.get("loss"), None, 0, 0, 0, 0, seconds)


def _run_round(run: Driven, number: int, cohort: Mapping[int, str], theta: Vector) -> tuple[Vector, RoundResult]:
    """One round from theta on; the parameters it ended with, theta itself if it failed."""
    started = time.perf_counter()
    with run.store.write() as session:
        session.add(Round(run_id=run.id, number=number))
    run.grid.enter(Cohort(number, 1, cohort, run.config.deadline_s))
    result, reason, tally, trained = _train_round(run, number, theta)
    measured = _measure(run, result, reason, number)
    seconds = time.perf_counter() - started
    outcome = _commit_round(run.store, run.id, number, result, reason, tally, trained, measured, seconds)
    run.on_settled(_assignments_of(run.store, run.id, number))
    return result, outcome


def _train_round(run: Driven, number: int, theta: Vector) -> tuple[Vector, str | None, Tally, dict[str, float]]:
    """What the cohort made of theta, why it is not usable (then theta comes back), the tally and the devices' metrics."""
    arrays = ArrayRecord({THETA: Array(theta)})
    messages = run.strategy.configure_train(number, arrays, local_config(run.config), run.grid)
    tally = Tally()
    sent = run.grid.send_and_receive(messages, timeout=run.config.deadline_s)
    replies = screen(sent, theta, run.limits, tally, recall(run.store, run.id, number))
    # Flower's strategies look at the replies more than once; ours folds them in as they come.
    given = replies if _streams(run.strategy) else with_common_metrics(replies)
    aggregated, metrics = run.strategy.aggregate_train(number, given)
    for _ in replies:  # whatever the strategy did not ask for is screened and recorded all the same
        pass
    trained = {k: float(v) for k, v in (metrics or {}).items() if isinstance(v, (int, float))}
    trained |= {k: float(v) for k, v in (("clipped", tally.clipped), ("capped", tally.capped)) if v}
    if aggregated is None or tally.accepted < run.config.quorum:
        return theta, f"{tally.accepted} of at least {run.config.quorum} updates were usable", tally, trained
    result = np.ascontiguousarray(aggregated[THETA].numpy(), np.float32)
    if not np.isfinite(result).all():
        reason = f"{run.config.strategy} made parameters that are not finite; choose other strategy_options"
        return theta, reason, tally, trained
    return result, None, tally, trained


def _streams(strategy: Strategy) -> bool:
    return type(strategy).__module__.startswith("pocketfed.")


def local_config(config: RunConfig) -> ConfigRecord:
    """The message's config: TrainConfig's fields, and the run's seed (devices mix in their name and the round)."""
    return ConfigRecord({**dataclasses.asdict(config.local), "seed": config.seed})


def _measure(run: Driven, theta: Vector, reason: str | None, number: int) -> dict[str, float]:
    """On the coordinator's test set; on the devices' own examples where that is asked for, as device_<name>."""
    measured = dict(run.evaluate(theta)) if run.evaluate else {}
    if run.config.evaluate_on_devices and reason is None:
        arrays = ArrayRecord({THETA: Array(theta)})
        messages = run.strategy.configure_evaluate(number, arrays, local_config(run.config), run.grid)
        replies = run.grid.send_and_receive(messages, timeout=run.config.deadline_s)
        usable = with_common_metrics(screen_measured(replies, run.config.max_examples))
        metrics = run.strategy.aggregate_evaluate(number, usable) or {}
        numbers = {k: float(v) for k, v in metrics.items() if isinstance(v, (int, float)) and k != "num-examples"}
        measured |= {f"device_{k}": v for k, v in numbers.items()}
        if not run.evaluate:
            measured |= {k: v for k, v in numbers.items() if k in ("accuracy", "loss")}
    return measured


def _commit_round(
    store: Store,
    run_id: int,
    number: int,
    theta: Vector,
    reason: str | None,
    tally: Tally,
    trained: Mapping[str, float],
    measured: Mapping[str, float],
    seconds: float,
) -> RoundResult:
    """The new parameters, what became of every assignment and all numbers, in one transaction."""
    with store.write() as session:
        row = session.get_one(Round, (run_id, number))
        bytes_up = bytes_down = accepted = failed = 0
        mine = sa.select(Assignment).where(Assignment.run_id == run_id, Assignment.round == number)
        for assignment in session.scalars(mine):
            bytes_down += assignment.bytes_down
            update = session.get(Update, assignment.id)
            bytes_up += update.bytes if update else 0
            if assignment.kind == "evaluate":
                assignment.status = "aggregated" if assignment.status == "uploaded" else assignment.status
                continue
            status, why, norm = tally.statuses.get(assignment.id, (assignment.status, assignment.error, None))
            assignment.status, assignment.error = status, why
            assignment.finished_at = assignment.finished_at or now()
            if update:
                update.reason, update.norm = why, norm
            accepted, failed = accepted + (status == "aggregated"), failed + (status != "aggregated")
        row.status, row.reason = ("failed", reason) if reason else ("finished", None)
        row.parameters = put_blob(session, encode_vector(THETA, theta))
        row.accuracy, row.loss = _finite(measured.get("accuracy")), _finite(measured.get("loss"))
        row.train_loss = _finite(trained.get("loss"))
        row.devices, row.failed, row.bytes_up, row.bytes_down = accepted, failed, bytes_up, bytes_down
        row.seconds, row.finished_at = seconds, now()
        named = {
            k[:100]: v
            for k, v in {**{f"train_{k}": v for k, v in trained.items()}, **measured}.items()
            if np.isfinite(v)
        }
        session.add_all(Metric(run_id=run_id, round=number, name=k, value=v) for k, v in named.items())
        return RoundResult(
            number,
            row.status,
            row.accuracy,
            row.loss,
            row.train_loss,
            accepted,
            failed,
            bytes_up,
            bytes_down,
            seconds,
            reason,
        )


def _finite(value: float | None) -> float | None:
    """None for what is no number: a device's loss of 1e308 makes an infinite mean."""
    return value if value is not None and np.isfinite(value) else None


def _finish_run(store: Store, run_id: int, config: RunConfig, theta: Vector) -> None:
    with store.write() as session:
        run = session.get_one(Run, run_id)
        run.status, run.finished_at = "finished", now()
        if config.release:
            session.add(
                Release(
                    channel=run.channel,
                    artifact_version=run.artifact_version,
                    trainable_set=run.trainable_set,
                    run_id=run_id,
                    parameters=put_blob(session, encode_vector(THETA, theta)),
                )
            )
