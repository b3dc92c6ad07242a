"""A device's folder: one process at a time works in it, and what is written there is there whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from pocketfed.client_sdk.errors import ConfigurationError, StorageError

SPARE_BYTES = 16 << 20  # of the disk, left to others


def claim(home: Path) -> Any:
    """Make home and hold its lock, so that one process at a time works in it. What is returned is for `release`."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        stream = (home / "lock").open("a+b")
    except OSError as error:
        raise ConfigurationError(
            f"cannot write to {home}: {error.strerror}; give a folder that this app may write to"
        ) from None
    try:
        import fcntl
    except ImportError:  # Windows: no advisory lock
        return stream
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        stream.seek(0)
        holder = stream.read(20).decode("ascii", "replace").strip() or "unknown"
        stream.close()
        who = "this process, by another Device" if holder == str(os.getpid()) else f"process {holder}"
        raise ConfigurationError(
            f"{home} is in use by {who}; close that one, or give each device a home of its own"
        ) from None
    with contextlib.suppress(OSError):  # a full disk: whoever is refused does not hear by whom
        stream.truncate(0)
        stream.write(str(os.getpid()).encode())
        stream.flush()
    return stream


def release(stream: Any) -> None:
    stream.close()


def check_room(home: Path, count: int, held: int, allowed: float) -> None:
    """For so many bytes more, besides `held`.

    Raises:
        StorageError: the disk is too full, or home would have more than is allowed.
    """
    free = shutil.disk_usage(home).free
    if count + SPARE_BYTES > free:
        raise StorageError(
            f"{count / 1e6:.0f} MB more do not fit on the disk of {home}, which has {free / 1e6:.0f} MB free"
        )
    if held + count > allowed:
        raise StorageError(
            f"{home} would have {(held + count) / 1e6:.0f} MB; the app allows {allowed / 1e6:g}, see max_disk_mb"
        )


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote; empty where there is nothing readable."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path: Path, value: dict[str, Any]) -> None:
    write_bytes(path, json.dumps(value).encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Whole or not at all; readable by this user only."""
    partial = path.with_name(path.name + ".partial")
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)
