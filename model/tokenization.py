"""WordPiece: vocabularies, their training, and the reference tokenizer.

The rules are BERT's (Devlin et al. 2019): clean, split off Chinese characters and punctuation, and for a lower-case
vocabulary decompose, strip accents and lower; then the longest known piece first.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_WORD_CHARS = 100  # a longer word is [UNK], as in BERT
PREFIX = "##"  # marks a piece that continues a word

Ids = NDArray[np.int64]


class VocabularyError(ValueError):
    """A vocabulary that no text can be tokenized with."""


@dataclass(frozen=True)
class Vocabulary:
    """WordPiece tokens in id order.

    Args:
        lower_case: text is lowered and stripped of accents before look-up.

    Raises:
        VocabularyError: a special token missing, `[PAD]` not first, a token empty, doubled or not UTF-8.
    """

    tokens: tuple[str, ...]
    lower_case: bool = True

    def __post_init__(self) -> None:
        if not self.tokens:
            raise VocabularyError("the vocabulary is empty; give one token per line, [PAD] first")
        seen: dict[str, int] = {}
        for i, token in enumerate(self.tokens):
            if not token:
                raise VocabularyError(f"token {i} is empty; delete that line or give it a token")
            if token in seen:
                raise VocabularyError(f"token {token!r} has ids {seen[token]} and {i}; keep one of them")
            if any(0xD800 <= ord(c) < 0xE000 for c in token):
                raise VocabularyError(f"token {i}, {token!r}, holds half a surrogate pair; store it as UTF-8")
            seen[token] = i
        for special in SPECIAL_TOKENS:
            if special not in seen:
                raise VocabularyError(f"the vocabulary has no {special}; it needs {' '.join(SPECIAL_TOKENS)}")
        if self.tokens[0] != "[PAD]":
            raise VocabularyError(f"token 0 is {self.tokens[0]!r}; [PAD] must come first")

    def __len__(self) -> int:
        return len(self.tokens)

    @functools.cached_property
    def ids(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.tokens)}

    @property
    def pad_id(self) -> int:
        return self.ids["[PAD]"]

    @property
    def unk_id(self) -> int:
        return self.ids["[UNK]"]

    @property
    def cls_id(self) -> int:
        return self.ids["[CLS]"]

    @property
    def sep_id(self) -> int:
        return self.ids["[SEP]"]

    @property
    def mask_id(self) -> int:
        return self.ids["[MASK]"]

    def digest(self) -> str:
        """sha256 in hex of the tokens and `lower_case`."""
        content = json.dumps([self.lower_case, *self.tokens])
        return hashlib.sha256(content.encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Writes `vocab.txt`, one token per line, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
                file.write("\n".join(self.tokens) + "\n")
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise


def load_vocabulary(path: Path) -> Vocabulary:
    """From a `vocab.txt`, a `tokenizer.json` that holds a BERT WordPiece model, or a folder with either.

    A `vocab.txt` cannot say whether it is lower-case: a `tokenizer_config.json` beside it does (`do_lower_case`), else
    it is unless one of its tokens has a capital.

    Raises:
        FileNotFoundError: nothing there.
        VocabularyError: not such a file, or not a usable vocabulary.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in ("tokenizer.json", "vocab.txt") if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{path} holds neither tokenizer.json nor vocab.txt; put one of them there")
        path = found[0]
    if not path.is_file():
        raise FileNotFoundError(f"there is no vocabulary at {path}; give a vocab.txt, a tokenizer.json or their folder")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            return _from_tokenizer_json(json.loads(text))
        config = path.with_name("tokenizer_config.json")
        stated = json.loads(config.read_text(encoding="utf-8")).get("do_lower_case") if config.is_file() else None
        tokens = tuple(text.removesuffix("\n").split("\n")) if text else ()
        return Vocabulary(tokens, not _has_capitals(tokens) if stated is None else bool(stated))
    except UnicodeDecodeError as error:
        raise VocabularyError(f"{path} is not UTF-8 at byte {error.start}; save it as UTF-8") from error
    except json.JSONDecodeError as error:
        raise VocabularyError(f"{path} or its tokenizer_config.json is not JSON ({error}); fetch it again") from error
    except VocabularyError as error:
        raise VocabularyError(f"{path}: {error}") from None


def _has_capitals(tokens: Iterable[str]) -> bool:
    return any(t != t.lower() for t in tokens if not (t.startswith("[") and t.endswith("]")))


def _from_tokenizer_json(content: Any) -> Vocabulary:
    sections = content if isinstance(content, dict) else {}
    model, normalizer = sections.get("model") or {}, sections.get("normalizer") or {}
    lower_case = bool(normalizer.get("lowercase", True))
    strips = normalizer.get("strip_accents")
    expected: list[tuple[str, object, object]] = [
        ("model.type", model.get("type"), "WordPiece"),
        ("normalizer.type", normalizer.get("type"), "BertNormalizer"),
        ("model.continuing_subword_prefix", model.get("continuing_subword_prefix", PREFIX), PREFIX),
        ("model.max_input_chars_per_word", model.get("max_input_chars_per_word", MAX_WORD_CHARS), MAX_WORD_CHARS),
        ("model.unk_token", model.get("unk_token", "[UNK]"), "[UNK]"),
        ("normalizer.clean_text", normalizer.get("clean_text", True), True),
        ("normalizer.handle_chinese_chars", normalizer.get("handle_chinese_chars", True), True),
        ("normalizer.strip_accents", lower_case if strips is None else strips, lower_case),
    ]
    for name, value, needed in expected:
        if value != needed:
            raise VocabularyError(f"{name} is {value!r}; only BERT's WordPiece is supported, where it is {needed!r}")
    by_id = sorted((i, token) for token, i in model.get("vocab", {}).items())
    if [i for i, _ in by_id] != list(range(len(by_id))):
        raise VocabularyError("the ids in model.vocab are not 0, 1, 2, …; number them without gaps")
    return Vocabulary(tuple(token for _, token in by_id), lower_case)


def train_vocabulary(texts: Iterable[str], size: int) -> Vocabulary:
    """A lower-case WordPiece vocabulary of at most `size` tokens; the same texts give the same one, in any order.

    Characters come first, at most a quarter of `size` (rarer ones become `[UNK]`), then merges by frequency.

    Raises:
        VocabularyError: no text, or no room for the special tokens and a merge.
    """
    if size < 2 * len(SPECIAL_TOKENS):
        raise VocabularyError(f"a vocabulary of {size} tokens is too small; ask for at least {2 * len(SPECIAL_TOKENS)}")
    normalizer, splitter = bert_rules(lower_case=True)
    words: Counter[str] = Counter()
    for text in texts:
        words.update(piece for piece, _ in splitter.pre_tokenize_str(normalizer.normalize_str(_encodable(text))))
    if not words:
        raise VocabularyError("there is no text to train a vocabulary on; give at least one sentence")
    pieces: Counter[str] = Counter()
    for word, count in words.items():
        for i, char in enumerate(word[:MAX_WORD_CHARS]):
            pieces[PREFIX + char if i else char] += count
    frequent = sorted(pieces, key=lambda piece: (-pieces[piece], piece))[: max(size // 4, 1)]
    # The trainer keeps a continuation only if its bare character is known, and numbers what it meets in hash order.
    # Given up front and sorted, ids, and with them the breaking of ties, are the same in every process.
    alphabet = sorted({piece.removeprefix(PREFIX) for piece in frequent}) + sorted(p for p in frequent if len(p) > 1)
    return Vocabulary(_merge(words, alphabet, size), lower_case=True)


def _merge(words: Counter[str], alphabet: list[str], size: int) -> tuple[str, ...]:
    """Special tokens, the alphabet, then pieces merged by frequency."""
    from tokenizers import Tokenizer as Pipeline
    from tokenizers.models import WordPiece
    from tokenizers.trainers import WordPieceTrainer

    given = [*SPECIAL_TOKENS, *alphabet][:size]
    trainer = WordPieceTrainer(
        vocab_size=size, min_frequency=2, limit_alphabet=0, special_tokens=given, show_progress=False
    )
    pipeline = Pipeline(WordPiece(unk_token="[UNK]"))
    repeated = itertools.chain.from_iterable(itertools.repeat(word, words[word]) for word in sorted(words))
    pipeline.train_from_iterator(repeated, trainer)
    ids: dict[str, int] = pipeline.get_vocab(with_added_tokens=False)
    return tuple(sorted(ids, key=ids.__getitem__))


class Tokenizer:
    """The reference: `tokenizers`' own BERT pipeline. Special tokens written in a text are text.

    >>> vocabulary = Vocabulary((*SPECIAL_TOKENS, "hello", "##s"))
    >>> ids, mask = Tokenizer(vocabulary).encode(["Hellos", ""])
    >>> ids.tolist(), mask.tolist()
    ([[2, 5, 6, 3], [2, 3, 0, 0]], [[1, 1, 1, 1], [1, 1, 0, 0]])
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        normalizer, splitter = bert_rules(vocabulary.lower_case)
        from tokenizers import Regex, normalizers, processors
        from tokenizers import Tokenizer as Pipeline
        from tokenizers.models import WordPiece

        model = WordPiece(vocabulary.ids, unk_token="[UNK]", max_input_chars_per_word=MAX_WORD_CHARS)
        marks = reordered_marks(vocabulary)
        if marks:
            spelled = Regex("[" + "".join(f"\\x{{{ord(c):X}}}" for c in marks) + "]")
            replace = normalizers.Replace(spelled, absent_characters(vocabulary)[0])
            normalizer = normalizers.Sequence([normalizer, replace])
        self.vocabulary = vocabulary
        self._pipeline = Pipeline(model)
        self._pipeline.normalizer = normalizer
        self._pipeline.pre_tokenizer = splitter
        self._pipeline.post_processor = processors.BertProcessing(
            ("[SEP]", vocabulary.sep_id), ("[CLS]", vocabulary.cls_id)
        )
        self._pipeline.enable_padding(pad_id=vocabulary.pad_id)

    def encode(
        self, texts: Sequence[str], pairs: Sequence[str | None] | None = None, max_length: int = 128
    ) -> tuple[Ids, Ids]:
        """`[CLS] a [SEP]` or `[CLS] a [SEP] b [SEP]`, cut to `max_length` tokens (the longer of a pair first).

        Returns:
            ids and mask, (B, T) int64 each, T the longest of this call.

        Raises:
            ValueError: `max_length` under 3, or not one pair for each text.
        """
        seconds = _checked_pairs(texts, pairs, max_length)
        if not texts:
            return np.zeros((0, 0), np.int64), np.zeros((0, 0), np.int64)
        self._pipeline.enable_truncation(max_length, strategy="longest_first")
        both = zip(texts, seconds, strict=True)
        rows = self._pipeline.encode_batch_fast(
            [_encodable(a) if b is None else (_encodable(a), _encodable(b)) for a, b in both]
        )
        return (
            np.array([row.ids for row in rows], np.int64),  # (B, T)
            np.array([row.attention_mask for row in rows], np.int64),  # (B, T)
        )

    def encode_plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, whole and without special tokens."""
        self._pipeline.no_truncation()
        self._pipeline.no_padding()
        rows = self._pipeline.encode_batch_fast([_encodable(text) for text in texts], add_special_tokens=False)
        self._pipeline.enable_padding(pad_id=self.vocabulary.pad_id)
        return [row.ids for row in rows]

    def encode_offsets(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """As `encode_plain`, and where in its text each piece stands: its first character and the one after its last."""
        self._pipeline.no_truncation()
        self._pipeline.no_padding()
        rows = self._pipeline.encode_batch([_encodable(text) for text in texts], add_special_tokens=False)
        self._pipeline.enable_padding(pad_id=self.vocabulary.pad_id)
        return [(row.ids, row.offsets) for row in rows]


def _checked_pairs(texts: Sequence[str], pairs: Sequence[str | None] | None, max_length: int) -> Sequence[str | None]:
    """One second text, or None, for each text."""
    if max_length < 3:
        raise ValueError(f"max_length is {max_length}; [CLS] and two [SEP] need at least 3")
    if pairs is None:
        return [None] * len(texts)
    if len(pairs) != len(texts):
        raise ValueError(f"there are {len(texts)} texts and {len(pairs)} pairs; give one, or None, for each text")
    return pairs


def _encodable(text: str) -> str:
    """Lone surrogates, which no UTF-8 can carry, as U+FFFD, which BERT drops."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return "".join("\ufffd" if 0xD800 <= ord(c) < 0xE000 else c for c in text)
    return text


def bert_rules(lower_case: bool) -> tuple[Any, Any]:
    """BERT's normalizer and splitter."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else a later fork prints a warning
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer

    return BertNormalizer(lowercase=lower_case), BertPreTokenizer()


def absent_characters(vocabulary: Vocabulary) -> tuple[str, str]:
    """Two characters no token holds: one makes any word unknown, the other marks where a word ends."""
    used = set(itertools.chain.from_iterable(vocabulary.tokens))
    unknown, end = itertools.islice((c for c in map(chr, range(0x10FFFF, 0xFFFF, -1)) if c not in used), 2)
    return unknown, end


def reordered_marks(vocabulary: Vocabulary) -> tuple[str, ...]:
    """Combining marks in tokens whose order in a text is changed by decomposition, which a table cannot do.

    BERT keeps few marks, and no English vocabulary holds two that change places. Where one does, both tokenizers
    treat those marks as unknown.
    """
    used = sorted(set(itertools.chain.from_iterable(vocabulary.tokens)))
    normalizer, _ = bert_rules(vocabulary.lower_case)
    marks = [c for c in used if unicodedata.combining(c) and normalizer.normalize_str(c)]
    moved = {c for a, b in itertools.permutations(marks, 2) if normalizer.normalize_str(a + b) != a + b for c in (a, b)}
    return tuple(sorted(moved))


def build_tokenize_plan(vocabulary: Vocabulary) -> bytes:
    """The tokenizer as an ONNX graph for devices; see `pocketfed.model.tokenize_plan`."""
    from pocketfed.model import tokenize_plan

    return tokenize_plan.build_tokenize_plan(vocabulary)
