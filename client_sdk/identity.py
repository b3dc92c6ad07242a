"""Who a device is to its coordinator: a name and a secret of its own, made here and told once."""

from __future__ import annotations

import secrets
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

from pocketfed.client_sdk.errors import ConfigurationError
from pocketfed.client_sdk.home import read_json, write_json
from pocketfed.client_sdk.link import Link


class Identity:
    """What `identity.json` in home says.

    Args:
        name: unique in the fleet; by default the one in home, or a random one.
        lock: held while enrolling, so that two threads do it one after the other.

    Raises:
        ConfigurationError: home is another device's.
    """

    def __init__(self, home: Path, name: str | None, channel: str, enrolment_key: str, lock: threading.RLock) -> None:
        self._path, self._lock = home / "identity.json", lock
        held = read_json(self._path)
        if name is not None and held.get("name", name) != name:
            raise ConfigurationError(
                f"{home} belongs to device {held['name']!r}, not {name!r}; give each device a home of its own"
            )
        self.name: str = held.get("name") or name or f"device-{uuid.uuid4().hex[:12]}"
        self.channel, self._enrolment_key = channel, enrolment_key
        self.token: str = held.get("token", "") if held.get("enrolled") else ""  # empty until the device is enrolled

    def ensure_enrolled(self, link: Link, say: Callable[[str], None]) -> None:
        """
        Raises:
            LinkError: unreachable, or refused.
        """
        if not link.token:
            say("enrolling")  # before the lock: a callback may stop the device, which waits for who waits for it
        with self._lock:
            if link.token:
                return
            # The token is on disk before the coordinator hears of it: a lost reply does not lock the device out.
            token = read_json(self._path).get("token") or secrets.token_urlsafe(32)
            identity = {"name": self.name, "token": token, "enrolled": False}
            write_json(self._path, identity)
            link.enrol(self.name, self.channel, token, self._enrolment_key)
            write_json(self._path, identity | {"enrolled": True})
