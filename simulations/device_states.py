"""What virtual devices keep to themselves from round to round, in a file beside the database: a row for each that has changed."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pocketfed.coordinator.grid import Stopped
from pocketfed.coordinator.strategy_state import decode_state, encode_state

TABLE = """CREATE TABLE IF NOT EXISTS states
    (run INTEGER, device INTEGER, version INTEGER, content BLOB, PRIMARY KEY (run, device, version))"""


class LostStates(Stopped):
    """The file lacks what a checkpoint names: the run is left as it is, for whoever brings the file back."""


def states_beside(database: Path) -> Path:
    """
    >>> states_beside(Path("runs.db")).name
    'runs.devices.db'
    """
    return database.with_name(f"{database.stem}.devices{database.suffix}")


class DeviceStates:
    """The states of one run. A checkpoint holds `named`: device -> version of its row.

    Rows are written before the checkpoint that names them is committed, and those it no longer names are deleted after it:
    whoever is killed in between finds what the committed one names.
    """

    def __init__(self, path: Path, run_id: int) -> None:
        self.path, self.run_id = path, run_id
        self.named: dict[int, int] = {}
        self._newest = 0
        self._replaced: list[tuple[int, int]] = []
        self._database: sqlite3.Connection | None = None

    def recall(self, named: Mapping[int, int]) -> Iterator[tuple[int, dict[str, Any]]]:
        """What each device kept, by the committed checkpoint; any other row of the run is deleted.

        Raises:
            LostStates: not all of it is there.
        """
        self.named, self._newest, self._replaced = dict(named), max(named.values(), default=0), []
        if not named and not self.path.exists():
            return
        mine = "SELECT device, version FROM states WHERE run = ?"
        held = set(self._open().execute(mine, (self.run_id,)))
        missing = self.named.items() - held
        if missing:
            raise LostStates(
                f"{self.path} lacks what {len(missing)} devices of run {self.run_id} kept; put it back as it was beside the "
                "database, or begin anew without --resume"
            )
        self._delete(held - self.named.items())
        for device, version in self.named.items():
            found = "SELECT content FROM states WHERE run = ? AND device = ? AND version = ?"
            (content,) = self._open().execute(found, (self.run_id, device, version)).fetchone()
            yield device, decode_state(content)

    def write(self, states: Mapping[int, Mapping[str, Any]]) -> None:
        """The states of devices that may have changed, all in one transaction; an empty one is no longer kept.

        Whoever writes again has committed what was named before.
        """
        self.committed()
        self._newest += 1
        self._replaced = [(device, self.named.pop(device)) for device in states if device in self.named]
        filled = [device for device, state in states.items() if state]
        if not filled:
            return
        rows = ((self.run_id, device, self._newest, encode_state(states[device])) for device in filled)  # one at a time
        with self._open() as transaction:
            transaction.executemany("INSERT INTO states VALUES (?, ?, ?, ?)", rows)
        self.named |= dict.fromkeys(filled, self._newest)

    def committed(self) -> None:
        """The checkpoint that holds `named` has been committed: what it replaced is deleted."""
        self._delete(self._replaced)
        self._replaced = []

    def close(self) -> None:
        if self._database is not None:
            self._database.close()

    def _delete(self, rows: Any) -> None:
        if rows:
            with self._open() as transaction:
                gone = "DELETE FROM states WHERE run = ? AND device = ? AND version = ?"
                transaction.executemany(gone, [(self.run_id, *row) for row in rows])

    def _open(self) -> sqlite3.Connection:
        if self._database is None:
            self._database = sqlite3.connect(self.path)
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = FULL")
            self._database.execute(TABLE)
        return self._database
