"""Files as tables: rows and columns of CSV, TSV, JSON, JSON lines and plain lines, as they stand there."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROW_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")
LINE_SUFFIXES = (".txt", ".tokens")


class DataError(ValueError):
    """Data that cannot be used; one sentence with the path and the remedy."""


@dataclass(frozen=True)
class Table:
    """Rows as they stand in a file, column names in lower case; `bad` counts those that could not even be split."""

    path: Path
    columns: tuple[str, ...]
    rows: list[dict[str, Any]]
    bad: Mapping[str, int] = field(default_factory=dict)


def decode(path: Path) -> str:
    """The file's text, without a byte order mark.

    Raises:
        DataError: unreadable, empty, or not UTF-8.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
    if not raw.strip():
        raise DataError(f"{path} is empty; give a file with at least one row")
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{path} is UTF-16; save it as UTF-8")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = raw[error.start]
        raise DataError(f"{path} is not UTF-8 (byte 0x{byte:02x} at offset {error.start}); save it as UTF-8") from None
    if raw.count(0) * 10 > len(raw):  # a stray NUL is removed from its text, but so many are UTF-16 or no text at all
        raise DataError(f"{path} is binary or UTF-16 ({raw.count(0)} NUL bytes); save it as UTF-8 text")
    return text


def _records(path: Path, content: str) -> list[list[str]]:
    """Cells of a CSV (quoted as by RFC 4180) or of a TSV (not quoted at all: in GLUE a quotation mark is just text)."""
    if path.suffix.lower() == ".tsv":
        return [line.rstrip("\r").split("\t") for line in content.split("\n") if line.strip("\r")]
    limit = csv.field_size_limit(2**31 - 1)  # the default refuses a field of 128 KiB; long texts are counted, not fatal
    try:
        try:
            return [r for r in csv.reader(io.StringIO(content, newline=""), strict=True) if r]
        except csv.Error as error:
            if "unexpected end of data" in str(error):
                raise DataError(f'{path} opens a quotation mark (") that is never closed; close or double it') from None
        return [r for r in csv.reader(io.StringIO(content, newline="")) if r]  # a lenient second try: "a"b is ab
    except csv.Error as error:
        raise DataError(f"{path} is not a CSV file ({error}); save it as UTF-8 CSV with commas") from None
    finally:
        csv.field_size_limit(limit)


def _delimited(path: Path) -> Table:
    records = _records(path, decode(path))
    first = records[0] if records else []
    if path.suffix.lower() == ".tsv" and len(first) == 4 and first[1] in ("0", "1") and first[2] in ("", "*"):
        header = ["source", "label", "acceptability mark", "sentence"]  # CoLA has no header
    else:
        header, records = [name.replace("\0", "").strip().lower() for name in first], records[1:]
    fitting = [dict(zip(header, r, strict=True)) for r in records if len(r) == len(header)]
    return Table(path, tuple(header), fitting, {"wrong number of columns": len(records) - len(fitting)})


def objects(path: Path, items: Iterable[Any], broken: int = 0) -> Table:
    rows: list[dict[str, Any]] = []
    for item in items:
        if isinstance(item, dict):
            rows.append({str(k).strip().lower(): v for k, v in item.items()})
        else:
            broken += 1
    return Table(path, tuple(dict.fromkeys(k for row in rows for k in row)), rows, {"not a JSON object": broken})


def _json_lines(path: Path) -> Table:
    items: list[Any] = []
    for line in decode(path).split("\n"):  # not splitlines(): U+2028 may stand inside a text
        if line.strip():
            try:
                items.append(json.loads(line))
            except (ValueError, RecursionError):
                items.append(None)
    return objects(path, items)


def json_document(path: Path) -> Any:
    content = decode(path)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}); if it has one object a line, name it .jsonl") from None


def read_table(path: Path) -> Table:
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return _delimited(path)
    if suffix in (".jsonl", ".ndjson"):
        return _json_lines(path)
    if suffix in LINE_SUFFIXES:
        lines = [{"text": line} for line in decode(path).split("\n") if line.strip()]
        return Table(path, ("text",), lines)
    if suffix == ".json":
        items = json_document(path)
        if isinstance(items, list):
            return objects(path, items)
        raise DataError(f'{path} holds no list of objects; give a list of {{"text": …, "label": …}}')
    known = ", ".join(ROW_SUFFIXES + LINE_SUFFIXES)
    shown = suffix or "(none)"
    raise DataError(f"{path} has the extension {shown}, which is not read; give one of {known}, or a folder")
