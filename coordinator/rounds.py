"""One round after another: sample, offer, screen, aggregate, measure, remember."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pocketfed.coordinator import flwr_compat  # noqa: F401 - first: it silences flwr before flwr is imported

# isort: split
from flwr.app import ConfigRecord
from flwr.serverapp.strategy import Strategy

from pocketfed.coordinator.config import RunConfig
from pocketfed.coordinator.grid import Cohort, RecordedGrid, Stopped
from pocketfed.coordinator.leadership import Deposed
from pocketfed.coordinator.progress import (
    Attempt,
    Interrupted,
    Place,
    RoundResult,
    RunError,
    begin_attempt,
    begin_run,
    commit_attempt,
    commit_start,
    create_run,
    find_place,
    finish_run,
    give_up,
    interrupt_run,
    run_layout,
    settled_in,
    starting_theta,
)
from pocketfed.coordinator.retention import forget_rounds
from pocketfed.coordinator.sampling import sample_cohort
from pocketfed.coordinator.screening import Tally, screen, screen_measured, with_common_metrics
from pocketfed.coordinator.standing import last_step, recall, set_aside
from pocketfed.coordinator.store import OUTAGES, Store, StoreError, is_outage, now
from pocketfed.coordinator.strategy import THETA, make_strategy
from pocketfed.coordinator.strategy_base import Ours, arrays_of
from pocketfed.coordinator.strategy_state import capture, decode_state, encode_state, restore
from pocketfed.coordinator.validation import Limits
from pocketfed.model.parameters import Vector

__all__ = ["RoundResult", "RunError", "create_run", "drive_run", "local_config", "starting_theta"]

Evaluate = Callable[[Vector], Mapping[str, float]]  # theta (P,) -> {"loss", "accuracy", ...}


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
    """Drive a run to its end from wherever it stands. Returns the final theta (P,).

    Every step is in the store before the next begins, so whoever calls this after a crash ends with the same bits.

    Args:
        evaluate: measures theta after every round, and before the first.
        on_round: told of every round as it has been committed.
        on_settled: given the assignments whose updates are no longer needed.

    Raises:
        RunError: the run failed; the reason is in the store too.
        Interrupted, Deposed, the database's and the disk's: it is left for later, by this or another coordinator.
        StrategyError: the strategy or its options do not exist, or do not suit the run.
    """
    grid.should_stop = should_stop
    try:
        return _drive(store, run_id, grid, config, evaluate, on_round, on_settled)
    except BaseException as error:
        reason = str(error) if isinstance(error, RunError | Stopped) else f"{type(error).__name__}: {error}"
        if isinstance(error, Stopped | Deposed | KeyboardInterrupt | SystemExit) or is_outage(error):
            with contextlib.suppress(StoreError, *OUTAGES):
                interrupt_run(store, run_id, reason)
        else:
            on_settled(give_up(store, run_id, reason))
        if isinstance(error, Stopped):
            raise Interrupted(reason) from None
        raise


def recall_end(store: Store, run_id: int, grid: RecordedGrid) -> Vector:
    """The final theta (P,) of a run that has finished; the grid knows what its devices held then."""
    place = find_place(store, run_id)
    grid.recall(decode_state(place.state).get("grid", {}) if place.state is not None else {})
    return place.theta


def _drive(
    store: Store,
    run_id: int,
    grid: RecordedGrid,
    config: RunConfig,
    evaluate: Evaluate | None,
    on_round: Callable[[RoundResult], None],
    on_settled: Callable[[list[str]], None],
) -> Vector:
    begin_run(store, run_id)
    strategy = make_strategy(config.strategy, config.strategy_options)
    if isinstance(strategy, Ours):
        strategy.prepare(config, run_layout(store, run_id))
    place = find_place(store, run_id)
    held = decode_state(place.state) if place.state is not None else {}
    grid.recall(held.get("grid", {}))
    grid.reopen(config.deadline_s)
    if place.number == 0:
        on_round(_measure_start(store, run_id, place.theta, evaluate))
    place = find_place(store, run_id)
    if held.get("strategy"):
        restore(strategy, held["strategy"])
    limits = Limits.of(place.theta.size, config)
    run = Driven(store, run_id, grid, strategy, limits, config, evaluate, on_settled)
    reason = "before this coordinator came"
    while True:
        if place.failed_in_a_row >= config.max_failed_rounds:
            raise RunError(f"{place.failed_in_a_row} rounds failed in a row, the last because {reason}")
        if place.number > config.rounds:
            break
        place, outcome = _run_attempt(run, place)
        if outcome is not None:
            on_round(outcome)
            reason = outcome.reason or reason
    finish_run(store, run_id, config, place.theta)
    grid.announce_release()
    return place.theta


def _measure_start(store: Store, run_id: int, theta: Vector, evaluate: Evaluate | None) -> RoundResult:
    started = now()
    measured = dict(evaluate(theta)) if evaluate else {}
    return commit_start(store, run_id, theta, measured, (now() - started).total_seconds())


def _run_attempt(run: Driven, place: Place) -> tuple[Place, RoundResult | None]:
    """One attempt at a round: where the run stands then, and the round's result if it has ended."""
    number, config = place.number, run.config
    cohort = place.cohort or _sample(run, number, place.attempt)
    started, before = now(), capture(run.strategy)
    enough, exponent = (config.cohort if config.over_selection else 0), None
    if config.mode == "fedbuff":
        enough, exponent = config.buffer, config.staleness_exponent
    run.grid.enter(Cohort(number, place.attempt, cohort, config.deadline_s, enough, exponent))
    theta, reason, tally, trained = _train_round(run, number, place.theta)
    measured = _measure(run, theta, reason, number)
    measured["step_norm"] = float(np.linalg.norm(theta.astype(np.float64) - place.theta))  # how far the round went
    if reason is not None:
        restore(run.strategy, before)  # as the parameters, it goes on from before the attempt
    kept = {"strategy": capture(run.strategy), "grid": run.grid.capture()}
    state = encode_state(kept) if any(kept.values()) else None
    seconds = (now() - started).total_seconds()
    done = Attempt(theta, reason, tally, trained, measured, seconds, state)
    outcome = commit_attempt(run.store, run.id, number, done, retry=place.attempt < config.max_attempts)
    if not config.retain_updates:
        run.on_settled(settled_in(run.store, run.id, number))
    if outcome is None:
        run.grid.rest(place.attempt)
        return dataclasses.replace(place, attempt=place.attempt + 1, cohort=None), None
    if config.retain_rounds and number > config.retain_rounds:
        forget_rounds(run.store, run.id, number - config.retain_rounds + 1)
    failed = place.failed_in_a_row + 1 if reason else 0
    if reason:
        run.grid.rest(failed)
    return Place(theta, number + 1, 1, None, failed, state), outcome


def _sample(run: Driven, number: int, attempt: int) -> Mapping[int, str]:
    """Wait for devices, and write down which of them are asked.

    Raises:
        RunError: too few came. Stopped: while waiting.
    """
    config, should_stop = run.config, run.grid.should_stop
    working = run.grid.working() if config.mode == "fedbuff" else {}
    run.grid.set_aside = set_aside(run.store, run.id, config.max_offences)
    devices = run.grid.wait_available(config.min_devices - len(working), config.wait_s, should_stop)
    if should_stop():
        raise Stopped(f"stopped before round {number}")
    if len({**working, **devices}) < config.min_devices:
        raise RunError(
            f"{len(devices)} of at least {config.min_devices} devices came within {config.wait_s:g} s; "
            "start more or lower min_devices"
        )
    idle = {node: name for node, name in devices.items() if node not in working}
    asked = math.ceil(config.cohort * (1 + config.over_selection) - 1e-9)
    if asked and working:
        asked = max(0, asked - len(working))
        idle = idle if asked else {}
    chosen = {**working, **sample_cohort(idle, asked, config.seed, number, attempt)}
    cohort = dict(sorted(chosen.items(), key=lambda item: item[1]))
    begin_attempt(run.store, run.id, number, list(cohort))
    return cohort


def _train_round(run: Driven, number: int, theta: Vector) -> tuple[Vector, str | None, Tally, dict[str, float]]:
    """What the cohort made of theta, why it is not usable (then theta comes back), the tally and the devices' metrics."""
    arrays = arrays_of(theta)
    messages = run.strategy.configure_train(number, arrays, local_config(run.config, number), run.grid)
    tally = Tally()
    sent = run.grid.send_and_receive(messages, timeout=run.config.deadline_s)
    known, step = recall(run.store, run.id, number), last_step(run.store, run.id, theta)
    replies = screen(sent, theta, run.limits, tally, known, step)
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


def local_config(config: RunConfig, number: int) -> ConfigRecord:
    """The message's config in round `number`: TrainConfig's fields with that round's learning rate, the run's seed (devices mix in
    their name and the round), UpdateForm's.
    """
    local = dataclasses.asdict(config.local) | {"learning_rate": config.learning_rate_in(number)}
    form = {f"update.{k}": v for k, v in config.update.to_dict().items()}
    return ConfigRecord({**local, "seed": config.seed, **form})


def personal_means(replies: Sequence[Mapping[str, Any]], means: Mapping[str, float]) -> dict[str, float]:
    """Devices with private parameters tell counts and sums: their totals take the place of their means.

    What one device tells counts no more than its examples, and those no more than the run allows.
    """
    if not {"examples", "correct", "loss_sum"} <= set(means):
        return dict(means)
    totals = {"examples": 0.0, "correct": 0.0, "loss_sum": 0.0}
    for told in replies:
        examples = float(told["examples"])
        if not (examples >= 1 and 0 <= told["correct"] <= examples and told["loss_sum"] >= 0):
            continue
        share = min(1.0, float(told["num-examples"]) / examples)
        for name in totals:
            totals[name] += share * float(told[name])
    rest = {k: v for k, v in means.items() if k not in totals} | totals
    if not totals["examples"]:
        return rest
    return rest | {
        name: totals[key] / totals["examples"] for name, key in (("accuracy", "correct"), ("loss", "loss_sum"))
    }


def _measure(run: Driven, theta: Vector, reason: str | None, number: int) -> dict[str, float]:
    """On the coordinator's test set; on the devices' own examples where that is asked for, as device_<name>."""
    measured = dict(run.evaluate(theta)) if run.evaluate else {}
    if run.config.evaluate_on_devices and reason is None:
        arrays = arrays_of(theta)
        messages = run.strategy.configure_evaluate(number, arrays, local_config(run.config, number), run.grid)
        replies = run.grid.send_and_receive(messages, timeout=run.config.deadline_s)
        usable = with_common_metrics(screen_measured(replies, run.config.max_examples))
        metrics = run.strategy.aggregate_evaluate(number, usable) or {}
        numbers = {k: float(v) for k, v in metrics.items() if isinstance(v, (int, float)) and k != "num-examples"}
        numbers = personal_means([reply.content["metrics"] for reply in usable if not reply.has_error()], numbers)
        measured |= {f"device_{k}": v for k, v in numbers.items()}
        if not run.evaluate:
            measured |= {k: v for k, v in numbers.items() if k in ("accuracy", "loss")}
    return measured
