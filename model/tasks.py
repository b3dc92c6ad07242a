"""Reading what people have: labelled texts in files and folders of common layouts, and how right a guess is."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

MAX_TEXT_CHARS = 1_000_000  # a longer text is skipped; shorter ones are kept whole, truncation is the tokenizer's
MAX_LABEL_CHARS = 200  # labels travel in every manifest

# Column names, lower case, the first that is present wins. Pairs come first: QNLI has both `question` and `sentence`.
_PAIRS = (
    ("text", "text_pair"),
    ("sentence", "text_pair"),
    ("sentence1", "sentence2"),
    ("text_a", "text_b"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("#1 string", "#2 string"),
)
_TEXTS = ("text", "sentence", "utterance", "question")
_LABELS = ("label", "category", "intent", "class", "quality")
_USERS = ("user", "speaker")
_SPLITS: Mapping[str, tuple[str, ...]] = {
    "train": ("train",),
    "dev": ("dev", "valid", "validation", "val"),
    "test": ("test",),
}
_ROW_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")
_LINE_SUFFIXES = (".txt", ".tokens")
_LOOKED_FOR = (
    "train.csv|tsv|jsonl|json (with dev|valid|test), msr_paraphrase_train.txt, train/seq.in with train/label, "
    "data_full.json, train/*.txt of speaker|text|basic|general|full"
)
_T = TypeVar("_T")


class DataError(ValueError):
    """Data that cannot be used; one sentence with the path and the remedy."""


@dataclass(frozen=True)
class Example:
    """One text (or pair of texts); `fields` are the other columns, for a partition `by:COLUMN`."""

    text: str
    label: str | None = None
    text_pair: str | None = None
    user: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Dataset:
    """Three splits; `labels` are those of train, sorted; `skipped` counts the rows left out, by reason."""

    name: str
    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    test: tuple[Example, ...]
    labels: tuple[str, ...]
    skipped: Mapping[str, int]
    test_source: Literal["given", "dev", "held out", "none"] = "given"

    def with_test(self, fraction: float = 0.2, seed: int = 0) -> Dataset:
        """A data set that surely has a test; `test_source` says where it is from.

        Its own test, else dev (which is then no longer dev), else a seeded part of train: of each label `fraction`,
        rounded, but never the label's last example.

        Raises:
            DataError: a fraction not between 0 and 1, or too few examples to hold one out.
        """
        if not 0 < fraction < 1:
            raise DataError(f"a test fraction of {fraction} holds out nothing or all; choose one between 0 and 1")
        if self.test:
            return self
        if self.dev:
            return replace(self, dev=(), test=self.dev, test_source="dev")
        random = np.random.Generator(np.random.PCG64(seed))
        held: set[int] = set()
        for label in (None, *self.labels):
            mine = [i for i, e in enumerate(self.train) if e.label == label]
            wanted = min(len(mine) - 1, round(len(mine) * fraction))
            held |= {mine[i] for i in random.permutation(len(mine))[: max(wanted, 0)]}
        if not held:
            raise DataError(
                f"{self.name} has {len(self.train)} training examples, too few to hold out {fraction:.0%}; "
                "add a test file"
            )
        return replace(
            self,
            train=tuple(e for i, e in enumerate(self.train) if i not in held),
            test=tuple(self.train[i] for i in sorted(held)),
            test_source="held out",
        )


# --- files -> tables ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Table:
    """Rows as they stand in a file, column names in lower case; `bad` counts those that could not even be split."""

    path: Path
    columns: tuple[str, ...]
    rows: list[dict[str, Any]]
    bad: Mapping[str, int] = field(default_factory=dict)


def _decode(path: Path) -> str:
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


def _delimited(path: Path) -> _Table:
    records = _records(path, _decode(path))
    first = records[0] if records else []
    if path.suffix.lower() == ".tsv" and len(first) == 4 and first[1] in ("0", "1") and first[2] in ("", "*"):
        header = ["source", "label", "mark", "sentence"]  # CoLA has no header
    else:
        header, records = [name.replace("\0", "").strip().lower() for name in first], records[1:]
    fitting = [dict(zip(header, r, strict=True)) for r in records if len(r) == len(header)]
    return _Table(path, tuple(header), fitting, {"wrong number of columns": len(records) - len(fitting)})


def _objects(path: Path, items: Iterable[Any], broken: int = 0) -> _Table:
    rows: list[dict[str, Any]] = []
    for item in items:
        if isinstance(item, dict):
            rows.append({str(k).strip().lower(): v for k, v in item.items()})
        else:
            broken += 1
    return _Table(path, tuple(dict.fromkeys(k for row in rows for k in row)), rows, {"not a JSON object": broken})


def _json_lines(path: Path) -> _Table:
    items: list[Any] = []
    for line in _decode(path).split("\n"):  # not splitlines(): U+2028 may stand inside a text
        if line.strip():
            try:
                items.append(json.loads(line))
            except (ValueError, RecursionError):
                items.append(None)
    return _objects(path, items)


def _json_document(path: Path) -> Any:
    content = _decode(path)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}); if it has one object a line, name it .jsonl") from None


def _table(path: Path) -> _Table:
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return _delimited(path)
    if suffix in (".jsonl", ".ndjson"):
        return _json_lines(path)
    if suffix in _LINE_SUFFIXES:
        lines = [{"text": line} for line in _decode(path).split("\n") if line.strip()]
        return _Table(path, ("text",), lines)
    if suffix == ".json":
        items = _json_document(path)
        if isinstance(items, list):
            return _objects(path, items)
        raise DataError(f'{path} holds no list of objects; give a list of {{"text": …, "label": …}}')
    known = ", ".join(_ROW_SUFFIXES + _LINE_SUFFIXES)
    shown = suffix or "(none)"
    raise DataError(f"{path} has the extension {shown}, which is not read; give one of {known}, or a folder")


# --- folders -> tables of splits ------------------------------------------------------------------------------------


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


def _split_files(folder: Path, suffixes: Sequence[str]) -> dict[str, _Table]:
    """`train.*`, `dev|valid|validation|val.*`, `test.*`: plain files and most of GLUE."""
    found = {
        split: _first_existing((folder / f"{n}{s}" for n in names for s in suffixes), Path.is_file)
        for split, names in _SPLITS.items()
    }
    return {split: _table(path) for split, path in found.items() if path is not None} if found["train"] else {}


def _split_folders(folder: Path, ok: Callable[[Path], bool]) -> dict[str, Path]:
    found = {s: _first_existing((folder / n for n in names), ok) for s, names in _SPLITS.items()}
    return {split: path for split, path in found.items() if path is not None} if found["train"] else {}


def _mrpc(folder: Path) -> dict[str, _Table]:
    """MRPC as Microsoft gives it: dev is the part of train whose two ids stand in `dev_ids.tsv`."""
    train_path, ids_path, test_path = (
        folder / name for name in ("msr_paraphrase_train.txt", "dev_ids.tsv", "msr_paraphrase_test.txt")
    )

    def read(path: Path) -> _Table:
        lines = [line.rstrip("\r").split("\t") for line in _decode(path).split("\n") if line.strip()]
        header = [name.lower() for name in lines[0]]
        rows = [dict(zip(header, r, strict=True)) for r in lines[1:] if len(r) == len(header)]
        return _Table(path, tuple(header), rows, {"wrong number of columns": len(lines) - 1 - len(rows)})

    train = read(train_path)
    tables = {"train": train}
    if ids_path.is_file():
        ids = {tuple(line.split()) for line in _decode(ids_path).splitlines()}
        is_dev = [(row.get("#1 id"), row.get("#2 id")) in ids for row in train.rows]
        tables["train"] = replace(train, rows=[r for r, dev in zip(train.rows, is_dev, strict=True) if not dev])
        tables["dev"] = replace(train, rows=[r for r, dev in zip(train.rows, is_dev, strict=True) if dev], bad={})
    if test_path.is_file():
        tables["test"] = read(test_path)
    return tables


def _seq_in(folder: Path) -> _Table:
    """`seq.in` and `label`, line by line (SNIPS, ATIS as slot-filling papers give them)."""
    texts, labels = (_decode(folder / name).removesuffix("\n").split("\n") for name in ("seq.in", "label"))
    if len(texts) != len(labels):
        raise DataError(
            f"{folder / 'seq.in'} has {len(texts)} lines and {folder / 'label'} has {len(labels)}; they must match"
        )
    rows = [{"text": t, "label": y} for t, y in zip(texts, labels, strict=True)]
    return _Table(folder / "seq.in", ("text", "label"), rows)


def _dialogue(folder: Path) -> _Table:
    """MRDA: one file a meeting, `speaker|text|basic|general|full` a line; the label is the basic act."""
    columns = ("speaker", "text", "label", "general", "full")
    rows: list[dict[str, Any]] = []
    bad = 0
    for path in sorted(folder.glob("*.txt")):
        cells = [line.rstrip("\r").split("|") for line in _decode(path).split("\n") if line.strip()]
        rows += [{**dict(zip(columns, c, strict=True)), "meeting": path.stem} for c in cells if len(c) == 5]
        bad += sum(len(c) != 5 for c in cells)
    return _Table(folder, (*columns, "meeting"), rows, {"wrong number of columns": bad})


def _is_dialogue(folder: Path) -> bool:
    first = next(iter(sorted(folder.glob("*.txt"))), None)
    return first is not None and _decode(first).split("\n", 1)[0].count("|") == 4


def _json_splits(path: Path) -> dict[str, _Table]:
    """{split: [[text, label], …]} (CLINC150); other splits, such as out-of-scope ones, are counted and left out.

    A `domains.json` ({domain: [label, …]}) beside it becomes the field `domain`.
    """
    document = _json_document(path)
    if not isinstance(document, dict) or not isinstance(document.get("train"), list):
        raise DataError(f'{path} has no list "train"; give {{"train": [[text, label], …], "test": …}}')
    domains_path = path.parent / "domains.json"
    domains = _json_document(domains_path) if domains_path.is_file() else {}
    domain_of = {y: name for name, labels in domains.items() for y in labels} if isinstance(domains, dict) else {}
    tables: dict[str, _Table] = {}
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
        tables[split] = _Table(path, ("text", "label", "domain"), rows, bad)
    known = {n for names in _SPLITS.values() for n in names}
    left_out = {f"split {k}": len(v) for k, v in document.items() if k not in known and isinstance(v, list)}
    tables["train"] = replace(tables["train"], bad={**tables["train"].bad, **left_out})
    return tables


def _folder(folder: Path, labelled: bool) -> dict[str, _Table]:
    if (folder / "msr_paraphrase_train.txt").is_file():
        return _mrpc(folder)
    tables = _split_files(folder, _ROW_SUFFIXES if labelled else _ROW_SUFFIXES + _LINE_SUFFIXES)
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


def _tables(path: Path, labelled: bool) -> dict[str, _Table]:
    if path.is_dir():
        return _folder(path, labelled)
    if not path.exists():
        raise DataError(f"{path} does not exist; give the path of a file or folder with texts")
    if path.suffix.lower() == ".json" and isinstance(_json_document(path), dict):
        return _json_splits(path)
    return {"train": _table(path)}


# --- tables -> examples ---------------------------------------------------------------------------------------------


def _clean(value: Any) -> str | None:
    """A cell as text, None if it is no scalar: without NULs, and without lone surrogates, which UTF-8 cannot hold."""
    if isinstance(value, bool) or value is None:
        return "" if value is None else str(value).lower()
    if not isinstance(value, str | int | float):
        return None
    text = str(value).replace("\0", "")
    return text.strip() if text.isascii() else re.sub(r"[\ud800-\udfff]", "\ufffd", text).strip()


def _text_columns(table: _Table) -> tuple[str, str | None]:
    for one, two in _PAIRS:
        if one in table.columns and two in table.columns:
            return one, two
    for name in _TEXTS:
        if name in table.columns:
            return name, None
    found = ", ".join(c[:40] or "(unnamed)" for c in table.columns[:12]) or "none"
    raise DataError(f"{table.path} has no text column (found: {found}); name one of them text or sentence")


def _first(columns: Sequence[str], names: Sequence[str]) -> str | None:
    return next((n for n in names if n in columns), None)


def _text_problem(row: Mapping[str, Any], column: str) -> str | None:
    value = row.get(column)
    if value is not None and not isinstance(value, str):
        return f"{column} is not a string"
    text = _clean(value)
    if not text:
        return "empty text"
    return f"text over {MAX_TEXT_CHARS:,} characters" if len(text) > MAX_TEXT_CHARS else None


def _examples(
    table: _Table, labelled: bool, known: frozenset[str] | None, skipped: Counter[str]
) -> tuple[Example, ...]:
    """The usable rows; the others are counted in `skipped`. `known` are the labels that may occur, None for any."""
    text, pair = _text_columns(table)
    label, user = _first(table.columns, _LABELS), _first(table.columns, _USERS)
    others = [c for c in table.columns if c not in (text, pair, label, user)]
    skipped.update({reason: count for reason, count in table.bad.items() if count})
    examples: list[Example] = []
    for row in table.rows:
        problem = _text_problem(row, text) or (_text_problem(row, pair) if pair else None)
        value = _clean(row.get(label)) if label else ""
        if problem is None and labelled:
            if not value:
                problem = "missing label" if value == "" else "label is not a string"
            elif len(value) > MAX_LABEL_CHARS:
                problem = f"label over {MAX_LABEL_CHARS} characters"
            elif known is not None and value not in known:
                problem = "label not in train"
        if problem is not None:
            skipped[problem] += 1
            continue
        cells = {c: _clean(row[c]) for c in others if c in row}
        examples.append(
            Example(
                text=_clean(row[text]) or "",
                label=value or None,
                text_pair=_clean(row[pair]) if pair else None,
                user=(_clean(row.get(user)) or None) if user else None,
                fields={c: v for c, v in cells.items() if v is not None},
            )
        )
    return tuple(examples)


def _check_labels(table: _Table) -> None:
    if _first(table.columns, _LABELS) is None:
        if "score" in table.columns:
            raise DataError(f"{table.path} is a regression task (its column is score); give data with a label column")
        found = ", ".join(c[:40] for c in table.columns[:12])
        raise DataError(f"{table.path} has no label column (found: {found}); name one of them label")


def _read(path: str | Path, labelled: bool) -> Dataset:
    path = Path(path)
    tables = _tables(path, labelled)
    skipped: Counter[str] = Counter()
    _text_columns(tables["train"])
    if labelled:
        _check_labels(tables["train"])
    train = _examples(tables["train"], labelled, None, skipped)
    if not train:
        reasons = ", ".join(f"{n} × {r}" for r, n in skipped.items()) or "it has no rows"
        raise DataError(
            f"{tables['train'].path} has no usable row ({reasons}); add rows with a text"
            + (" and a label" if labelled else "")
        )
    labels = tuple(sorted({e.label for e in train if e.label is not None}))
    if labelled and len(labels) < 2:
        raise DataError(f"{tables['train'].path} has only the label {labels[0]!r}; a classifier needs at least two")
    others: dict[str, tuple[Example, ...]] = {"dev": (), "test": ()}
    for split in others:
        table = tables.get(split)
        if table is None:
            continue
        if labelled and _first(table.columns, _LABELS) is None:  # GLUE keeps its test labels to itself
            skipped[f"{table.path.name} has no labels"] += len(table.rows)
        else:
            others[split] = _examples(table, labelled, frozenset(labels), skipped)
    name = path.resolve().name if path.is_dir() else path.stem
    return Dataset(
        name, train, others["dev"], others["test"], labels, dict(skipped), "given" if others["test"] else "none"
    )


def read_dataset(path: str | Path, labelled: bool = True) -> Dataset:
    """Labelled texts from a file or folder.

    A CSV (RFC 4180), TSV (no quoting), JSONL or JSON file with a column `text` (or sentence, utterance, question;
    pairs: text + text_pair, sentence1 + sentence2, text_a + text_b, question1 + question2, premise + hypothesis),
    `label` (or category, intent, class) and, optionally, `user` (or speaker); a folder with `train.*`,
    `dev|valid|validation|val.*`, `test.*` of those; a classification folder of GLUE; a folder with `train/seq.in` and
    `train/label`; CLINC150's `data_full.json`; MRDA's folders of meetings. UTF-8. Rows that cannot be used are counted
    in `skipped` by reason.

    Raises:
        DataError: a path that holds nothing usable; the sentence names it and the remedy.
    """
    return _read(path, labelled)


def read_texts(path: str | Path) -> list[str]:
    """The training texts of what `read_dataset` reads, labelled or not, and of text files with one text a line.

    Both texts of a pair are given, one after the other.

    Raises:
        DataError: as `read_dataset`, but for labels.
    """
    return [text for e in _read(path, labelled=False).train for text in (e.text, e.text_pair) if text]


def accuracy(predicted: Sequence[_T], expected: Sequence[_T]) -> float:
    """The share of guesses that are right.

    >>> accuracy(["a", "b", "b", "c"], ["a", "b", "c", "c"])
    0.75
    """
    if len(predicted) != len(expected) or not len(expected):
        raise ValueError(f"{len(predicted)} predictions for {len(expected)} labels; give as many, and at least one")
    return sum(bool(p == e) for p, e in zip(predicted, expected, strict=True)) / len(expected)


def majority_accuracy(dataset: Dataset) -> float:
    """Test accuracy of always saying train's most frequent label (the first in order, of several).

    Raises:
        DataError: no test examples, or no labels.
    """
    counts = Counter(e.label for e in dataset.train)
    if not dataset.test or not dataset.labels:
        raise DataError(f"{dataset.name} has no labelled test examples; call with_test() first")
    guess = max(dataset.labels, key=lambda label: counts[label])  # max keeps the first of equals
    return accuracy([guess] * len(dataset.test), [e.label for e in dataset.test])
