"""The log of `pocketfed serve`: for people, or one JSON object a line for machines.

What a peer has said can end neither a line nor a terminal's patience: JSON escapes it, text loses its control characters.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from pocketfed.coordinator.store import printable

FORMATS = ("text", "json")
FIELDS = ("run", "round", "status", "device", "devices", "failed", "rpc", "release", "accuracy", "loss", "seconds")
SAYS = "pocketfed.serve"  # what the command tells the person who started it
MOST = 10_000  # characters of one message


class JsonLines(logging.Formatter):
    """{"time", "level", "logger", "message"} and what is known of FIELDS, in UTC."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        row: dict[str, Any] = {"time": moment, "level": record.levelname.lower(), "logger": record.name}
        row["message"] = record.getMessage()[:MOST]
        row |= {name: value for name in FIELDS if (value := getattr(record, name, None)) is not None}
        if record.exc_info:
            row["exception"] = self.formatException(record.exc_info)[-MOST:]
        return json.dumps(row, default=str)


class Text(logging.Formatter):
    """What the command says as it is; the rest with its time and level. A traceback's lines begin with a bar."""

    def format(self, record: logging.LogRecord) -> str:
        message = printable(record.getMessage(), MOST)
        if record.name == SAYS:
            return message
        moment = datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%d %H:%M:%S")
        lines = self.formatException(record.exc_info)[-MOST:].splitlines() if record.exc_info else []
        return "\n".join(
            [f"{moment} {record.levelname.lower()} {message}", *(f"| {printable(x, MOST)}" for x in lines)]
        )


class _Handler(logging.Handler):
    """To stdout what the command says, and all of JSON; else to stderr. Flushed at once."""

    def __init__(self, form: str) -> None:
        super().__init__(logging.INFO)
        self._all_out = form == "json"
        self.setFormatter(JsonLines() if self._all_out else Text())

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stdout if self._all_out or record.name == SAYS else sys.stderr
        with contextlib.suppress(BrokenPipeError, ValueError):  # whoever read it has gone
            print(self.format(record), file=stream, flush=True)


@contextlib.contextmanager
def logging_as(form: str) -> Iterator[logging.Logger]:
    """Log in that form for as long as the block lasts. Gives the logger for what the command says."""
    ours, handler = logging.getLogger("pocketfed"), _Handler(form)
    before = ours.level, ours.propagate
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    ours.propagate = False
    try:
        yield logging.getLogger(SAYS)
    finally:
        ours.removeHandler(handler)
        ours.setLevel(before[0])
        ours.propagate = before[1]
