"""An update on its way: on disk before a byte of it is sent, until the coordinator has said what became of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import DecodeError

from pocketfed.client_sdk.home import write_bytes
from pocketfed.client_sdk.link import log
from pocketfed.protos import fleet_pb2 as fleet


@dataclass(frozen=True)
class Update:
    """data: as it is sent; empty for a measurement. num_examples: its weight."""

    data: bytes
    num_examples: int
    metrics: Mapping[str, float]

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


class Outbox:
    """One file with one update and the assignment that it is for."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def keep(self, assignment: fleet.Assignment, update: Update) -> None:
        """A disk that is full costs the safety, not the update."""
        told = {
            "assignment": assignment.SerializeToString().hex(),
            "num_examples": update.num_examples,
            "metrics": dict(update.metrics),
        }
        body = json.dumps(told).encode() + b"\n" + update.data
        try:
            write_bytes(self._path, hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
        except OSError as error:
            log.warning("an update cannot be kept on disk until it is handed in: %s", error)

    def read(self) -> tuple[fleet.Assignment, Update] | None:
        """What is still to be handed in; None if there is nothing, or nothing whole."""
        try:
            digest, _, body = self._path.read_bytes().partition(b"\n")
            if hashlib.sha256(body).hexdigest().encode() != digest:
                raise ValueError("its digest is another")
            head, _, data = body.partition(b"\n")
            told = json.loads(head)
            assignment = fleet.Assignment.FromString(bytes.fromhex(told["assignment"]))
            return assignment, Update(data, int(told["num_examples"]), dict(told["metrics"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, DecodeError) as error:
            log.warning("an update that was kept is not readable and is dropped: %s", error)
            self.clear()
            return None

    def clear(self) -> None:
        self._path.unlink(missing_ok=True)
