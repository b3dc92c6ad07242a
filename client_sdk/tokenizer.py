"""Text to token ids on a device, by running the artifact's tokenize plan."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pocketfed.model.runtime import load_onnxruntime

END_OF_TEXT = 0x110000  # what closes each text in the plan's input
CODE_POINTS_PER_RUN = 1 << 15  # of all texts of one run together, unless one text alone is longer

Ids = NDArray[np.int64]


class Rows(tuple[Ids, ...]):
    """One row of token ids a text; truncated: how many texts were longer than the limit and lost their end."""

    truncated: int

    def __new__(cls, rows: Iterable[Ids], truncated: int = 0) -> Rows:
        made = super().__new__(cls, rows)
        made.truncated = truncated
        return made


class PlanTokenizer:
    """Holds the tokenize plan open: vocabulary, Unicode tables and BERT's rules are all in it, none in this code.

    What a port needs: the texts' code points (not UTF-16 units), `END_OF_TEXT` after each, one run, and `_lay_out`.

    Args:
        pad_id, cls_id, sep_id: ids of the special tokens; left out, the plan's own metadata gives them.

    Raises:
        FileNotFoundError: no plan there.
    """

    def __init__(
        self, plan_path: Path, pad_id: int | None = None, cls_id: int | None = None, sep_id: int | None = None
    ) -> None:
        onnxruntime = load_onnxruntime()
        if not Path(plan_path).is_file():
            raise FileNotFoundError(f"there is no tokenize plan at {plan_path}; fetch the artifact again")
        options = onnxruntime.SessionOptions()
        options.register_custom_ops_library(_extensions_library())
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(plan_path), options, providers=["CPUExecutionProvider"])
        stated = self._session.get_modelmeta().custom_metadata_map
        self.pad_id = int(stated["pad_id"]) if pad_id is None else pad_id
        self.cls_id = int(stated["cls_id"]) if cls_id is None else cls_id
        self.sep_id = int(stated["sep_id"]) if sep_id is None else sep_id

    def encode(
        self, texts: Sequence[str], pairs: Sequence[str | None] | None = None, max_length: int = 128
    ) -> tuple[Ids, Ids]:
        """`[CLS] a [SEP]` or `[CLS] a [SEP] b [SEP]`, cut to `max_length` tokens (the longer of a pair first).

        Returns:
            ids and mask, (B, T) int64 each, T the longest of this call, filled up with `pad_id`.

        Raises:
            ValueError: `max_length` under 3, or not one pair for each text.
        """
        ids, mask, _ = self._encode(texts, pairs, max_length)
        return ids, mask

    def encode_rows(
        self, texts: Sequence[str], pairs: Sequence[str | None] | None = None, max_length: int = 128
    ) -> Rows:
        """As `encode`, one row of ids a text, without padding, and how many texts were cut."""
        ids, mask, cut = self._encode(texts, pairs, max_length)
        return Rows((row[: int(m.sum())].copy() for row, m in zip(ids, mask, strict=True)), truncated=int(cut.sum()))

    def _encode(
        self, texts: Sequence[str], pairs: Sequence[str | None] | None, max_length: int
    ) -> tuple[Ids, Ids, NDArray[np.bool_]]:
        if max_length < 3:
            raise ValueError(f"max_length is {max_length}; [CLS] and two [SEP] need at least 3")
        if pairs is not None and len(pairs) != len(texts):
            raise ValueError(f"there are {len(texts)} texts and {len(pairs)} pairs; give one, or None, for each text")
        if not texts:
            return np.zeros((0, 0), np.int64), np.zeros((0, 0), np.int64), np.zeros(0, np.bool_)
        seconds: Sequence[str | None] = [None] * len(texts) if pairs is None else pairs
        paired = np.array([b is not None for b in seconds])  # (B,)
        pieces, starts, lengths = self._pieces([*texts, *(b for b in seconds if b is not None)])
        whole, second = lengths[: len(texts)], np.zeros(len(texts), np.int64)
        second[paired] = lengths[len(texts) :]
        second_starts = np.zeros(len(texts), np.int64)
        second_starts[paired] = starts[len(texts) :]
        first, kept = _shorten(whole, second, max_length - 2 - paired)
        ids, mask = self._lay_out(pieces, starts[: len(texts)], first, second_starts, kept, paired)
        return ids, mask, (first < whole) | (kept < second)

    def _pieces(self, texts: Sequence[str]) -> tuple[Ids, Ids, Ids]:
        """The pieces of all texts in a row, each text's closed by `[SEP]`; where each begins; how many it has."""
        runs = [self._session.run(["ids"], {"code_points": points})[0] for points in _code_points(texts)]
        pieces = np.concatenate(runs)
        ends = np.flatnonzero(pieces == self.sep_id)
        starts = np.concatenate([[0], ends[:-1] + 1])
        return pieces, starts, ends - starts

    def _lay_out(
        self, pieces: Ids, a: Ids, first: Ids, b: Ids, second: Ids, paired: NDArray[np.bool_]
    ) -> tuple[Ids, Ids]:
        """Rows of `[CLS] a [SEP]` and, where paired, `b [SEP]`; all arguments but `pieces` are (B,)."""
        total = first + 2 + np.where(paired, second + 1, 0)
        column = np.arange(total.max())[None]  # (1, T)
        in_first = (column >= 1) & (column <= first[:, None])  # (B, T)
        in_second = (column >= first[:, None] + 2) & (column < total[:, None] - 1)
        source = np.where(in_first, a[:, None] + column - 1, b[:, None] + column - first[:, None] - 2)
        mask = column < total[:, None]
        ids = np.where(mask, self.sep_id, self.pad_id)
        ids[:, 0] = self.cls_id
        inside = in_first | in_second
        ids[inside] = pieces[source[inside]]
        return ids.astype(np.int64), mask.astype(np.int64)


def _extensions_library() -> str:
    """Where onnxruntime-extensions keeps its operators, found without importing it.

    Importing it imports torch and transformers wherever they are installed: seconds, and hundreds of megabytes.
    """
    spec = importlib.util.find_spec("onnxruntime_extensions")
    for folder in spec.submodule_search_locations or () if spec else ():
        for suffix in importlib.machinery.EXTENSION_SUFFIXES:
            library = Path(folder) / f"_extensions_pydll{suffix}"
            if library.is_file():
                return str(library)
    import onnxruntime_extensions

    return str(onnxruntime_extensions.get_library_path())


def _code_points(texts: Sequence[str]) -> Iterator[NDArray[np.int32]]:
    """The texts' code points, each closed by `END_OF_TEXT`, a few texts at a time. Lone surrogates stay."""
    begin, held = 0, 0
    for i, text in enumerate(texts):
        held += len(text) + 1
        if held >= CODE_POINTS_PER_RUN or i + 1 == len(texts):
            group = texts[begin : i + 1]
            points = np.frombuffer("".join(group).encode("utf-32-le", "surrogatepass"), "<u4").astype(np.int32)
            yield np.insert(points, np.cumsum([len(t) for t in group]), END_OF_TEXT)
            begin, held = i + 1, 0


def _shorten(first: Ids, second: Ids, room: Ids) -> tuple[Ids, Ids]:
    """How many pieces of each text are kept, (B,) each: the longer gives way, at last both get half."""
    short, long = np.minimum(first, second), np.maximum(first, second)
    over = short + long > room
    short = np.where(over, np.minimum(short, room // 2), short)
    long = np.where(over, room - short, long)
    swapped = first > second
    return np.where(swapped, long, short), np.where(swapped, short, long)
