"""simulate for one run: what it keeps so that it can go on, and where its report, rounds and picture go."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocketfed.cli.output import (
    CommandError,
    UsageError,
    check_database,
    format_bytes,
    format_skipped,
    print_round,
    print_round_header,
    write_json,
    write_text,
)

if TYPE_CHECKING:
    from pocketfed.coordinator.progress import RoundResult, Simulated
    from pocketfed.simulations.experiment import Experiment
    from pocketfed.simulations.run import SimulationConfig, SimulationResult


@dataclass(frozen=True)
class Asked:
    """The options of one run. root: where relative data begins. lines: what the result is compared with."""

    experiment: Experiment
    root: Path | None
    database: str | None
    resume: bool
    lines: Sequence[str]
    report: Path | None
    log_to: Sequence[str]
    json: Path | None
    picture: Path | None

    @property
    def own(self) -> Path | None:
        """The database that lies in the folder of the report until that is written, where no other is given."""
        from pocketfed.simulations.resuming import UNFINISHED_FILE

        return None if self.database is not None or self.report is None else self.report / UNFINISHED_FILE

    @property
    def kept(self) -> str | None:
        """The database that the run goes on in."""
        return self.database if self.own is None else str(self.own)


def run(asked: Asked) -> None:
    from pocketfed.coordinator.strategy import make_strategy
    from pocketfed.simulations.experiment import config_of, settings_of
    from pocketfed.simulations.report import describe, write_report
    from pocketfed.simulations.resuming import forget
    from pocketfed.simulations.run import simulate
    from pocketfed.simulations.trackers import numbers_of, trackers

    values = dict(asked.experiment.values)
    if asked.resume:
        _check_left(asked)
        values = values or _left_in(str(asked.kept))
    if not values.get("data"):
        raise UsageError("Missing option '--data' (or '--config'); see pocketfed simulate --help")
    settings = config_of(values, asked.root)
    make_strategy(settings.run.strategy, settings.run.strategy_options)
    check_database(asked.database)
    header = [True]
    with trackers(asked.log_to, settings.run.name, settings_of(settings)) as log:

        def show(result: RoundResult) -> None:
            if header.pop() if header else False:
                print_round_header()
            print_round(result)
            log(result.number, numbers_of(result))

        with _kept(asked, settings), _noted(asked.database, settings.run.name):
            result = simulate(
                settings,
                asked.kept,
                show,
                lambda step: print(f"{step} ...", flush=True),
                lines=asked.lines,
                resume="must" if asked.resume else "unfinished" if asked.own is None else "only",
            )
        log(result.rounds[-1].number, _finally(result))
    if asked.report is not None:
        described = describe(result, settings_of(settings), settings.run.name)
        write_report(described, asked.report, result.partition_svg)
    if asked.json is not None:
        write_json(asked.json, result.to_dict())
    if asked.picture is not None:
        write_text(asked.picture, result.partition_svg)
    if asked.own is not None:
        forget(asked.own)
    _tell(result)
    if asked.report is not None:
        print(f"read it: {asked.report / 'report.html'}")
    if asked.database:
        print(f"watch it: pocketfed dashboard --database {asked.database}")


def _check_left(asked: Asked) -> None:
    if asked.kept is None:
        raise UsageError(
            "--resume goes on with a run in a database, or in the folder of a report; give it with --database or --report"
        )
    if asked.own is not None and not asked.own.exists():
        raise CommandError(f"in {asked.report} no run was left to go on with; leave out --resume to begin one")


def _left_in(database: str) -> dict[str, Any]:
    """The settings of the run that is to go on."""
    from pocketfed.coordinator.store import Store
    from pocketfed.simulations.experiment import stored_settings
    from pocketfed.simulations.resuming import left_in

    with contextlib.closing(Store(database, create=False)) as store:
        left = left_in(store)
    return stored_settings(left.config, left.simulation)


@contextlib.contextmanager
def _kept(asked: Asked, settings: SimulationConfig) -> Iterator[None]:
    """Stopped, a run that is kept says which command goes on with it; a folder is not left with a database of nothing."""
    if asked.kept is None:
        yield
        return
    was_there = asked.own is None or asked.own.parent.exists()
    over = [run.run_id for run in _begun(asked, settings) if run.status == "finished"] if asked.own is None else []
    if asked.own is not None:
        asked.own.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException as error:
        begun = [run for run in _begun(asked, settings) if run.run_id not in over]
        if begun and isinstance(error, KeyboardInterrupt):
            print(f"left for later; this goes on with it: {_same_command()}", flush=True)
        if asked.own is not None and not _begun(asked):
            _clean(asked.own, was_there)
        raise


def _begun(asked: Asked, settings: SimulationConfig | None = None) -> list[Simulated]:
    """The runs in the database that is kept; with settings, those of the same."""
    from pocketfed.coordinator.progress import simulated_runs
    from pocketfed.coordinator.store import Store, StoreError
    from pocketfed.simulations.resuming import same

    try:
        with contextlib.closing(Store(str(asked.kept), create=False)) as store:
            runs = simulated_runs(store)
    except StoreError:  # there is none yet
        return []
    return [run for run in runs if settings is None or same(run.config, settings.run.to_dict())]


def _clean(database: Path, was_there: bool) -> None:
    from pocketfed.simulations.resuming import forget

    forget(database)
    if not was_there:
        with contextlib.suppress(OSError):  # it is not empty
            database.parent.rmdir()


def _same_command() -> str:
    """As it was typed, with --resume: also what a database does not keep, such as --backend and --baselines, is as it was."""
    words = sys.argv[1:]
    return shlex.join(["pocketfed", *words, *([] if "--resume" in words else ["--resume"])])


def _finally(result: SimulationResult) -> dict[str, float]:
    """What is known only at the end, by name."""
    found = result.found
    told = {f"line/{name}": line.accuracy for name, line in (found.lines if found else {}).items()}
    if found and found.served:
        told |= {f"devices/{k}": getattr(found.served, k) for k in ("mean", "p10", "worst_decile")}
    return {name: value for name, value in told.items() if value is not None}


def _tell(result: SimulationResult) -> None:
    """The result in a few lines."""
    if result.skipped:
        print(format_skipped(result.skipped))
    final, found = result.rounds[-1], result.found
    measure = f"loss {final.loss:.4f}" if final.accuracy is None else f"accuracy {final.accuracy:.4f}"
    print(f"{measure} on {result.test_examples} test examples ({result.test_source})")
    if found is None or found.costs is None:
        return
    if found.served:
        s = found.served
        spread = f"mean {s.mean:.4f}, 10th percentile {s.p10:.4f}, worst decile {s.worst_decile:.4f}"
        print(f"over {s.devices} devices, on {s.source}: {spread}")
    names = {"central": "in one place", "local": "each device alone", "previous": "before"}
    told = [f"{names[k]} {v.accuracy:.4f}" for k, v in found.lines.items() if v.accuracy is not None]
    if told:
        print("beside it: " + ", ".join(told))
    c = found.costs
    spent = f"{format_bytes(c.bytes_up)} up, {format_bytes(c.bytes_down)} down, {c.device_seconds:.1f} s of training"
    print(f"a device: {spent}, {c.joules:.1f} J (an estimate)")


@contextlib.contextmanager
def _noted(database: str | None, name: str) -> Iterator[None]:
    """A simulation that is kept publishes an artifact and makes a run: that is an act like any other."""
    if database is None:
        yield
        return
    from pocketfed.coordinator.operators import local_admin, noting
    from pocketfed.coordinator.store import Store, database_url

    url = database_url(database)
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").exists():
        yield  # a mistake leaves no database behind; what went well is written into the one it made
        with contextlib.closing(Store(database)) as store, noting(store, local_admin(), "simulate", name):
            pass
        return
    with contextlib.closing(Store(database)) as store, noting(store, local_admin(), "simulate", name):
        yield
