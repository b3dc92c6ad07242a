"""Which releases a device holds: the newest, the one before, and which of the two it predicts with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pocketfed.client_sdk.home import read_json, write_json


@dataclass(frozen=True)
class Held:
    """One release: an artifact's version, a trainable set, and the digest of parameters."""

    id: int
    artifact: str
    set: str
    digest: str


@dataclass(frozen=True)
class Shelf:
    """What `release.json` in home says; replaced whole, which is what swaps the model in use.

    judged: the newest was compared with the one before, or there is nothing to compare it with.
    report: what the coordinator is still to hear about that; fields of ReleaseReport in fleet.proto.
    """

    newest: Held
    before: Held | None = None
    judged: bool = True
    went_back: bool = False
    report: Mapping[str, Any] = field(default_factory=dict)

    @property
    def in_use(self) -> Held:
        return self.before if self.went_back and self.before is not None else self.newest

    @property
    def all(self) -> tuple[Held, ...]:
        return (self.newest,) if self.before is None else (self.newest, self.before)


def read_shelf(path: Path) -> Shelf | None:
    """None where there is nothing usable: the coordinator is asked for its newest release then."""
    told = read_json(path)
    try:
        before = _held(told["before"]) if told.get("before") else None
        return Shelf(
            _held(told),
            before,
            bool(told.get("judged", True)),
            bool(told.get("went_back", False)),
            dict(told.get("report") or {}),
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def write_shelf(path: Path, shelf: Shelf) -> None:
    told = asdict(shelf.newest) | asdict(shelf)
    del told["newest"]
    write_json(path, told)


def _held(told: Mapping[str, Any]) -> Held:
    return Held(int(told["id"]), str(told["artifact"]), str(told["set"]), str(told["digest"]))
