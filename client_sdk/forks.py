"""What a forked child may not touch: gRPC, SQLite and the home's lock belong to the process that opened them."""

from __future__ import annotations

import os
import weakref
from typing import TYPE_CHECKING

from pocketfed.client_sdk.errors import ConfigurationError

if TYPE_CHECKING:
    from pocketfed.client_sdk.device import Device

_devices: weakref.WeakSet[Device] = weakref.WeakSet()
_left_behind: list[object] = []  # never closed in the child: that would speak on the parent's connections
_used_here = False
_forked_after_use = False


def remember(device: Device) -> None:
    """A device that this process has made."""
    global _used_here
    _used_here = True
    _devices.add(device)


def refuse_after_fork() -> None:
    """
    Raises:
        ConfigurationError: this process was forked from one that had used a device; gRPC does not survive that.
    """
    if _forked_after_use:
        raise ConfigurationError(
            "this process was forked from one that has used a Device, which gRPC does not survive; start it with the method "
            '"spawn" (multiprocessing.get_context), or fork before the first Device is made'
        )


def _in_child() -> None:
    global _forked_after_use, _used_here
    _forked_after_use = _forked_after_use or _used_here
    for device in list(_devices):
        device._abandon()
        _left_behind.append(device)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
