"""Going on with a simulation that was stopped or killed: which run of the database it is, and who may."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pocketfed.coordinator.leadership import claim
from pocketfed.coordinator.progress import Simulated, simulated_runs
from pocketfed.coordinator.store import Store
from pocketfed.model.tasks import Dataset
from pocketfed.simulations.device_states import states_beside
from pocketfed.simulations.fleet import Fleet

UNFINISHED = ("waiting", "running")
Resume = Literal["unfinished", "any", "must", "only"]
UNFINISHED_FILE = "unfinished.db"  # of a run without a database, in the folder of its report until that is written


class SimulationError(ValueError):
    """A simulation that cannot be set up."""


class Stopwatch:
    """Seconds that a run has taken on this machine. before: in processes that it was stopped in, up to their last commit."""

    def __init__(self) -> None:
        self.before, self._began = 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self._began


def digest_of(dataset: Dataset) -> str:
    """SHA-256 of what was read, split by split, whatever the files around it look like."""
    digest = hashlib.sha256()
    for split in (dataset.train, dataset.dev, dataset.test):
        digest.update(f"{len(split)}\n".encode())
        for example in split:
            digest.update(repr(example).encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def digest_of_model(folder: Path) -> str:
    """SHA-256 of a model folder's weights, configuration and vocabulary, wherever it lies."""
    digest = hashlib.sha256()
    for file in sorted(f for f in folder.iterdir() if f.suffix in (".json", ".safetensors", ".txt")):
        with file.open("rb") as stream:
            digest.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def digest_of_fleet(fleet: Fleet) -> str:
    """SHA-256 of its devices and rules, whatever file they are from."""
    return hashlib.sha256(repr(fleet).encode()).hexdigest()


def forget(database: Path) -> None:
    """Delete the file of a run that has a report by now, and what lies beside it: its log, what its devices kept."""
    for name in (database.name, states_beside(database).name):
        for file in database.parent.glob(f"{name}*"):
            file.unlink()


def plain(value: Any) -> Any:
    """As it comes back from a database: lists for tuples, texts for paths."""
    return json.loads(json.dumps(value, default=str))


def same(stored: Mapping[str, Any], described: Mapping[str, Any]) -> bool:
    """Whether a run was begun with this configuration and data."""
    return bool(plain(stored) == plain(described))


@contextlib.contextmanager
def run_to_drive(
    store: Store, described: Mapping[str, Any], version: str, resume: Resume, begin: Callable[[], int]
) -> Iterator[tuple[int, bool]]:
    """The run to drive, nobody else's while the block lasts, and whether it has finished already.

    A run that was left with the same configuration, data and artifact goes on; else `begin` makes one.

    Args:
        described: {"config": the run's, "simulation": what its devices are made of}.
        resume: "unfinished": one that has finished is left alone; "any": that will do too; "must": and nothing is begun;
            "only": the database is this run's own, whatever lies in it must be this run.

    Raises:
        SimulationError: there "must" be one and is none, it was begun with something else, or another process drives it.
    """
    with contextlib.ExitStack() as stack:
        why = f"{store.name} has no simulated run to go on with; leave out --resume to begin one"
        runs = simulated_runs(store)
        must = resume == "must" or (resume == "only" and bool(runs))
        instead = "begin anew without --resume" if resume == "must" else "begin anew with another --report"
        for left in runs:
            if resume == "unfinished" and left.status not in UNFINISHED:
                continue
            made_of = {"config": left.config, "simulation": left.simulation}
            if not same(made_of, described) or left.artifact_version != version:
                why = f"{_difference(left, made_of, described, version)}, or {instead}"
                if must:
                    break
                continue
            if left.status == "finished" or stack.enter_context(claim(store, f"run-{left.run_id}")):
                yield left.run_id, left.status == "finished"
                return
            place = "--report" if resume == "only" else "--database"
            why = f"run {left.run_id} is simulated by another process; wait for it, or give another {place}"
            if must:
                break
        if must:
            raise SimulationError(why)
        run_id = begin()
        stack.enter_context(claim(store, f"run-{run_id}"))
        yield run_id, False


def _difference(left: Simulated, stored: Mapping[str, Any], described: Mapping[str, Any], version: str) -> str:
    """Why a run is not this one, in a sentence."""
    before, now = flat(plain(stored)), flat(plain(described))
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if not changed:
        return (
            f"run {left.run_id} was begun with the artifact {left.artifact_version[:12]}, this model makes {version[:12]}; "
            "give the model as it was"
        )
    name = changed[0].split(".", 1)[-1]
    return (
        f"run {left.run_id} was begun with {name} = {str(before.get(changed[0]))[:100]!r}, not "
        f"{str(now.get(changed[0]))[:100]!r}; give that"
    )


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """
    >>> flat({"run": {"rounds": 3, "local": {"epochs": 1}}})
    {'run.rounds': 3, 'run.local.epochs': 1}
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else {f"{prefix}{name}": value}
    return found


def left_in(store: Store) -> Simulated:
    """The newest run that a simulation has left unfinished, else the newest.

    Raises:
        SimulationError: there is none.
    """
    found: Sequence[Simulated] = simulated_runs(store)
    if not found:
        raise SimulationError(f"{store.name} has no simulated run to go on with; leave out --resume to begin one")
    return next((run for run in found if run.status in UNFINISHED), found[0])
