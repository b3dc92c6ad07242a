"""Folders as tables of splits: the layouts in which data sets are given away."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pocketfed.model.superglue import reshaped
from pocketfed.model.task_files import (
    LINE_SUFFIXES,
    ROW_SUFFIXES,
    DataError,
    Table,
    decode,
    json_document,
    read_table,
)

_SPLITS: Mapping[str, tuple[str, ...]] = {
    "train": ("train",),
    "dev": ("dev", "valid", "validation", "val", "dev_matched"),
    "test": ("test", "test_matched"),
}
_FURTHER: Mapping[str, tuple[str, ...]] = {"mismatched": ("dev_mismatched",)}  # MNLI's other genres
_LOOKED_FOR = (
    "train.csv|tsv|jsonl|json (with dev|valid|test), msr_paraphrase_train.txt, train/seq.in with train/label, "
    "data_full.json, train/*.txt of speaker|text|basic|general|full"
)


def _first_existing(candidates: Iterable[Path], ok: Callable[[Path], bool]) -> Path | None:
    """The only candidate there is.

    Raises:
        DataError: more than one, so that it is unclear which is meant.
    """
    found = [c for c in candidates if ok(c)]
    if len(found) > 1:
        names = " and ".join(c.name for c in found)
        raise DataError(f"{found[0].parent} has both {names}; leave one of them")
    return found[0] if found else None


def _split_files(folder: Path, suffixes: Sequence[str]) -> dict[str, Table]:
    """`train.*`, `dev|valid|validation|val.*`, `test.*`: plain files and most of GLUE."""
    found = {
        split: _first_existing((folder / f"{n}{s}" for n in names for s in suffixes), Path.is_file)
        for split, names in {**_SPLITS, **_FURTHER}.items()
    }
    return {split: read_table(path) for split, path in found.items() if path is not None} if found["train"] else {}


def _split_folders(folder: Path, ok: Callable[[Path], bool]) -> dict[str, Path]:
    found = {s: _first_existing((folder / n for n in names), ok) for s, names in _SPLITS.items()}
    return {split: path for split, path in found.items() if path is not None} if found["train"] else {}


def _mrpc(folder: Path) -> dict[str, Table]:
    """MRPC as Microsoft gives it: dev is the part of train whose two ids stand in `dev_ids.tsv`."""
    train_path, ids_path, test_path = (
        folder / name for name in ("msr_paraphrase_train.txt", "dev_ids.tsv", "msr_paraphrase_test.txt")
    )

    def read(path: Path) -> Table:
        lines = [line.rstrip("\r").split("\t") for line in decode(path).split("\n") if line.strip()]
        header = [name.lower() for name in lines[0]]
        rows = [dict(zip(header, r, strict=True)) for r in lines[1:] if len(r) == len(header)]
        return Table(path, tuple(header), rows, {"wrong number of columns": len(lines) - 1 - len(rows)})

    train = read(train_path)
    tables = {"train": train}
    if ids_path.is_file():
        ids = {tuple(line.split()) for line in decode(ids_path).splitlines()}
        is_dev = [(row.get("#1 id"), row.get("#2 id")) in ids for row in train.rows]
        tables["train"] = replace(train, rows=[r for r, dev in zip(train.rows, is_dev, strict=True) if not dev])
        tables["dev"] = replace(train, rows=[r for r, dev in zip(train.rows, is_dev, strict=True) if dev], bad={})
    if test_path.is_file():
        tables["test"] = read(test_path)
    return tables


def _seq_in(folder: Path) -> Table:
    """`seq.in` and `label`, line by line (SNIPS, ATIS as slot-filling papers give them)."""
    texts, labels = (decode(folder / name).removesuffix("\n").split("\n") for name in ("seq.in", "label"))
    if len(texts) != len(labels):
        raise DataError(
            f"{folder / 'seq.in'} has {len(texts)} lines and {folder / 'label'} has {len(labels)}; they must match"
        )
    rows = [{"text": t, "label": y} for t, y in zip(texts, labels, strict=True)]
    return Table(folder / "seq.in", ("text", "label"), rows)


def _dialogue(folder: Path) -> Table:
    """MRDA: one file a meeting, `speaker|text|basic|general|full` a line; the label is the basic act."""
    columns = ("speaker", "text", "label", "general", "full")
    rows: list[dict[str, Any]] = []
    bad = 0
    for path in sorted(folder.glob("*.txt")):
        cells = [line.rstrip("\r").split("|") for line in decode(path).split("\n") if line.strip()]
        rows += [{**dict(zip(columns, c, strict=True)), "meeting": path.stem} for c in cells if len(c) == 5]
        bad += sum(len(c) != 5 for c in cells)
    return Table(folder, (*columns, "meeting"), rows, {"wrong number of columns": bad})


def _is_dialogue(folder: Path) -> bool:
    first = next(iter(sorted(folder.glob("*.txt"))), None)
    return first is not None and decode(first).split("\n", 1)[0].count("|") == 4


def _json_splits(path: Path) -> dict[str, Table]:
    """{split: [[text, label], …]} (CLINC150); other splits, such as out-of-scope ones, are counted and left out.

    A `domains.json` ({domain: [label, …]}) beside it becomes the field `domain`.
    """
    document = json_document(path)
    if not isinstance(document, dict) or not isinstance(document.get("train"), list):
        raise DataError(f'{path} has no list "train"; give {{"train": [[text, label], …], "test": …}}')
    domains_path = path.parent / "domains.json"
    domains = json_document(domains_path) if domains_path.is_file() else {}
    domain_of = {y: name for name, labels in domains.items() for y in labels} if isinstance(domains, dict) else {}
    tables: dict[str, Table] = {}
    for split, names in _SPLITS.items():
        items = next((document[n] for n in names if isinstance(document.get(n), list)), None)
        if items is None:
            continue
        pairs = [i for i in items if isinstance(i, list) and len(i) == 2]
        rows = [
            {"text": t, "label": y} | ({"domain": domain_of[y]} if isinstance(y, str) and y in domain_of else {})
            for t, y in pairs
        ]
        bad = {"not a pair of text and label": len(items) - len(pairs)}
        tables[split] = Table(path, ("text", "label", "domain"), rows, bad)
    known = {n for names in _SPLITS.values() for n in names}
    left_out = {f"split {k}": len(v) for k, v in document.items() if k not in known and isinstance(v, list)}
    tables["train"] = replace(tables["train"], bad={**tables["train"].bad, **left_out})
    for split, names in _SPLITS.items():  # CLINC150's out-of-scope texts, under names of their own
        items = next((document[f"oos_{n}"] for n in names if isinstance(document.get(f"oos_{n}"), list)), [])
        rows = [{"text": i[0], "label": i[1]} for i in items if isinstance(i, list) and len(i) == 2]
        if rows:
            tables[f"oos_{split}"] = Table(path, ("text", "label"), rows)
    return tables


def _folder(folder: Path, labelled: bool) -> dict[str, Table]:
    if (folder / "msr_paraphrase_train.txt").is_file():
        return _mrpc(folder)
    tables = _split_files(folder, ROW_SUFFIXES if labelled else ROW_SUFFIXES + LINE_SUFFIXES)
    if tables:
        return tables
    if (folder / "data_full.json").is_file():
        return _json_splits(folder / "data_full.json")
    folders = _split_folders(folder, lambda p: (p / "seq.in").is_file() and (p / "label").is_file())
    if folders:
        return {split: _seq_in(path) for split, path in folders.items()}
    folders = _split_folders(folder, lambda p: p.is_dir() and _is_dialogue(p))
    if folders:
        return {split: _dialogue(path) for split, path in folders.items()}
    raise DataError(f"{folder} has none of the known layouts; looked for {_LOOKED_FOR}")


def read_splits(path: Path, labelled: bool) -> dict[str, Table]:
    """The tables of a file or folder by split; `train` is always there."""
    return {split: reshaped(table) for split, table in _splits(path, labelled).items()}


def _splits(path: Path, labelled: bool) -> dict[str, Table]:
    if path.is_dir():
        return _folder(path, labelled)
    if not path.exists():
        raise DataError(f"{path} does not exist; give the path of a file or folder with texts")
    if path.suffix.lower() == ".json" and isinstance(json_document(path), dict):
        return _json_splits(path)
    return {"train": read_table(path)}
