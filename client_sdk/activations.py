"""Keeping what the frozen part of a model made of a text, so that it is computed once and not once an epoch."""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pocketfed.client_sdk.errors import ConfigurationError

PRECISIONS = ("float32", "float16", "int8")
Hidden = NDArray[np.float32]


class ActivationCache(Protocol):
    """Token ids of one text -> what the prefix made of them; bounded. Once full it keeps what it has: an epoch visits all."""

    def get(self, row: NDArray[np.int64]) -> Hidden | None:
        """What was put, or None."""

    def put(self, row: NDArray[np.int64], hidden: Hidden) -> None:
        """Keep it, if there is room."""

    def begin(self) -> None:
        """A new use of the cache: what the last one did not touch may go where room is needed."""

    def clear(self) -> None:
        """Forget everything."""


def pack(hidden: Hidden, precision: str) -> bytes:
    """int8 keeps one float32 scale a row of (..., D); what `unpack` gives differs by at most half a step of that."""
    if precision == "float32":
        return np.ascontiguousarray(hidden, np.float32).tobytes()
    if precision == "float16":
        halves: NDArray[np.float16] = np.clip(hidden, -65504, 65504).astype(np.float16)
        return halves.tobytes()
    scale: Hidden = np.maximum(np.abs(hidden).max(-1, keepdims=True), 1e-30).astype(np.float32) / np.float32(127)
    rounded: NDArray[np.int8] = np.rint(hidden / scale).astype(np.int8)
    return scale.tobytes() + rounded.tobytes()


def unpack(data: bytes, width: int, tokens: bool, precision: str) -> Hidden:
    """(T, width), or (width,) without `tokens`."""
    if precision == "int8":
        rows = len(data) // (width + 4)
        scale = np.frombuffer(data, np.float32, rows)[:, None]
        flat = np.frombuffer(data, np.int8, offset=4 * rows).reshape(rows, width) * scale
    else:
        flat = np.frombuffer(data, np.dtype(precision)).astype(np.float32, copy=False).reshape(-1, width)
    return flat if tokens else flat[0]


class MemoryCache:
    """In this process's memory.

    Args:
        limit_bytes: of what is held.
        precision: one of PRECISIONS; lower ones hold more and cost a little exactness.
    """

    def __init__(self, limit_bytes: int, width: int, tokens: bool, precision: str = "float32") -> None:
        _check(limit_bytes, precision)
        self.limit_bytes, self.bytes = limit_bytes, 0
        self._width, self._tokens, self._precision = width, tokens, precision
        self._held: dict[bytes, tuple[int, Any]] = {}  # key -> last use, content
        self._use = 0

    def get(self, row: NDArray[np.int64]) -> Hidden | None:
        key = key_of(row)
        found = self._held.get(key)
        if found is None:
            return None
        if found[0] != self._use:
            self._held[key] = (self._use, found[1])
        content = found[1]
        return content if self._precision == "float32" else unpack(content, self._width, self._tokens, self._precision)

    def put(self, row: NDArray[np.int64], hidden: Hidden) -> None:
        content: Any = hidden.copy() if self._precision == "float32" else pack(hidden, self._precision)
        size = content.nbytes if self._precision == "float32" else len(content)
        if self.bytes + size > self.limit_bytes:
            self._drop_unused(size)
        key = key_of(row)
        if self.bytes + size <= self.limit_bytes and key not in self._held:
            self._held[key] = (self._use, content)
            self.bytes += size

    def begin(self) -> None:
        self._use += 1

    def clear(self) -> None:
        self._held.clear()
        self.bytes = 0

    def _drop_unused(self, wanted: int) -> None:
        for key, (use, content) in list(self._held.items()):
            if self.bytes + wanted <= self.limit_bytes:
                break
            if use != self._use:
                self.bytes -= content.nbytes if self._precision == "float32" else len(content)
                del self._held[key]


class DiskCache:
    """In one SQLite file, for sets whose activations are larger than memory. It is as private as the texts it was made of.

    A damaged or foreign file is begun anew: it holds nothing that cannot be computed again.
    """

    def __init__(self, path: Path, limit_bytes: int, width: int, tokens: bool, precision: str = "float16") -> None:
        _check(limit_bytes, precision)
        self.limit_bytes = limit_bytes
        self._width, self._tokens, self._precision = width, tokens, precision
        self._format = f"{width}/{int(tokens)}/{precision}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(0o600)
        try:
            self._open(path)
        except sqlite3.DatabaseError:
            path.unlink()
            self._open(path)
        self._use = int(self._database.execute("SELECT coalesce(max(use), 0) FROM activations").fetchone()[0])
        self.bytes = int(
            self._database.execute("SELECT coalesce(sum(length(content)), 0) FROM activations").fetchone()[0]
        )

    def _open(self, path: Path) -> None:
        self._database = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._database.execute("PRAGMA secure_delete = ON")
        self._database.execute("PRAGMA synchronous = OFF")  # a cache may be lost, not wrong: a torn file is begun anew
        self._database.execute("CREATE TABLE IF NOT EXISTS made_for (format TEXT)")
        self._database.execute(
            "CREATE TABLE IF NOT EXISTS activations (key BLOB PRIMARY KEY, use INTEGER, content BLOB) WITHOUT ROWID"
        )
        held = self._database.execute("SELECT format FROM made_for").fetchone()
        if held != (self._format,):
            self._database.execute("DELETE FROM activations")
            self._database.execute("DELETE FROM made_for")
            self._database.execute("INSERT INTO made_for VALUES (?)", (self._format,))

    def get(self, row: NDArray[np.int64]) -> Hidden | None:
        key = key_of(row)
        found = self._database.execute("SELECT use, content FROM activations WHERE key = ?", (key,)).fetchone()
        if found is None:
            return None
        if found[0] != self._use:
            self._database.execute("UPDATE activations SET use = ? WHERE key = ?", (self._use, key))
        return unpack(found[1], self._width, self._tokens, self._precision)

    def put(self, row: NDArray[np.int64], hidden: Hidden) -> None:
        content = pack(hidden, self._precision)
        if self.bytes + len(content) > self.limit_bytes:
            self._drop_unused()
        if self.bytes + len(content) <= self.limit_bytes:
            done = self._database.execute(
                "INSERT OR IGNORE INTO activations VALUES (?, ?, ?)", (key_of(row), self._use, content)
            )
            self.bytes += len(content) * done.rowcount

    def begin(self) -> None:
        self._use += 1

    def clear(self) -> None:
        self._database.execute("DELETE FROM activations")
        self.bytes = 0

    def close(self) -> None:
        with contextlib.suppress(sqlite3.Error):
            self._database.close()

    def _drop_unused(self) -> None:
        self._database.execute("DELETE FROM activations WHERE use <> ?", (self._use,))
        self.bytes = int(
            self._database.execute("SELECT coalesce(sum(length(content)), 0) FROM activations").fetchone()[0]
        )


def key_of(row: NDArray[np.int64]) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(row).tobytes(), digest_size=16).digest()


def equal_lengths(rows: list[NDArray[np.int64]], most_tokens: int) -> Iterator[list[int]]:
    """Indices of rows, those of one length together, at most so many tokens a group (or one row).

    Without padding a row's result is the same bits whatever else is in its group.
    """
    by_length: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        by_length.setdefault(len(row), []).append(index)
    for length in sorted(by_length):
        members = by_length[length]
        step = max(1, most_tokens // max(1, length))
        for start in range(0, len(members), step):
            yield members[start : start + step]


def _check(limit_bytes: int, precision: str) -> None:
    if precision not in PRECISIONS:
        raise ConfigurationError(f"the cache's precision is {precision!r}; choose one of {', '.join(PRECISIONS)}")
    if limit_bytes < 0:
        raise ConfigurationError(f"the cache's limit is {limit_bytes} bytes; give 0 or more")
