"""A device's folder: one process at a time works in it, and what is written there is there whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pocketfed.client_sdk.errors import ConfigurationError


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
        stream.close()
        raise ConfigurationError(
            f"{home} is in use by another device; stop it, or give each device a home of its own"
        ) from None
    return stream


def release(stream: Any) -> None:
    stream.close()


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
