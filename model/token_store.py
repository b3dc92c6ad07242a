"""A corpus as token ids on disk: shards that are mapped rather than loaded, cut into chunks that fit a model."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pocketfed.model.corpus import UNKNOWN, CorpusError, Document
from pocketfed.model.tokenization import Tokenizer, Vocabulary

Ints = npt.NDArray[np.int64]
Tokens = npt.NDArray[np.integer]
SHARD_TOKENS = 1 << 26
INDEX = "index.json"
SPECIAL = 3  # [CLS] a [SEP] b [SEP]
HELD_OUT_SHARE, HELD_OUT_MOST = 0.05, 1000
_ENCODED_AT_ONCE = 4096  # sentences


@dataclass(frozen=True)
class Shard:
    """tokens: all sentences' ids, one after the other; sentence s is tokens[sentences[s] : sentences[s + 1]]."""

    tokens: Tokens
    sentences: Tokens


@dataclass(frozen=True)
class TokenCorpus:
    """Consecutive sentences of one document, as many as fit a model: the chunks.

    chunks: (N, 4) int64: shard, first sentence, the sentence after the last, document. max_length: of the model.
    """

    shards: tuple[Shard, ...]
    chunks: Ints
    max_length: int

    def __len__(self) -> int:
        return len(self.chunks)

    @property
    def lengths(self) -> Ints:
        """Tokens of each chunk, without special ones."""
        out = np.empty(len(self.chunks), np.int64)
        for number, shard in enumerate(self.shards):
            here = self.chunks[:, 0] == number
            out[here] = shard.sentences[self.chunks[here, 2]] - shard.sentences[self.chunks[here, 1]]
        return out

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    def sentences(self, chunk: int) -> list[Tokens]:
        number, first, end, _ = self.chunks[chunk]
        shard = self.shards[number]
        bounds = shard.sentences[first : end + 1]
        return [shard.tokens[a:b] for a, b in itertools.pairwise(bounds)]

    def select(self, indices: Ints) -> TokenCorpus:
        return TokenCorpus(self.shards, self.chunks[indices], self.max_length)


def store_corpus(
    documents: Iterable[Document], tokenizer: Tokenizer, folder: Path, max_length: int, shard_tokens: int = SHARD_TOKENS
) -> TokenCorpus:
    """Encode documents into a folder, made whole or not at all, and open it.

    Memory holds one shard, not the corpus: two bytes a token (four, of a vocabulary of more than 65,536), eight a sentence.

    A sentence longer than the model takes becomes several. What the corpus itself writes as `<unk>` becomes [UNK].

    Raises:
        CorpusError: nothing that could be encoded, or a folder that cannot be written.
    """
    folder = Path(folder)
    most = max(1, max_length - SPECIAL)
    kind = np.uint16 if len(tokenizer.vocabulary) <= 1 << 16 else np.uint32
    digest, shards, documents_seen = hashlib.sha256(), 0, 0
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            filling = _Filling(shards, kind, most)
            for document in _encoded(documents, tokenizer, most, digest):
                if document:
                    filling.add(document, documents_seen)
                    documents_seen += 1
                if len(filling.tokens) >= shard_tokens:
                    filling.write(work)
                    shards += 1
                    filling = _Filling(shards, kind, most)
            if filling.tokens:
                filling.write(work)
                shards += 1
            index = {
                "shards": shards,
                "max_length": max_length,
                "documents": documents_seen,
                "vocabulary": tokenizer.vocabulary.digest(),
                "text": digest.hexdigest(),
            }
            (work / INDEX).write_text(json.dumps(index) + "\n", encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(work, folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise CorpusError(
            f"the encoded corpus cannot be written to {folder}: {error.strerror}; free some space"
        ) from None
    corpus = open_corpus(folder, tokenizer.vocabulary)
    if not len(corpus):
        raise CorpusError("the corpus has no sentence of known tokens; give a vocabulary that covers it")
    return corpus


def open_corpus(folder: Path, vocabulary: Vocabulary) -> TokenCorpus:
    """
    Raises:
        CorpusError: no encoded corpus there, a damaged one, or one of another vocabulary.
    """
    try:
        index = json.loads((folder / INDEX).read_bytes())
        if index["vocabulary"] != vocabulary.digest():
            raise CorpusError(f"{folder} was encoded with another vocabulary; delete it, and it is encoded again")
        numbers = range(index["shards"])
        shards = tuple(
            Shard(_mapped(folder / f"{n:05}.tokens.npy"), _mapped(folder / f"{n:05}.sentences.npy")) for n in numbers
        )
        chunks = [_mapped(folder / f"{n:05}.chunks.npy") for n in numbers]
        return TokenCorpus(shards, np.concatenate([*chunks, np.empty((0, 4), np.int64)]), int(index["max_length"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, CorpusError):
            raise
        raise CorpusError(f"{folder} is not an encoded corpus ({error}); delete it, and it is encoded again") from None


def read_index(folder: Path) -> dict[str, object]:
    """What `store_corpus` wrote about a corpus: digests and counts; empty where there is none."""
    try:
        content = json.loads((Path(folder) / INDEX).read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def split_held_out(corpus: TokenCorpus, rng: np.random.Generator) -> tuple[TokenCorpus, TokenCorpus]:
    """Train on the first, measure on the second: 5 % of the chunks, at least one and at most 1,000.

    Raises:
        CorpusError: fewer than two chunks.
    """
    if len(corpus) < 2:
        raise CorpusError(f"the corpus encodes to {len(corpus)} pieces; at least 2 are needed, one to hold out")
    order = rng.permutation(len(corpus))
    count = int(min(HELD_OUT_MOST, max(1, round(HELD_OUT_SHARE * len(corpus)))))
    return corpus.select(np.sort(order[count:])), corpus.select(np.sort(order[:count]))


def _mapped(path: Path) -> npt.NDArray[np.integer]:
    return np.load(path, mmap_mode="r", allow_pickle=False)  # type: ignore[no-any-return]


def _encoded(
    documents: Iterable[Document], tokenizer: Tokenizer, most: int, digest: hashlib._Hash
) -> Iterator[list[list[int]]]:
    """Each document's sentences as ids, none longer than `most`."""
    waiting: list[Document] = []
    count = 0
    for document in documents:
        digest.update("\n".join(document).encode("utf-8", "surrogatepass") + b"\n\n")
        waiting.append(document)
        count += len(document)
        if count >= _ENCODED_AT_ONCE:
            yield from _encode_some(waiting, tokenizer, most)
            waiting, count = [], 0
    yield from _encode_some(waiting, tokenizer, most)


def _encode_some(documents: Sequence[Document], tokenizer: Tokenizer, most: int) -> Iterator[list[list[int]]]:
    sentences = [sentence for document in documents for sentence in document]
    parts = [sentence.split(UNKNOWN) for sentence in sentences]
    ids = iter(tokenizer.encode_plain([part for several in parts for part in several]))
    unknown = tokenizer.vocabulary.unk_id
    whole: list[list[int]] = []
    for several in parts:
        joined: list[int] = []
        for number in range(len(several)):
            joined += [unknown] * (number > 0) + next(ids)
        whole.append(joined)
    rest = iter(whole)
    for document in documents:
        rows = [row for row in (next(rest) for _ in document) if any(i != unknown for i in row)]
        yield [row[i : i + most] for row in rows for i in range(0, len(row), most)]


class _Filling:
    """A shard while it is filled, in packed numbers: a list of Python's would take 35 bytes a token."""

    def __init__(self, number: int, kind: type, most: int) -> None:
        self.number, self.kind, self.most = number, kind, most
        self.tokens = array("H" if kind is np.uint16 else "I")
        self.bounds = array("q", [0])  # of sentences, in tokens
        self.chunks = array("q")  # four numbers each

    def add(self, document: list[list[int]], place: int) -> None:
        """A document's sentences, and the chunks they make. place: its number in the corpus."""
        start = len(self.bounds) - 1
        filled = 0
        for sentence in document:
            at = len(self.bounds) - 1
            if filled + len(sentence) > self.most:
                self.chunks.extend((self.number, start, at, place))
                start, filled = at, 0
            filled += len(sentence)
            self.tokens.extend(sentence)
            self.bounds.append(len(self.tokens))
        self.chunks.extend((self.number, start, len(self.bounds) - 1, place))

    def write(self, folder: Path) -> None:
        chunks = np.frombuffer(self.chunks, np.int64).reshape(-1, 4)
        bounds = np.frombuffer(self.bounds, np.int64)
        tokens: Tokens = np.frombuffer(self.tokens, self.kind)
        for name, values in (("tokens", tokens), ("sentences", bounds), ("chunks", chunks)):
            np.save(folder / f"{self.number:05}.{name}.npy", values, allow_pickle=False)
