"""A `pocketfed` command that is killed at a named point: `python crashing.py POINT serve ...`; the points are below.

The command itself knows nothing of it: the functions that the points lie between are wrapped here. Without arguments it
imports what a coordinator needs once, and runs every command that it reads in a process of its own (`serve_forks`).
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any


def die(*_: Any) -> None:
    """As `kill -9` does it: nothing is closed, nothing is flushed. Where DIE_ON names a pipe, once that is written to."""
    if "DIE_ON" in os.environ:
        with open(os.environ["DIE_ON"]) as pipe:
            pipe.read()
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


def run(point: str, words: list[str]) -> None:
    arm(point)
    sys.argv[1:] = words
    from pocketfed.cli.main import main

    main()


def serve_forks() -> None:
    """A line in: JSON of the point, the folder, the file for what is said, seconds, words. A line out: the exit code."""
    import pocketfed.coordinator.leadership
    import pocketfed.coordinator.rounds
    import pocketfed.coordinator.server  # noqa: F401 - imported here, and so in every fork already

    print("ready", flush=True)
    for line in sys.stdin:
        point, folder, said, seconds, words = json.loads(line)
        child = os.fork()
        if not child:
            code = 1
            try:
                signal.alarm(seconds)
                os.chdir(folder)
                into = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(into, 1)
                os.dup2(into, 2)
                run(point, words)
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
            finally:
                sys.stdout.flush()
                os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run(sys.argv[1], sys.argv[2:])
    else:
        serve_forks()
