"""Text without labels, read as documents of sentences: plain text, JSONL, CSV and TSV, streamed file by file."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import mmap
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

TEXT_SUFFIXES = (".txt", ".text", ".tokens", ".in")  # .in: the seq.in files of intent data sets
TABLE_SUFFIXES = (".csv", ".tsv")
JSON_SUFFIXES = (".jsonl", ".ndjson")
TEXT_COLUMNS = ("text", "sentence")
LEAST_SENTENCES = 20  # below this there is nothing to hold out, and nothing to learn
MOST_SENTENCES = 2000  # of a document; a longer one, as a book is, becomes several, so that memory stays bounded
LOOKED_AT = 400  # lines from which a text file's layout is told
PROSE = 1.3  # sentences a line from which on lines are taken for paragraphs
MEMORY_SLOTS = 1 << 21  # of the table of lines already seen: 16 MB; a larger one lies in a file
UNKNOWN = "<unk>"  # what WikiText writes for rare words

Document = tuple[str, ...]  # its sentences

_HEADING = re.compile(r"\s*=+ .* =+\s*")
_WIKITEXT_JOINS = re.compile(r" @([-,.])@ ")
_ENDS = re.compile(r"[.!?…][\"'”’)\]]*$")
_BREAK = re.compile(r"([.!?…][\"'”’)\]]*)\s+(?=[\"'“‘(\[]*\s?[A-Z0-9À-Þ<])")
_ABBREVIATIONS = frozenset(
    (
        "mr",
        "mrs",
        "ms",
        "dr",
        "st",
        "prof",
        "sr",
        "jr",
        "rev",
        "hon",
        "col",
        "gen",
        "lieut",
        "capt",
        "sgt",
        "vs",
        "etc",
        "no",
        "vol",
        "fig",
        "jan",
        "feb",
        "mar",
        "apr",
        "jun",
        "jul",
        "aug",
        "sep",
        "sept",
        "oct",
        "nov",
        "dec",
        "e.g",
        "i.e",
        "cf",
        "al",
        "mt",
        "ft",
        "co",
        "inc",
        "ltd",
        "messrs",
        "mme",
        "mlle",
    )
)


class CorpusError(ValueError):
    """Text that nothing can be pre-trained on."""


def read_documents(paths: Sequence[Path]) -> Iterator[Document]:
    """Documents in a fixed order: a record of a table or of JSONL, a line of a file of utterances, or prose.

    A text file is prose if its lines hold several sentences (each line a paragraph) or blank lines part them; WikiText's
    headings part documents. Otherwise each line is a document of its own, and comes once. A document longer than
    MOST_SENTENCES becomes several. Sentences of one word are left out: they teach nothing about context.

    Raises:
        CorpusError: nothing there, no readable text, or fewer than LEAST_SENTENCES sentences in all.
    """
    if not paths:
        raise CorpusError("no corpus was given; name a text file or a folder of .txt, .jsonl, .csv or .tsv files")
    count, seen = 0, _Seen()
    for file in itertools.chain.from_iterable(_files(Path(path)) for path in paths):
        for document in _documents(file):
            sentences = tuple(s for s in document if " " in s)
            if len(sentences) == 1 and not seen.add(sentences[0]):  # an utterance may be there many times
                continue
            count += len(sentences)
            if sentences:
                yield sentences
    if count < LEAST_SENTENCES:
        named = ", ".join(str(p) for p in paths)
        raise CorpusError(
            f"{named} holds {count} distinct sentences of two words or more; pre-training needs at least "
            f"{LEAST_SENTENCES}"
        )


def describe_files(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Name (from the folder that was given), bytes and SHA-256 of each file of a corpus, in the order of reading.

    Raises:
        CorpusError: nothing there, or a file that cannot be read.
    """
    found = []
    for path in map(Path, paths):
        for file in _files(path):
            name = file.name if file == path else f"{path.resolve().name}/{file.relative_to(path).as_posix()}"
            try:
                with file.open("rb") as stream:
                    digest = hashlib.file_digest(stream, "sha256").hexdigest()
                    found.append({"name": name, "bytes": stream.tell(), "sha256": digest})
            except OSError as error:
                raise CorpusError(f"{file} cannot be read: {error.strerror}; check its permissions") from None
    return found


class _Seen:
    """Which lines have been there: their digests of 64 bits, in a table with open addressing (Knuth, vol. 3, section 6.4).

    A table of more than MEMORY_SLOTS lies in a temporary file that is mapped, 11 to 22 bytes a line, so that a corpus may hold
    more lines than memory would. Of 100 million lines the chance is one in 3,700 that two differ and share a digest.
    """

    def __init__(self) -> None:
        self._bits, self._count = 12, 0
        self._slots = _zeros(1 << self._bits)

    def add(self, line: str) -> bool:
        """Whether it is new."""
        digest = hashlib.blake2b(line.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        key = int.from_bytes(digest, "big") or 1  # 0 is an empty slot
        if not self._put(key):
            return False
        self._count += 1
        if 4 * self._count > 3 * len(self._slots):
            before, self._bits = self._slots, self._bits + 1
            self._slots = _zeros(1 << self._bits)
            for held in before:  # in the order of their slots, old and new alike: a file is gone through once
                if held:
                    self._put(held)
        return True

    def _put(self, key: int) -> bool:
        slots, at = self._slots, key >> 64 - self._bits
        while slots[at]:
            if slots[at] == key:
                return False
            at = (at + 1) % len(slots)
        slots[at] = key
        return True


def _zeros(slots: int) -> memoryview:
    """So many empty slots of 64 bits, in memory or in a file that is gone when they are.

    Raises:
        CorpusError: no room for the file.
    """
    if slots <= MEMORY_SLOTS:
        return memoryview(bytearray(8 * slots)).cast("Q")
    try:
        with tempfile.TemporaryFile() as file:
            for _ in range(slots // MEMORY_SLOTS):  # written out: a hole that finds no room later would end the process
                file.write(bytes(8 * MEMORY_SLOTS))
            file.flush()
            return memoryview(mmap.mmap(file.fileno(), 8 * slots)).cast("Q")
    except OSError as error:
        raise CorpusError(
            f"the table of lines already read needs {8 * slots:,} bytes in {tempfile.gettempdir()}: {error.strerror}; free some "
            "space, or point TMPDIR elsewhere"
        ) from None


def split_sentences(text: str) -> list[str]:
    """Sentences of a paragraph: cut after . ! ? before a capital or a digit, but not after a title or an initial.

    >>> split_sentences("Dr. J. Watson came at 8.30 p.m. He was late! “Why?” asked 2 of us.")
    ['Dr. J. Watson came at 8.30 p.m.', 'He was late!', '“Why?” asked 2 of us.']
    """
    sentences, start = [], 0
    for found in _BREAK.finditer(text):
        word = text[start : found.start()].rsplit(None, 1)[-1:] or [""]
        bare = word[0].lstrip("\"'“‘([").lower()
        initial = len(bare) == 1 and bare.isalpha() and word[0].strip("\"'“‘([").isupper() and bare != "i"
        if found[1].startswith(".") and (bare in _ABBREVIATIONS or initial):
            continue
        sentences.append(text[start : found.end(1)])
        start = found.end()
    sentences.append(text[start:])
    return [s for s in (" ".join(s.split()) for s in sentences) if s]


def corpus_digest(documents: Iterable[Document]) -> str:
    """SHA-256 of the sentences, so that a model card says what a model has read without holding it."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update("\n".join(document).encode("utf-8", "surrogatepass") + b"\n\n")
    return digest.hexdigest()


def corpus_files(paths: Sequence[Path]) -> list[Path]:
    """All files that `read_documents` would read, in its order.

    Raises:
        CorpusError: nothing there.
    """
    return [file for path in paths for file in _files(Path(path))]


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise CorpusError(f"the corpus {path} does not exist; check the path")
    suffixes = TEXT_SUFFIXES + TABLE_SUFFIXES + JSON_SUFFIXES
    found = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in suffixes)
    if not found:
        raise CorpusError(f"the folder {path} holds no text; put files ending in {', '.join(suffixes)} there")
    return found


def _documents(file: Path) -> Iterator[list[str]]:
    suffix = file.suffix.lower()
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            if suffix in JSON_SUFFIXES:
                yield from _records(_json_texts(file, stream))
            elif suffix in TABLE_SUFFIXES:
                yield from _records(_table_texts(file, stream))
            else:
                yield from _text_documents(_text_lines(file, stream))
    except UnicodeDecodeError:
        raise CorpusError(f"{file} is not UTF-8 text; convert it, or leave it out of the corpus") from None
    except OSError as error:
        raise CorpusError(f"{file} cannot be read: {error.strerror}; check its permissions") from None


def _records(texts: Iterable[str]) -> Iterator[list[str]]:
    for text in texts:
        sentences = [s for line in text.splitlines() for s in split_sentences(line)]
        for start in range(0, len(sentences), MOST_SENTENCES):
            yield sentences[start : start + MOST_SENTENCES]


def _text_lines(file: Path, stream: TextIO) -> Iterator[str]:
    for line in stream:
        if "\0" in line:
            raise CorpusError(f"{file} holds NUL bytes, so it is not text; leave it out of the corpus")
        yield from line.splitlines() or [""]


def _text_documents(lines: Iterator[str]) -> Iterator[list[str]]:
    first = list(itertools.islice(lines, LOOKED_AT))
    filled = [line for line in first if line.strip() and not _HEADING.fullmatch(line)]
    everything = itertools.chain(first, lines)
    if sum(len(split_sentences(line)) for line in filled) > PROSE * len(filled):
        return _prose(everything, wrapped=False)
    if len(filled) < len("\n".join(first).strip().splitlines()):  # blank lines between, not after
        return _prose(everything, wrapped=True)
    return ([" ".join(line.split())] for line in everything)


def _prose(lines: Iterable[str], wrapped: bool) -> Iterator[list[str]]:
    """wrapped: a line that does not end a sentence goes on in the next one, until a blank line."""
    sentences: list[str] = []
    open_line = ""

    def closed() -> None:
        nonlocal open_line
        sentences.extend(split_sentences(_WIKITEXT_JOINS.sub(r"\1", open_line)))
        open_line = ""

    for line in lines:
        heading = bool(_HEADING.fullmatch(line))
        if heading or not line.strip() or not wrapped:
            closed()
        if heading and sentences:
            yield sentences
            sentences = []
        if heading:
            continue
        open_line = f"{open_line} {line}" if open_line else line
        if _ENDS.search(line.rstrip()):
            closed()
        if len(sentences) >= MOST_SENTENCES:
            yield sentences
            sentences = []
    closed()
    if sentences:
        yield sentences


def _json_texts(file: Path, stream: TextIO) -> Iterator[str]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            raise CorpusError(f'{file}, line {number} is not JSON; write one object with "text" a line') from None
        text = value.get("text", value.get("sentence")) if isinstance(value, dict) else None
        if not isinstance(text, str):
            raise CorpusError(f'{file}, line {number} has no "text"; write one object with "text" a line')
        yield text


def _table_texts(file: Path, stream: TextIO) -> Iterator[str]:
    tabs = file.suffix.lower() == ".tsv"
    # In a TSV a quotation mark is a character like any other; in a CSV it may hold a line break.
    shape = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"delimiter": ","}
    rows = csv.reader(stream, **shape)
    try:
        header = [name.strip().lower() for name in next(rows, [])]
        column = next((header.index(name) for name in TEXT_COLUMNS if name in header), None)
        if column is None:
            raise CorpusError(f"{file} has no column named text; its columns are {', '.join(header) or 'none'}")
        for row in rows:
            if len(row) > column:
                yield row[column]
    except csv.Error as error:
        raise CorpusError(f"{file} is not a table: {error}; save it as CSV with a column named text") from None
