"""Rows of JSON in a file that several runs add to: a kill costs the row that was being written, and no other."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def whole_rows(path: Path) -> list[Any]:
    """What every line says; a line that a killed process left unfinished is none. Empty where there is no file."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """One write to the end of the file, on a line of its own whatever the last process did; on disk when this returns."""
    with path.open("ab+") as file:
        file.seek(0, os.SEEK_END)
        torn = file.tell() > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
        file.write(b"\n" * torn + json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
