"""Telling TensorBoard, MLflow or W&B of a run while it goes on, through their own libraries."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from pocketfed.coordinator.progress import RoundResult
from pocketfed.simulations.resuming import flat

EXTRAS = {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb"}
MOST = 500  # characters of a parameter, which MLflow takes

Log = Callable[[int, Mapping[str, float]], None]  # a round's number, and its numbers by name


class TrackerError(ValueError):
    """A tracker that there is none of, or that is not installed."""


@contextmanager
def trackers(specs: Sequence[str], name: str, settings: Mapping[str, Any]) -> Iterator[Log]:
    """Open all of `KIND:WHERE` (tensorboard:DIR, mlflow:URI, wandb:PROJECT), closed when the block ends.

    Raises:
        TrackerError: no such kind, nowhere, or its library is not installed.
    """
    opened = [(_OPEN[kind], _library(kind), where) for kind, where in map(_parse, specs)]  # all, before one begins
    with ExitStack() as stack:
        logs = []
        for begin, library, where in opened:
            try:
                logs.append(stack.enter_context(begin(library, where, name, flat(settings))))
            except Exception as error:  # each library has its own kinds
                why = str(error).split(". ")[0].splitlines()[:1]
                told = (
                    f"{library.__name__.split('.')[0]} cannot begin at {where}: {''.join(why) or type(error).__name__}"
                )
                raise TrackerError(f"{told}; check the place") from None

        def log(step: int, values: Mapping[str, float]) -> None:
            finite = {k: float(v) for k, v in values.items() if v is not None and math.isfinite(v)}
            for one in logs:
                one(step, finite)

        yield log


def numbers_of(result: RoundResult) -> dict[str, float]:
    """A round's numbers, by name; those that it does not have are left out."""
    told = {k: v for k, v in dataclasses.asdict(result).items() if isinstance(v, (int, float)) and k != "number"}
    return {k: float(v) for k, v in told.items()}


def _parse(spec: str) -> tuple[str, str]:
    kind, colon, where = spec.partition(":")
    if kind not in EXTRAS or not colon or not where.strip():
        raise TrackerError(f"{spec!r} is no tracker; give tensorboard:DIR, mlflow:URI or wandb:PROJECT")
    return kind, where.strip()


def _library(kind: str) -> Any:
    module = {"tensorboard": "tensorboard.summary"}.get(kind, kind)
    try:
        return importlib.import_module(module)
    except ImportError:
        raise TrackerError(f"{kind} is not installed; run: pip install 'pocketfed[{EXTRAS[kind]}]'") from None


@contextmanager
def _tensorboard(library: Any, where: str, name: str, settings: Mapping[str, Any]) -> Iterator[Log]:
    writer = library.Writer(where)

    def log(step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    try:
        yield log
    finally:
        writer.close()


@contextmanager
def _mlflow(library: Any, where: str, name: str, settings: Mapping[str, Any]) -> Iterator[Log]:
    client = library.tracking.MlflowClient(tracking_uri=where)  # its own: the process's default stays as it is
    found = client.get_experiment_by_name("pocketfed")
    experiment = found.experiment_id if found else client.create_experiment("pocketfed")
    run = client.create_run(experiment, run_name=name).info.run_id
    for key, value in settings.items():
        client.log_param(run, _plain(key), str(value)[:MOST])

    def log(step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            client.log_metric(run, _plain(key), value, step=step)

    status = "FAILED"
    try:
        yield log
        status = "FINISHED"
    finally:
        client.set_terminated(run, status)


def _plain(key: str) -> str:
    """MLflow's names have letters, digits and _ - . / and spaces."""
    return "".join(c if c.isalnum() or c in "_-./ " else "_" for c in key)


@contextmanager
def _wandb(library: Any, where: str, name: str, settings: Mapping[str, Any]) -> Iterator[Log]:
    run = library.init(project=where, name=name, config=dict(settings))
    code = 1
    try:
        yield lambda step, values: run.log(dict(values), step=step)
        code = 0
    finally:
        run.finish(exit_code=code)


_OPEN: Mapping[str, Any] = {"tensorboard": _tensorboard, "mlflow": _mlflow, "wandb": _wandb}
