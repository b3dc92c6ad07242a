"""The few private touches of flwr (1.41 to 1.42) that driving its strategies without its servers takes, all here."""

from __future__ import annotations

import logging
import os
from typing import Any

# Before flwr is imported: no telemetry, no look-up of newer versions.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity

logging.getLogger("flwr").setLevel(os.environ.get("FLWR_LOG_LEVEL", "WARNING"))  # importing flwr sets it to DEBUG


def enter_run(run_id: int) -> None:
    """`Message()` reads the run it belongs to from a process-global that only Flower's own servers set."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = run_id, 1, 1


def name_message(message: Message, message_id: str) -> Message:
    """Give a message the id that replies refer to; Flower's grids do this inside."""
    message.metadata.__dict__["_message_id"] = message_id
    return message


def ray_backend(config: dict[str, Any]) -> Any:
    """The backend of Flower's own simulations; it needs Ray."""
    from flwr.server.superlink.fleet.vce.backend.raybackend import RayBackend

    return RayBackend(config)
