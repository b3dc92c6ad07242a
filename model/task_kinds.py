"""Reading a task of any kind: labels, numbers, out of scope, a tag for each word, answers in a passage."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pocketfed.model.task_files import DataError, decode, json_document
from pocketfed.model.task_layouts import read_splits
from pocketfed.model.tasks import LABELS, MAX_TEXT_CHARS, SCORES, Dataset, Example, read_dataset, read_scores

TASKS = ("classification", "intents", "oos:label", "oos:threshold", "regression", "slots", "tokens", "spans")
OUTSIDE = "oos"
_COLUMN_SUFFIXES = (".conll", ".bio", ".iob", ".iob2", ".iobes", ".txt")
_COLUMN_SPLITS: Mapping[str, tuple[str, ...]] = {
    "train": ("train", "eng.train"),
    "dev": ("dev", "valid", "validation", "val", "testa", "eng.testa"),
    "test": ("test", "testb", "eng.testb"),
}
_WORDS, _TAGS = ("tokens", "words"), ("tags", "ner_tags")
_Rows = Iterable[tuple[list[str], list[str]]]


def read_task(path: str | Path, task: str = "") -> Dataset:
    """A data set of whatever kind the file or folder is of.

    Besides what `read_dataset` reads: a column `score` (STS-B) is regression; columns of words and tags as CoNLL gives
    them, JSON rows of `tokens` and `tags`, and `seq.in` with `seq.out` are tags of words; SQuAD's JSON is answers in
    passages. Where data is good for several, `task` says which: one of TASKS.

    Raises:
        DataError: a path that holds nothing usable for the task; the sentence names it and the remedy.
    """
    path = Path(path)
    if task and task not in TASKS:
        raise DataError(f"there is no task {task!r}; choose one of {', '.join(TASKS)}")
    if not path.exists():
        raise DataError(f"{path} does not exist; give the path of a file or folder with examples")
    passages = _passage_files(path) if task in ("", "spans") else {}
    if task == "spans" and not passages:
        raise DataError(f'{path} holds no questions on passages; give a JSON file as SQuAD has it, with a list "data"')
    if passages:
        return _spans(path, passages)
    if task in ("slots", "tokens") or (not task and _column_files(path)):
        return _tokens(path, task)
    if not task or task == "regression":
        columns = read_splits(path, labelled=True)["train"].columns
        if not task and any(c in columns for c in _WORDS) and any(c in columns for c in _TAGS):
            return _tokens(path, task)
        if task or (any(c in columns for c in SCORES) and not any(c in columns for c in LABELS)):
            return read_scores(path)
    return _in_scope(read_dataset(path), task)


def _in_scope(dataset: Dataset, task: str) -> Dataset:
    """CLINC150 without its out-of-scope splits, with them as one label more, or with a threshold to be found."""
    beyond = {split: examples for split, examples in dataset.further.items() if split.startswith("oos_")}
    inside = {split: examples for split, examples in dataset.further.items() if split not in beyond}
    if not task.startswith("oos"):
        return replace(dataset, further=inside)
    parts = {split: beyond.get(f"oos_{split}", ()) for split in ("train", "dev", "test")}
    if not parts["test"] or not (parts["train"] if task == "oos:label" else parts["dev"]):
        raise DataError(
            f"{dataset.name} has no out-of-scope examples for {task}; give data with oos_train, oos_val, oos_test"
        )
    parts = {split: tuple(replace(e, label=OUTSIDE) for e in examples) for split, examples in parts.items()}
    whole = replace(
        dataset,
        dev=dataset.dev + parts["dev"],
        test=dataset.test + parts["test"],
        further=inside,
        outside=OUTSIDE,
        skipped={reason: n for reason, n in dataset.skipped.items() if not reason.startswith("split oos_")},
    )
    if task == "oos:threshold":
        return whole
    return replace(whole, train=dataset.train + parts["train"], labels=tuple(sorted({*dataset.labels, OUTSIDE})))


# --- tags of words --------------------------------------------------------------------------------------------------


def _column_files(path: Path) -> dict[str, Path]:
    if path.is_file():
        return {"train": path} if path.suffix.lower() in _COLUMN_SUFFIXES else {}
    found: dict[str, Path] = {}
    for split, names in _COLUMN_SPLITS.items():
        candidates = (path / f"{name}{suffix}" for name in names for suffix in ("", *_COLUMN_SUFFIXES))
        first = next((c for c in candidates if c.is_file()), None)
        if first is not None:
            found[split] = first
    return found if "train" in found else {}


def _tokens(path: Path, task: str) -> Dataset:
    skipped: Counter[str] = Counter()
    files = {} if task == "slots" else _column_files(path)
    if files:
        rows = {split: _columns(file, skipped) for split, file in files.items()}
    elif path.is_dir() and (path / "train" / "seq.out").is_file():
        rows = {
            split: _slots(path / name, skipped)
            for split, names in _COLUMN_SPLITS.items()
            for name in names
            if (path / name / "seq.out").is_file()
        }
    elif task == "slots":
        raise DataError(f"{path} has no train/seq.out; give a folder with seq.in and seq.out for each split")
    else:
        rows = {split: _listed(table.rows) for split, table in read_splits(path, labelled=True).items()}
    splits = {split: _tagged(some, skipped) for split, some in rows.items()}
    train = splits.get("train", ())
    if not train:
        reasons = ", ".join(f"{n} × {r}" for r, n in skipped.items()) or "it has no rows"
        raise DataError(f"{path} has no usable row of words and tags ({reasons}); give a word and its tag a line")
    tags = tuple(sorted({tag for e in train for tag in e.tags} | {"O"}))
    if len(tags) < 2:
        raise DataError(f"{path} has no tag but O; there is nothing to learn")
    source: Literal["given", "none"] = "given" if splits.get("test") else "none"
    # A tag that train does not have is missed in dev and test, not left out: the score is of every entity there is.
    return Dataset(
        path.resolve().name if path.is_dir() else path.stem,
        train,
        splits.get("dev", ()),
        splits.get("test", ()),
        tags,
        {reason: n for reason, n in skipped.items() if n},
        source,
        kind="tokens",
        metric="f1",
    )


def _columns(path: Path, skipped: Counter[str]) -> _Rows:
    """CoNLL's columns: a word a line, first the word and last its tag, an empty line after a sentence."""
    width = 0
    for block in re.split(r"\n[ \t\r]*\n", decode(path).strip("\n")):
        lines = [line.split() for line in block.split("\n") if line.strip() and not line.startswith("-DOCSTART-")]
        if not lines:
            continue
        width = width or len(lines[0])
        if width < 2:
            raise DataError(f"{path} has one column; give a word and its tag a line, with a space or tab between")
        if any(len(cells) != width for cells in lines):
            skipped["wrong number of columns"] += 1
            continue
        yield [cells[0] for cells in lines], [cells[-1] for cells in lines]


def _slots(folder: Path, skipped: Counter[str]) -> _Rows:
    texts, tags = (decode(folder / name).removesuffix("\n").split("\n") for name in ("seq.in", "seq.out"))
    if len(texts) != len(tags):
        raise DataError(
            f"{folder / 'seq.in'} has {len(texts)} lines and {folder / 'seq.out'} has {len(tags)}; they must match"
        )
    for text, marks in zip(texts, tags, strict=True):
        yield text.split(), marks.split()


def _listed(rows: Iterable[Mapping[str, Any]]) -> _Rows:
    for row in rows:
        words, tags = (next((row[name] for name in names if name in row), None) for names in (_WORDS, _TAGS))
        fits = all(isinstance(v, list) and all(isinstance(x, str) for x in v) for v in (words, tags))
        yield (words or [], tags or []) if fits else ([], ["not a list of texts"])


def _tagged(rows: _Rows, skipped: Counter[str]) -> tuple[Example, ...]:
    made: list[Example] = []
    for words, tags in rows:
        if len(words) != len(tags):
            skipped["not one tag for each word"] += 1
        elif not words:
            skipped["empty text"] += 1
        else:
            made.append(Example(" ".join(words), words=tuple(words), tags=tuple(tags)))
    return tuple(made)


# --- answers in passages --------------------------------------------------------------------------------------------


def _is_passages(document: object) -> bool:
    return isinstance(document, dict) and isinstance(document.get("data"), list)


def _passage_files(path: Path) -> dict[str, Any]:
    """The documents of a SQuAD file or folder, by split: `train*.json`, `dev*.json`, `test*.json`, or the only one."""
    files = [path] if path.is_file() else sorted(path.glob("*.json"))
    found = {
        file: document for file in files if file.suffix.lower() == ".json" and _is_passages(document := _peek(file))
    }
    if len(found) == 1:
        return {"train": next(iter(found.values()))}
    splits: dict[str, Any] = {}
    for file, document in found.items():
        split = next((s for s in ("train", "dev", "test") if file.name.lower().startswith(s)), None)
        if split in splits:
            raise DataError(f"{path} has several files for {split}; leave one of them")
        if split is not None:
            splits[split] = document
    return splits if "train" in splits else {}


def _peek(file: Path) -> object:
    """The document, where it may be SQuAD's: others are not parsed twice."""
    with open(file, "rb") as opened:
        if b'"data"' not in opened.read(4096) and b'"paragraphs"' not in opened.read(1 << 16):
            return None
    return json_document(file)


def _spans(path: Path, documents: Mapping[str, Any]) -> Dataset:
    skipped: Counter[str] = Counter()
    splits = {split: tuple(_questions(document, skipped)) for split, document in documents.items()}
    if not splits["train"]:
        reasons = ", ".join(f"{n} × {r}" for r, n in skipped.items()) or "it has no questions"
        raise DataError(f"{path} has no usable question ({reasons}); give paragraphs with a context and questions")
    source: Literal["given", "none"] = "given" if splits.get("test") else "none"
    return Dataset(
        path.resolve().name if path.is_dir() else path.stem,
        splits["train"],
        splits.get("dev", ()),
        splits.get("test", ()),
        (),
        dict(skipped),
        source,
        kind="spans",
        metric="f1",
    )


def _questions(document: Mapping[str, Any], skipped: Counter[str]) -> Iterable[Example]:
    for article in document["data"]:
        paragraphs = article.get("paragraphs") if isinstance(article, dict) else None
        if not isinstance(paragraphs, list):
            skipped["article without paragraphs"] += 1
            continue
        title = str(article.get("title") or "")
        for paragraph in paragraphs:
            context = paragraph.get("context") if isinstance(paragraph, dict) else None
            questions = paragraph.get("qas") if isinstance(paragraph, dict) else None
            if not isinstance(context, str) or not isinstance(questions, list):
                skipped["paragraph without context and questions"] += 1
                continue
            for question in questions:
                made = _question(question, context, title)
                if isinstance(made, str):
                    skipped[made] += 1
                else:
                    yield made


def _question(question: Any, context: str, title: str) -> Example | str:
    """An example, or what is wrong with it."""
    text = question.get("question") if isinstance(question, dict) else None
    if not isinstance(text, str) or not text.strip():
        return "empty text"
    if not context.strip():
        return "empty context"
    if max(len(text), len(context)) > MAX_TEXT_CHARS:
        return f"text over {MAX_TEXT_CHARS:,} characters"
    fields = {"id": str(question.get("id", "")), "title": title}
    given = question.get("answers")
    if question.get("is_impossible") is True or given == []:
        return Example(text.strip(), text_pair=context, fields=fields)
    if not isinstance(given, list):
        return "no list of answers"
    answers = tuple(
        (a["text"], a["answer_start"])
        for a in given
        if isinstance(a, dict)
        and isinstance(a.get("text"), str)
        and isinstance(a.get("answer_start"), int)
        and a["answer_start"] >= 0
        and a["text"].strip()
        and context.startswith(a["text"], a["answer_start"])
    )
    return (
        Example(text.strip(), text_pair=context, fields=fields, answers=answers)
        if answers
        else "answer not at its offset"
    )
