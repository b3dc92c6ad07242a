"""What a distillation starts from: its settings, its vocabulary and its text, each read and checked once."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocketfed.model.config import ConfigError, MobileBertConfig, any_preset

if TYPE_CHECKING:  # torch takes seconds to import
    from pocketfed.model.schedules import Schedule
    from pocketfed.model.token_store import TokenCorpus
    from pocketfed.model.tokenization import Vocabulary

VOCABULARY, TEXT, ENCODED = "vocabulary.json", "text.json", "corpus"  # in a work folder
FileStates = list[list[object]]  # path, bytes and time of change of each file of a corpus


@dataclasses.dataclass(frozen=True)
class Settings:
    """A preset with what was set otherwise. student: its vocabulary and what depends on it are still the preset's."""

    student: MobileBertConfig
    teacher: Mapping[str, Any]
    schedule: Schedule
    vocabulary: Path | None


def read_settings(preset: str, overrides: Mapping[str, Any], steps: int | None, teacher: Path | None) -> Settings:
    """
    Raises:
        ConfigError, DistillationError: a setting that is not there, or a value that it cannot have.
    """
    from pocketfed.model.schedules import schedule_for

    ours, teachers, changes, vocabulary = _sorted_overrides(overrides)
    student, schedule = any_preset(preset).with_changes(**ours), schedule_for(preset)
    if teacher is not None and teachers:
        key = next(iter(teachers))
        raise ConfigError(
            f"teacher.{key} is set and the teacher is given; a trained teacher is what it is, so leave one out"
        )
    known = [f.name for f in dataclasses.fields(schedule)]
    unknown = next((name for name in changes if name not in known), None)
    if unknown is not None:
        raise ConfigError(f"there is no setting 'schedule.{unknown}'; there are {', '.join(known)}")
    schedule = dataclasses.replace(schedule, **changes)
    if steps is not None:
        taught_first = teacher is None and schedule.strategy != "none"
        schedule = schedule.scaled(steps, student.num_hidden_layers, taught_first)
    return Settings(student, teachers, schedule, vocabulary)


def _sorted_overrides(
    overrides: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], Path | None]:
    """Overrides by what they change: student, teacher, schedule, vocabulary. Texts are read as JSON where they are."""
    known = {f.name for f in dataclasses.fields(MobileBertConfig)}
    student: dict[str, Any] = {}
    teacher: dict[str, Any] = {}
    schedule: dict[str, Any] = {}
    vocabulary: Path | None = None
    for key, value in overrides.items():
        part, _, name = key.rpartition(".")
        if key == "vocabulary":
            vocabulary = Path(str(value))
        elif part == "schedule":
            schedule[name] = _value(value)
        elif part in ("", "teacher") and name in known:
            (teacher if part else student)[name] = _value(value)
        else:
            raise ConfigError(f"there is no setting {key!r}; set KEY, teacher.KEY, schedule.KEY or vocabulary")
    return student, teacher, schedule, vocabulary


def _value(text: Any) -> Any:
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def named_vocabulary(path: Path, given: Vocabulary | None, teacher: Path | None) -> Vocabulary:
    """The one in a file; where the teacher brings one, they must be the same.

    Raises:
        ConfigError: no such file, or not the teacher's. VocabularyError: not a vocabulary.
    """
    from pocketfed.model.tokenization import load_vocabulary

    try:
        vocabulary = load_vocabulary(path)
    except FileNotFoundError as error:
        raise ConfigError(str(error)) from None
    if given is not None and vocabulary != given:
        raise ConfigError(
            f"{path} is not the vocabulary of {teacher}, whose teacher would read other words; leave it out"
        )
    return vocabulary


def trained_vocabulary(paths: Sequence[Path], size: int, work: Path) -> Vocabulary:
    """One trained on the text; it is kept in `work` and taken from there as long as the files are the same.

    Raises:
        CorpusError: text that cannot be read, or a folder that cannot be written. VocabularyError: no word in it.
    """
    from pocketfed.model import corpus, tokenization

    asked = {"files": _states(paths), "size": size}
    held = _read(work / VOCABULARY)
    if {key: held.get(key) for key in asked} == asked:
        return tokenization.Vocabulary(tuple(held["tokens"]), held["lower_case"])
    sentences = (sentence for document in corpus.read_documents(paths) for sentence in document)
    vocabulary = tokenization.train_vocabulary(sentences, size)
    _write(work / VOCABULARY, {**asked, "lower_case": vocabulary.lower_case, "tokens": list(vocabulary.tokens)})
    return vocabulary


def encoded_text(
    paths: Sequence[Path], vocabulary: Vocabulary, work: Path, length: int
) -> tuple[TokenCorpus, dict[str, Any]]:
    """The text as tokens, encoded into `work` unless it lies there, and what it is; unchanged files are not read again.

    Raises:
        CorpusError: text that cannot be read or encoded, or a folder that cannot be written.
    """
    from pocketfed.model import token_store
    from pocketfed.model.corpus import corpus_digest, describe_files, read_documents
    from pocketfed.model.tokenization import Tokenizer

    folder, states = work / ENCODED, _states(paths)
    index, read = token_store.read_index(folder), _read(work / TEXT)
    fits = index.get("vocabulary") == vocabulary.digest() and index.get("max_length") == length
    text = read.get("text") if read.get("files") == states else None
    if fits and index["text"] == (text or corpus_digest(read_documents(paths))):
        tokens = token_store.open_corpus(folder, vocabulary)
    else:
        tokens = token_store.store_corpus(read_documents(paths), Tokenizer(vocabulary), folder, length)
        index = token_store.read_index(folder)
    described = read["described"] if text and "described" in read else describe_files(paths)
    _write(work / TEXT, {"files": states, "text": index["text"], "described": described})
    found = {"documents": index["documents"], "tokens": tokens.tokens, "sha256": index["text"]}
    return tokens, {**found, "files": described}


def _states(paths: Sequence[Path]) -> FileStates:
    from pocketfed.model.corpus import corpus_files

    files = [file.resolve() for file in corpus_files(paths)]
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """Whole or not at all, and not where it says so already: each process of several comes here."""
    from pocketfed.model.corpus import CorpusError

    if _read(path) == content:
        return
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(content) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise CorpusError(
            f"{path} cannot be written: {error.strerror}; free some space, or use another folder"
        ) from None
