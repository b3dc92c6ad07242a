"""A host app with one device, which watches what becomes of its process: coordinator, home and examples as arguments."""

from __future__ import annotations

import json
import locale
import logging
import os
import resource
import signal
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
MAKING = (
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.chown",
    "os.utime",
)
STARTING = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.spawn",
    "pty.spawn",
    "os.kill",
)
written: set[str] = set()
processes: list[str] = []
exits: list[str] = []


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING:
        note(arguments[0])
    elif event in MAKING:
        for argument in arguments:
            note(argument)
    elif event == "sqlite3.connect":
        note(arguments[0])
    elif event in STARTING:
        processes.append(f"{event} {arguments}")


def note(path: Any) -> None:
    if isinstance(path, str | bytes | os.PathLike):
        written.add(os.path.abspath(os.fsdecode(path)))


def exiting(*arguments: object) -> None:
    exits.append(str(arguments))
    raise SystemExit(*arguments)


def state() -> dict[str, Any]:
    """What a library has no business changing."""
    mask = os.umask(0o077)
    os.umask(mask)
    return {
        "signals": {s.name: str(signal.getsignal(s)) for s in signal.Signals},
        "wakeup": signal.set_wakeup_fd(-1),
        "blocked": sorted(map(str, signal.pthread_sigmask(signal.SIG_BLOCK, []))),
        "excepthook": str(sys.excepthook), "thread excepthook": str(threading.excepthook), "hooks": str(sys.displayhook),
        "cwd": os.getcwd(), "umask": mask, "locale": locale.setlocale(locale.LC_ALL),
        "recursion": sys.getrecursionlimit(), "limits": [resource.getrlimit(n) for n in range(resource.RLIMIT_NOFILE + 1)],
        "nice": os.getpriority(os.PRIO_PROCESS, 0), "environment": dict(os.environ),
        "streams": [str(sys.stdin), str(sys.stdout), str(sys.stderr)],
    }  # fmt: skip


def held_open() -> list[str]:
    """Files that are open for writing now, whoever opened them."""
    names = []
    for fd in Path("/proc/self/fd").iterdir() if Path("/proc/self/fd").exists() else ():
        try:
            flags = int(Path(f"/proc/self/fdinfo/{fd.name}").read_text().split("flags:")[1].split()[0], 8)
            target = os.readlink(fd)
        except OSError:
            continue
        if flags & (os.O_WRONLY | os.O_RDWR) and target.startswith("/"):
            names.append(target)
    return names


def main(coordinator: str, home: str, examples: str) -> None:
    rows = [tuple(row) for row in json.loads(Path(examples).read_text())]
    before = state()
    filters = list(warnings.filters)
    sys.addaudithook(watch)
    sys.exit = os._exit = exiting  # type: ignore[assignment]
    said: list[str] = []
    open_files: set[str] = set()
    done = threading.Event()

    from pocketfed.client_sdk import Device

    def listen(status: str) -> None:
        said.append(status)
        open_files.update(held_open())
        if status == "handed in":
            done.set()

    with Device(coordinator, home, on_status=listen) as device:
        device.enrol()
        device.add_examples(rows)
        label = device.predict("play some jazz").label
        device.start()
        assert done.wait(90), said
        device.stop()
    after = state()
    # numpy registers filters of its own about itself; none for the host's warnings, and none of ours
    added = [f for f in warnings.filters if f not in filters and "numpy" not in str(f)]
    report = {
        "label": label, "said": said, "written": sorted(written), "processes": processes, "exits": exits,
        "held_open": sorted(open_files), "before": before | {"filters": []}, "after": after | {"filters": list(map(str, added))},
        "modules": sorted({m.split(".")[0] for m in sys.modules}), "threads": [t.name for t in threading.enumerate()],
        "handlers": [type(h).__name__ for h in logging.getLogger("pocketfed").handlers],
        "root_handlers": [type(h).__name__ for h in logging.getLogger().handlers],
    }  # fmt: skip
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
