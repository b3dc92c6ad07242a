"""A `pocketfed` command that is killed at a named point: `python crashing.py POINT serve ...`; the points are below.

The command itself knows nothing of it: the functions that the points lie between are wrapped here.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any


def die(*_: Any) -> None:
    """As `kill -9` does it: nothing is closed, nothing is flushed."""
    os.kill(os.getpid(), signal.SIGKILL)


def wrap(owner: Any, name: str, before: Callable[..., None] = lambda *_: None, after: Any = lambda *_: None) -> None:
    inner = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        before(*args)
        result = inner(*args, **kwargs)
        after(*args)
        return result

    setattr(owner, name, wrapped)


def on_call(number: int) -> Callable[..., None]:
    """Dies when it is called for the so-manyth time."""
    calls = []

    def count(*_: Any) -> None:
        calls.append(1)
        if len(calls) == number:
            die()

    return count


def arm(point: str) -> None:
    from pocketfed.coordinator import artifacts, assignments, distribution, grid, progress, rounds, screening
    from pocketfed.coordinator.migrations.versions import m0002_durable_rounds as migration

    match point:
        case "after sampling":
            wrap(rounds, "begin_attempt", after=die)
        case "after offering":
            wrap(grid.RecordedGrid, "push_messages", after=die)
        case "mid-download":
            wrap(distribution.DistributionServicer, "_chunk", after=on_call(2))
        case "after 2 of 3 uploads":
            wrap(assignments.Assignments, "check_header", before=on_call(3))
        case "mid-upload":
            wrap(assignments.Assignments, "append", after=die)
        case "between rename and row":
            wrap(assignments, "_sync_folder", after=die)
        case "between upload and receipt":
            wrap(assignments.Assignments, "count", after=die)
        case "mid-aggregation":
            wrap(screening, "capped_examples", after=on_call(2))
        case "before the commit":
            wrap(rounds, "commit_attempt", before=die)
        case "within the commit":
            wrap(progress, "_keep_state", after=die)
        case "after the commit":
            wrap(rounds, "commit_attempt", after=die)
        case "before the release":
            wrap(rounds, "finish_run", before=die)
        case "during publish":
            wrap(artifacts, "put_artifact", after=die)
        case "during a migration":
            wrap(migration.op, "create_table", after=on_call(2))
        case "never":
            pass
        case _:
            raise ValueError(f"there is no point {point!r}")


if __name__ == "__main__":
    arm(sys.argv[1])
    sys.argv[1:] = sys.argv[2:]
    from pocketfed.cli.main import main

    main()
