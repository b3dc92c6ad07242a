"""Rows that trials leave behind: read again, what a student has to beat, the digest of their data, and their table."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from pocketfed.model.encoded import Encoded
from pocketfed.model.metrics import summarised
from pocketfed.model.rows import append_row
from pocketfed.model.supervision import Classification, kind_of
from pocketfed.model.tasks import DataError, Dataset, Example
from pocketfed.model.tfidf import tfidf_guesses

Row = dict[str, Any]
# What the first digests were of; a field that came later is part of one only where it says something, so that rows
# written before it keep their keys.
_FIRST_FIELDS = (
    *("name", "train", "dev", "test", "labels", "skipped", "test_source", "kind", "metric", "further", "outside"),
    *("text", "label", "text_pair", "user", "fields", "score", "words", "tags", "answers"),
)


def read_rows(path: Path) -> list[Row]:
    """The rows of a file that `run_trials` wrote; none where there is no file. A line cut short by a kill is dropped.

    Raises:
        DataError: a file of something else.
    """
    if not path.exists():
        return []
    if path.is_dir():
        raise DataError(f"{path} is a folder; name a file for the rows")
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    try:
        rows = [json.loads(line) for line in whole.splitlines() if line.strip()]
    except ValueError:
        rows = [None]
    cut = not whole and content.startswith(b'{"key": "')  # the very first line
    if not all(isinstance(row, dict) and "key" in row for row in rows) or (content and not rows and not cut):
        raise DataError(f"{path} does not hold rows of evaluate; name a new file")
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    return rows


def floor(dataset: Dataset) -> dict[str, float]:
    """The measures of a guess that reads nothing: train's commonest label, its mean score, O for every word, no answer."""
    kind, test = kind_of(dataset), dataset.test
    said = np.zeros(kind.outputs, np.float32)
    if dataset.kind == "classification":
        counts = Counter(e.label for e in dataset.train)
        said[max(range(len(dataset.labels)), key=lambda i: counts[dataset.labels[i]])] = 1
    notes: tuple[list[int], ...] = tuple([] for _ in test)  # no word, no window is shown
    starts = np.zeros(len(test) + 1, np.int64)
    if dataset.kind == "spans":
        return kind.score([], Encoded(test, starts[:0], starts[:1], starts[:0]))
    return kind.score([said] * len(test), Encoded(test, starts[:0], starts, starts[:0], notes=notes))


def floor_rows(dataset: Dataset, out: Path | None = None) -> list[Row]:
    """Rows of what a student has to beat: a guess that reads nothing and, for classification, TF-IDF with a linear model."""
    guesses = {"regression": "train's mean", "tokens": "always O", "spans": "no answer"}
    rows = [_floor_row(dataset, guesses.get(dataset.kind, "always the commonest label"), floor(dataset))]
    known = {e.label for e in dataset.test} <= set(dataset.labels)  # not where a threshold is to tell out of scope
    if dataset.kind == "classification" and known and "choice of" not in dataset.test[0].fields:
        done = {row["key"]: row for row in read_rows(out)} if out else {}
        row = _floor_row(dataset, "TF-IDF, logistic regression", {})
        if row["key"] not in done:
            row["test"] = Classification(dataset.labels, dataset.outside).measured(tfidf_guesses(dataset), dataset.test)
            if out is not None:
                append_row(out, row)
        rows.append(done.get(row["key"], row))
    return rows


def _floor_row(dataset: Dataset, name: str, scores: Mapping[str, float]) -> Row:
    key = hashlib.sha256(json.dumps([name, data_digest(dataset)]).encode()).hexdigest()[:32]
    return {"key": key, "data": dataset.name, "start": name, "phase": "floor", "test": dict(scores)}


def data_digest(dataset: Dataset) -> str:
    """sha256 in hex of the data set's repr: of every example, in order, one at a time."""
    digest = hashlib.sha256()
    for piece in _pieces(dataset):
        digest.update(piece.encode())
    return digest.hexdigest()


def _pieces(value: object) -> Iterator[str]:
    """repr(value), in parts."""
    if isinstance(value, Dataset | Example):
        named = [(f.name, getattr(value, f.name)) for f in fields(value)]
        told = [(name, one) for name, one in named if name in _FIRST_FIELDS or one]
        for i, (name, one) in enumerate(told):
            yield f"{', ' if i else type(value).__name__ + '('}{name}="
            yield from _pieces(one)
        yield ")"
    elif isinstance(value, tuple) and any(isinstance(one, Example) for one in value):
        for i, one in enumerate(value):
            yield ", " if i else "("
            yield from _pieces(one)
        yield ",)" if len(value) == 1 else ")"
    elif isinstance(value, dict) and any(isinstance(one, tuple) for one in value.values()):
        for i, (name, one) in enumerate(value.items()):
            yield f"{', ' if i else '{'}{name!r}: "
            yield from _pieces(one)
        yield "}"
    else:
        yield repr(value)


def markdown(dataset: Dataset, rows: Sequence[Row]) -> str:
    """Mean, least and greatest of each measure over the seeds, a line a start, and the floors below."""
    final = [row for row in rows if row["phase"] == "final"]
    names = sorted(final[0]["test"], key=lambda name: name != dataset.metric)
    lines = ["| start | seeds | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for split in ("test", *dataset.further):
        for start in dict.fromkeys(row["start"] for row in final):
            mine = [row[split] for row in final if row["start"] == start]
            told = {name: f"{mean:.4f} ({low:.4f} to {high:.4f})" for name, mean, low, high in summarised(mine)}
            shown = start if split == "test" else f"{start}, {split}"
            lines.append(f"| {shown} | {len(mine)} | " + " | ".join(told.get(name, "") for name in names) + " |")
    for row in rows:
        if row["phase"] == "floor":
            cells = (f"{row['test'][name]:.4f}" if name in row["test"] else "" for name in names)
            lines.append(f"| {row['start']} | | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def best_metric(dataset: Dataset, name: str) -> Dataset:
    """The data set, chosen and told by another measure; unchanged for "".

    Raises:
        DataError: no such measure of its kind.
    """
    known = list(floor(dataset)) if name else [""]
    if name and name not in known:
        raise DataError(f"{name!r} is not measured on {dataset.name}; choose one of {', '.join(known)}")
    return replace(dataset, metric=name) if name else dataset
