"""Reading what people have: labelled texts in files and folders of common layouts, and how right a guess is."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pocketfed.model.metrics import accuracy as accuracy
from pocketfed.model.task_files import DataError as DataError
from pocketfed.model.task_files import Table
from pocketfed.model.task_layouts import read_splits

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
    ("question", "passage"),
    ("#1 string", "#2 string"),
)
_TEXTS = ("text", "sentence", "utterance", "question")
LABELS = ("gold_label", "label", "category", "intent", "class", "quality", "is_duplicate")
SCORES = ("score", "similarity")
_USERS = ("user", "speaker")
# Columns that tell which task of GLUE or SuperGLUE it is, and what that is measured by.
_METRICS: Mapping[str, str] = {
    "acceptability mark": "matthews",
    "quality": "f1",
    "is_duplicate": "f1",
    "answer to": "f1a",
}
_Kind = Literal["texts", "classification", "regression"]


@dataclass(frozen=True)
class Example:
    """One text (or pair of texts); `fields` are the other columns, for a partition `by:COLUMN`.

    What is to be said of it depends on the kind of the data set: `label`; `score`; `tags`, one for each of `words`; or
    `answers`, (text, offset of its first character in `text_pair`), none where the passage has none.
    """

    text: str
    label: str | None = None
    text_pair: str | None = None
    user: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    score: float | None = None
    words: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    answers: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Dataset:
    """Three splits; `labels` (or tags) are those of train, sorted; `skipped` counts the rows left out, by reason.

    metric: what the task is usually told by. further: splits beside the three, such as MNLI's mismatched ones.
    outside: the label that stands for out of scope, where one of `labels` does.
    """

    name: str
    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    test: tuple[Example, ...]
    labels: tuple[str, ...]
    skipped: Mapping[str, int]
    test_source: Literal["given", "dev", "held out", "none"] = "given"
    kind: Literal["classification", "regression", "tokens", "spans"] = "classification"
    metric: str = "accuracy"
    further: Mapping[str, tuple[Example, ...]] = field(default_factory=dict)
    outside: str | None = None

    @property
    def reads_passages(self) -> bool:
        """Whether questions are asked about passages, several about each."""
        return self.kind == "spans" or any("answer to" in e.fields for e in self.train[:1])

    def with_test(self, fraction: float = 0.2, seed: int = 0) -> Dataset:
        """A data set that surely has a test; `test_source` says where it is from.

        Its own test, else dev (which is then no longer dev), else a seeded part of train: of each label `fraction`,
        rounded, but never the label's last example; of questions, those on that part of the passages; of choices, those of that
        part of the questions; of several answers to judge, those on that part of the passages.

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
        groups = [[[i] for i, e in enumerate(self.train) if e.label == label] for label in (None, *self.labels)]
        # Whole passages: a question is easier where another on its passage was learnt. And all choices of a question.
        together = [e.text_pair if self.reads_passages else e.fields.get("choice of") for e in self.train]
        if any(what is not None for what in together):
            wholes: dict[str | None, list[int]] = {}
            for i, what in enumerate(together):
                wholes.setdefault(what, []).append(i)
            groups = [list(wholes.values())]
        for mine in groups:
            wanted = min(len(mine) - 1, round(len(mine) * fraction))
            held |= {i for place in random.permutation(len(mine))[: max(wanted, 0)] for i in mine[place]}
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

    def with_fewer(self, count: int) -> Dataset:
        """At most so many training examples, evenly from first to last (files are often sorted by label); dev and test stay.

        Examples of multiple choice may lose some of their choices.
        """
        have = len(self.train)
        if count >= have:
            return self
        return replace(self, train=tuple(self.train[i * have // count] for i in range(count)))


# --- tables -> examples ---------------------------------------------------------------------------------------------


def _clean(value: Any) -> str | None:
    """A cell as text, None if it is no scalar: without NULs, and without lone surrogates, which UTF-8 cannot hold."""
    if isinstance(value, bool) or value is None:
        return "" if value is None else str(value).lower()
    if not isinstance(value, str | int | float):
        return None
    text = str(value).replace("\0", "")
    return text.strip() if text.isascii() else re.sub(r"[\ud800-\udfff]", "\ufffd", text).strip()


def _text_columns(table: Table) -> tuple[str, str | None]:
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


def _said(row: Mapping[str, Any], column: str | None, known: frozenset[str] | None) -> tuple[str, str | None]:
    """A row's label, and what is wrong with it."""
    value = _clean(row.get(column)) if column else ""
    if not value or (column == "gold_label" and value == "-"):  # "-": the annotators did not agree (SNLI)
        return "", "label is not a string" if value is None else "missing label"
    if len(value) > MAX_LABEL_CHARS:
        return "", f"label over {MAX_LABEL_CHARS} characters"
    return value, "label not in train" if known is not None and value not in known else None


def _number(row: Mapping[str, Any], column: str) -> tuple[float | None, str | None]:
    """A row's score, and what is wrong with it."""
    value = row.get(column)
    try:
        score = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        score = math.nan
    return (score, None) if math.isfinite(score) else (None, "score is not a number")


def _examples(table: Table, kind: _Kind, known: frozenset[str] | None, skipped: Counter[str]) -> tuple[Example, ...]:
    """The usable rows; the others are counted in `skipped`. `known` are the labels that may occur, None for any."""
    text, pair = _text_columns(table)
    label, user = _first(table.columns, LABELS), _first(table.columns, _USERS)
    if kind == "regression":
        label = _first(table.columns, (*SCORES, *LABELS))
    others = [c for c in table.columns if c not in (text, pair, label, user)]
    skipped.update({reason: count for reason, count in table.bad.items() if count})
    examples: list[Example] = []
    for row in table.rows:
        problem = _text_problem(row, text) or (_text_problem(row, pair) if pair else None)
        value, score = (_clean(row.get(label)) if label else "") or "", None
        if problem is None and kind == "classification":
            value, problem = _said(row, label, known)
        elif problem is None and kind == "regression":
            score, problem = _number(row, label or "")
        if problem is not None:
            skipped[problem] += 1
            continue
        cells = {c: _clean(row[c]) for c in others if c in row}
        examples.append(
            Example(
                text=_clean(row[text]) or "",
                label=None if kind == "regression" else value or None,
                text_pair=_clean(row[pair]) if pair else None,
                user=(_clean(row.get(user)) or None) if user else None,
                fields={c: v for c, v in cells.items() if v is not None},
                score=score,
            )
        )
    return tuple(examples)


def _check_labels(table: Table) -> None:
    if _first(table.columns, LABELS) is None:
        if "score" in table.columns:
            raise DataError(f"{table.path} is a regression task (its column is score); give data with a label column")
        found = ", ".join(c[:40] for c in table.columns[:12])
        raise DataError(f"{table.path} has no label column (found: {found}); name one of them label")


def _read(path: str | Path, kind: _Kind) -> Dataset:
    path = Path(path)
    tables = read_splits(path, labelled=kind != "texts")
    skipped: Counter[str] = Counter()
    first = tables["train"]
    _text_columns(first)
    said = {"texts": (), "classification": LABELS, "regression": (*SCORES, *LABELS)}[kind]
    if kind != "texts" and _first(first.columns, said) is None:
        _check_labels(first)
    train = _examples(first, kind, None, skipped)
    if not train:
        reasons = ", ".join(f"{n} × {r}" for r, n in skipped.items()) or "it has no rows"
        wanted = {"texts": "", "classification": " and a label", "regression": " and a score"}[kind]
        raise DataError(f"{first.path} has no usable row ({reasons}); add rows with a text{wanted}")
    labels = tuple(sorted({e.label for e in train if e.label is not None}))
    if kind == "classification" and len(labels) < 2:
        raise DataError(f"{first.path} has only the label {labels[0]!r}; a classifier needs at least two")
    others: dict[str, tuple[Example, ...]] = {"dev": (), "test": ()}
    for split, table in tables.items():
        if split == "train":
            continue
        if kind != "texts" and _first(table.columns, said) is None:  # GLUE keeps its test labels to itself
            skipped[f"{table.path.name} has no labels"] += len(table.rows)
        elif split.startswith("oos_"):  # their label is none of train's
            others[split] = _examples(table, kind, None, Counter())
        else:
            others[split] = _examples(table, kind, None if kind == "regression" else frozenset(labels), skipped)
    name = path.resolve().name if path.is_dir() else path.stem
    source: Literal["given", "none"] = "given" if others["test"] else "none"
    metric = next((m for column, m in _METRICS.items() if column in first.columns), "accuracy")
    return Dataset(
        name,
        train,
        others.pop("dev"),
        others.pop("test"),
        labels,
        dict(skipped),
        source,
        kind="regression" if kind == "regression" else "classification",
        metric="pearson" if kind == "regression" else metric,
        further=others,
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
    return _read(path, "classification" if labelled else "texts")


def read_scores(path: str | Path) -> Dataset:
    """Texts with a number each, in a column `score` (STS-B) or any that `read_dataset` takes for labels.

    Raises:
        DataError: as `read_dataset`.
    """
    return _read(path, "regression")


def read_texts(path: str | Path) -> list[str]:
    """The training texts of what `read_dataset` reads, labelled or not, and of text files with one text a line.

    Both texts of a pair are given, one after the other.

    Raises:
        DataError: as `read_dataset`, but for labels.
    """
    return [text for e in _read(path, "texts").train for text in (e.text, e.text_pair) if text]


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
