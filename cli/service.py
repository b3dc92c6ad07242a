"""What tells a service manager how a process fares: systemd's notifications, and a status file for health checks."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path


def notify(state: str) -> None:
    """Send lines like `READY=1` to systemd, where it started us as Type=notify; else nothing (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):  # an abstract socket
        address = "\0" + address[1:]
    # A service goes on when its manager does not listen.
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.connect(address)
        manager.sendall(state.encode())


def write_status(path: Path, status: str, ok: bool) -> None:
    """`{"ok": ..., "status": ..., "at": ...}`, whole or not at all."""
    at = datetime.now(UTC).isoformat(timespec="seconds")
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps({"ok": ok, "status": status, "at": at}) + "\n")
    os.replace(partial, path)
