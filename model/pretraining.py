"""Text without labels, made into masked batches (Devlin et al. 2019, section 3.1)."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from pocketfed.model.teacher import PreTrainingModel
from pocketfed.model.tokenization import Tokenizer, Vocabulary

Ints = npt.NDArray[np.int64]
TEXT_SUFFIXES = (".txt", ".text", ".tokens", ".in")  # .in: the seq.in files of intent data sets
TABLE_SUFFIXES = (".csv", ".tsv")
JSON_SUFFIXES = (".jsonl", ".ndjson")
TEXT_COLUMNS = ("text", "sentence")
LEAST_LINES = 20  # below this there is nothing to hold out, and nothing to learn
HELD_OUT_SHARE, HELD_OUT_MOST = 0.05, 1000
MASK_SHARE = 0.15


class CorpusError(ValueError):
    """Text that nothing can be pre-trained on."""


# ---- reading -------------------------------------------------------------------------------------------------------


def read_corpus(paths: Sequence[Path]) -> tuple[str, ...]:
    """The distinct lines of files and folders, in a fixed order: plain text, JSONL with `text`, CSV/TSV with `text`.

    A line is a sentence; one of a single word teaches nothing about context and is left out.

    Raises:
        CorpusError: nothing there, no readable text, or too little of it.
    """
    if not paths:
        raise CorpusError("no corpus was given; name a text file or a folder of .txt, .jsonl, .csv or .tsv files")
    lines: dict[str, None] = {}
    for path in paths:
        for file in _files(Path(path)):
            for line in _lines(file):
                text = " ".join(line.split())
                if " " in text:
                    lines[text] = None
    if len(lines) < LEAST_LINES:
        named = ", ".join(str(p) for p in paths)
        raise CorpusError(
            f"{named} holds {len(lines)} distinct lines of two words or more; pre-training needs at least {LEAST_LINES}"
        )
    return tuple(lines)


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


def _lines(file: Path) -> Iterator[str]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise CorpusError(f"{file} is not UTF-8 text; convert it, or leave it out of the corpus") from None
    except OSError as error:
        raise CorpusError(f"{file} cannot be read: {error.strerror}; check its permissions") from None
    if "\0" in text:
        raise CorpusError(f"{file} holds NUL bytes, so it is not text; leave it out of the corpus")
    suffix = file.suffix.lower()
    if suffix in JSON_SUFFIXES:
        return _json_lines(file, text)
    if suffix in TABLE_SUFFIXES:
        return _table_lines(file, text)
    return iter(text.splitlines())


def _json_lines(file: Path, text: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            raise CorpusError(f'{file}, line {number} is not JSON; write one object with "text" a line') from None
        sentence = value.get("text", value.get("sentence")) if isinstance(value, dict) else None
        if not isinstance(sentence, str):
            raise CorpusError(f'{file}, line {number} has no "text"; write one object with "text" a line')
        yield from sentence.splitlines()


def _table_lines(file: Path, text: str) -> Iterator[str]:
    tabs = file.suffix.lower() == ".tsv"
    # In a TSV a quotation mark is a character like any other; in a CSV it may hold a line break.
    shape = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"delimiter": ","}
    rows = csv.reader(io.StringIO(text, newline=""), **shape)
    try:
        header = [name.strip().lower() for name in next(rows, [])]
        column = next((header.index(name) for name in TEXT_COLUMNS if name in header), None)
        if column is None:
            raise CorpusError(f"{file} has no column named text; its columns are {', '.join(header) or 'none'}")
        for row in rows:
            if len(row) > column:
                yield from row[column].splitlines()
    except csv.Error as error:
        raise CorpusError(f"{file} is not a table: {error}; save it as CSV with a column named text") from None


def corpus_digest(lines: Sequence[str]) -> str:
    """SHA-256 of the lines, so that a model card says what a model has read without holding it."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


# ---- tokens --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenCorpus:
    """Encoded lines of unequal length: line i is tokens[offsets[i] : offsets[i + 1]]."""

    tokens: npt.NDArray[np.int32]
    offsets: Ints

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Ints:
        return np.diff(self.offsets)

    def rows(self, indices: Ints, pad_id: int) -> tuple[Ints, Ints]:
        """Lines as ids and mask, each (B, T) with T the longest of them."""
        lengths = self.lengths[indices]
        mask = (np.arange(lengths.max())[None, :] < lengths[:, None]).astype(np.int64)
        ids = np.full(mask.shape, pad_id, np.int64)
        ids[mask == 1] = np.concatenate([self.tokens[self.offsets[i] : self.offsets[i + 1]] for i in indices])
        return ids, mask

    def select(self, indices: Ints) -> TokenCorpus:
        pieces = [self.tokens[self.offsets[i] : self.offsets[i + 1]] for i in indices]
        return _ragged(pieces)


def _ragged(pieces: Sequence[npt.NDArray[np.int32]]) -> TokenCorpus:
    offsets = np.concatenate([[0], np.cumsum([len(p) for p in pieces])]).astype(np.int64)
    return TokenCorpus(np.concatenate([*pieces, np.empty(0, np.int32)]).astype(np.int32), offsets)


def encode_corpus(tokenizer: Tokenizer, lines: Sequence[str], max_length: int) -> TokenCorpus:
    """Lines as token ids with `[CLS]` and `[SEP]`; a line too long for the model becomes several."""
    most = max(1, (max_length - 2) * 3 // 4)  # words a piece: WordPiece makes about 4 tokens of 3 words
    texts: list[str] = []
    for line in lines:
        words = line.split()
        texts.extend(" ".join(words[i : i + most]) for i in range(0, len(words), most))
    pieces: list[npt.NDArray[np.int32]] = []
    for start in range(0, len(texts), 1024):
        ids, mask = tokenizer.encode(texts[start : start + 1024], max_length=max_length)
        pieces.extend(row[: int(n)].astype(np.int32) for row, n in zip(ids, mask.sum(1), strict=True))
    return _ragged([p for p in pieces if len(p) > 2])  # more than [CLS] and [SEP]


def split_held_out(corpus: TokenCorpus, rng: np.random.Generator) -> tuple[TokenCorpus, TokenCorpus]:
    """Train on the first, measure on the second: 5 % of the lines, at least one and at most 1,000.

    Raises:
        CorpusError: fewer than two lines.
    """
    if len(corpus) < 2:
        raise CorpusError(f"the corpus encodes to {len(corpus)} lines; at least 2 are needed, one to hold out")
    order = rng.permutation(len(corpus))
    count = int(min(HELD_OUT_MOST, max(1, round(HELD_OUT_SHARE * len(corpus)))))
    return corpus.select(np.sort(order[count:])), corpus.select(np.sort(order[:count]))


# ---- batches -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MaskedBatch:
    """input_ids, attention_mask: (B, T) int64; chosen: (B, T) bool, the M positions to predict; targets: (M,) int64."""

    input_ids: Tensor
    attention_mask: Tensor
    chosen: Tensor
    targets: Tensor


def mask_tokens(
    ids: Ints, mask: Ints, vocabulary: Vocabulary, rng: np.random.Generator
) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Hide 15 % of each row's ordinary tokens, at least one: 80 % become [MASK], 10 % a random token, 10 % stay.

    Returns the new ids and which positions were chosen, both (B, T).
    """
    special = [vocabulary.pad_id, vocabulary.unk_id, vocabulary.cls_id, vocabulary.sep_id, vocabulary.mask_id]
    candidates = (mask == 1) & ~np.isin(ids, special)
    available = candidates.sum(1)
    wanted = np.minimum(available, np.maximum(1, np.rint(MASK_SHARE * available)))
    draw = np.where(candidates, rng.random(ids.shape), 2.0)
    rank = draw.argsort(1, kind="stable").argsort(1, kind="stable")
    chosen = rank < wanted[:, None]
    fate = rng.random(ids.shape)
    ordinary = np.setdiff1d(np.arange(len(vocabulary.tokens)), special)
    replaced = rng.choice(ordinary, ids.shape) if len(ordinary) else ids
    hidden = np.where(fate < 0.8, vocabulary.mask_id, np.where(fate < 0.9, replaced, ids))
    return np.where(chosen, hidden, ids), chosen


def masked_batch(corpus: TokenCorpus, indices: Ints, vocabulary: Vocabulary, rng: np.random.Generator) -> MaskedBatch:
    ids, mask = corpus.rows(indices, vocabulary.pad_id)
    hidden, chosen = mask_tokens(ids, mask, vocabulary, rng)
    return MaskedBatch(
        torch.from_numpy(hidden), torch.from_numpy(mask), torch.from_numpy(chosen), torch.from_numpy(ids[chosen])
    )


def epoch(lengths: Ints, batch_size: int, rng: np.random.Generator) -> list[Ints]:
    """Each line once, in batches of similar length and random order: little padding, and no order to learn from."""
    order = rng.permutation(len(lengths))
    batches: list[Ints] = []
    for start in range(0, len(order), batch_size * 32):
        pool = order[start : start + batch_size * 32]
        pool = pool[lengths[pool].argsort(kind="stable")]
        batches.extend(pool[i : i + batch_size] for i in range(0, len(pool), batch_size))
    return [batches[i] for i in rng.permutation(len(batches))]


def masked_batches(
    corpus: TokenCorpus, vocabulary: Vocabulary, batch_size: int, rng: np.random.Generator
) -> Iterator[MaskedBatch]:
    """Epoch after epoch, without end; each with masks of its own."""
    while True:
        for indices in epoch(corpus.lengths, batch_size, rng):
            batch = masked_batch(corpus, indices, vocabulary, rng)
            if len(batch.targets):
                yield batch


@dataclass(frozen=True)
class MaskedScore:
    """Cross-entropy in nats a hidden token, and the share of them guessed right."""

    loss: float
    accuracy: float
    tokens: int


@torch.no_grad()
def score_masked(model: PreTrainingModel, corpus: TokenCorpus, vocabulary: Vocabulary, seed: int = 0) -> MaskedScore:
    """How well a model guesses hidden tokens; the same seed hides the same ones, so that models compare.

    Raises:
        CorpusError: no token that could be hidden.
    """
    training = model.training
    model.eval()
    rng = np.random.default_rng(seed)
    loss, right, total = 0.0, 0, 0
    order = corpus.lengths.argsort(kind="stable")
    for start in range(0, len(order), 64):
        batch = masked_batch(corpus, order[start : start + 64], vocabulary, rng)
        if not len(batch.targets):
            continue
        logits = model(batch.input_ids, batch.attention_mask, batch.chosen).float()
        loss += float(F.cross_entropy(logits, batch.targets, reduction="sum"))
        right += int((logits.argmax(-1) == batch.targets).sum())
        total += len(batch.targets)
    model.train(training)
    if not total:
        raise CorpusError("the held-out lines hold no token of the vocabulary; give a corpus the vocabulary covers")
    return MaskedScore(loss / total, right / total, total)
