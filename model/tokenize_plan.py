"""The tokenize plan: WordPiece as an ONNX graph that any runtime with onnxruntime-extensions can run.

BERT's rules for cleaning and splitting act on one character at a time, so a table from code point to text says all of
them. The plan holds that table, read off `tokenizers` itself: a device needs no Unicode data, vocabulary or rule.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from pocketfed.model.tokenization import (
    MAX_WORD_CHARS,
    PREFIX,
    Vocabulary,
    absent_characters,
    bert_rules,
    reordered_marks,
)

END_OF_TEXT = 0x110000  # one past the last code point: what closes each text in the plan's input
_BLOCK = 256  # code points per block of the plan's two-level table
_EXTENSIONS = "ai.onnx.contrib"  # onnxruntime-extensions

Block = tuple[str, ...]  # one string for each of _BLOCK code points


@functools.lru_cache(maxsize=2)
def _normal_forms(lower_case: bool) -> tuple[Block | None, ...]:
    """What BERT makes of each code point, spaces around what stands alone; None for a block it leaves as it is.

    Asked of `tokenizers` itself, so that its tables, whatever their Unicode version, are the plan's.
    """
    normalizer, splitter = bert_rules(lower_case)

    def split(text: str) -> str:
        return " ".join(word for word, _ in splitter.pre_tokenize_str(f"a{text}a"))[1:-1]

    blocks: list[Block | None] = []
    for start in range(0, END_OF_TEXT, _BLOCK):
        if 0xD800 <= start < 0xE000:
            blocks.append(("",) * _BLOCK)  # surrogates: as U+FFFD, dropped
            continue
        chars = [chr(c) for c in range(start, start + _BLOCK)]
        if start:  # noqa: SIM108 - one call for a block: no character of it normalizes to anything with a 0
            normals = normalizer.normalize_str("0".join(chars)).split("0")
        else:
            normals = [normalizer.normalize_str(c) for c in chars]
        whole = "".join(normals)
        if split(whole) != whole:
            normals = [split(normal) for normal in normals]
        blocks.append(None if normals == chars else tuple(normals))
    return tuple(blocks)


def _spellings(vocabulary: Vocabulary) -> Iterator[Block]:
    """What each code point adds to a text whose words are each closed by the end mark and a space."""
    known = set(itertools.chain.from_iterable(vocabulary.tokens)) - set(reordered_marks(vocabulary))
    blocks_of_known = {ord(c) // _BLOCK for c in known}
    unknown, end = absent_characters(vocabulary)

    def spell(normal: str) -> str:
        return f"{end} ".join(unknown if set(word) - known else word for word in normal.split(" "))

    for i, block in enumerate(_normal_forms(vocabulary.lower_case)):
        if block is not None:
            yield tuple(map(spell, block))
        elif i in blocks_of_known:
            yield tuple(map(spell, map(chr, range(i * _BLOCK, (i + 1) * _BLOCK))))
        else:
            yield (unknown,) * _BLOCK


@functools.lru_cache(maxsize=4)
def build_tokenize_plan(vocabulary: Vocabulary) -> bytes:
    """The tokenizer as an ONNX graph: code points in, WordPiece ids out; the same vocabulary gives the same bytes.

    Input `code_points`, int32 (C,): the Unicode code points of any number of texts, each followed by `END_OF_TEXT`.
    Output `ids`, int64 (K,): their pieces, each text's followed by `[SEP]`, which no text can produce.
    Numbers instead of strings, because runtimes cut strings at NUL and have their own ideas of lower case.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    _, end = absent_characters(vocabulary)
    index: dict[str, int] = {}
    table: dict[tuple[int, ...], int] = {}
    block_of = []
    for spellings in (*_spellings(vocabulary), (f"{end} [SEP]{end} ",) * _BLOCK):
        block = tuple(index.setdefault(spelling, len(index)) for spelling in spellings)
        block_of.append(table.setdefault(block, len(table)))
    constants = [
        numpy_helper.from_array(np.array(_BLOCK, np.int32), "block"),
        numpy_helper.from_array(np.array(block_of, np.int32), "block_of"),
        numpy_helper.from_array(np.array(list(table), np.int32).ravel(), "blocks"),
        helper.make_tensor("spellings", TensorProto.STRING, [len(index)], [s.encode() for s in index]),
        helper.make_tensor("nothing", TensorProto.STRING, [1], [b""]),
        numpy_helper.from_array(np.array([0], np.int64), "axis"),
        numpy_helper.from_array(np.zeros(0, np.int64), "no_rows"),
        numpy_helper.from_array(np.array(0, np.int64), "along"),
        numpy_helper.from_array(np.array(vocabulary.unk_id, np.int64), "unk_id"),
        numpy_helper.from_array(np.array(-1, np.int64), "end_id"),
    ]
    graph = helper.make_graph(
        _spell_nodes() + _wordpiece_nodes(vocabulary, end) + _whole_word_nodes(),
        "tokenize",
        [helper.make_tensor_value_info("code_points", TensorProto.INT32, ["C"])],
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["K"])],
        constants,
    )
    domains = {"": 17, "ai.onnx.ml": 2, _EXTENSIONS: 1}
    model = helper.make_model(
        graph,
        ir_version=8,
        producer_name="pocketfed",
        opset_imports=[helper.make_opsetid(domain, version) for domain, version in domains.items()],
    )
    special = {"pad_id": vocabulary.pad_id, "cls_id": vocabulary.cls_id, "sep_id": vocabulary.sep_id}
    helper.set_model_props(model, {name: str(value) for name, value in special.items()})
    onnx.checker.check_model(model, check_custom_domain=False)
    return bytes(model.SerializeToString(deterministic=True))


def _spell_nodes() -> list[Any]:
    """code_points (C,) -> text (1,), by a table of tables."""
    from onnx import helper

    return [
        helper.make_node("Div", ["code_points", "block"], ["high"]),
        helper.make_node("Mod", ["code_points", "block"], ["low"]),
        helper.make_node("Gather", ["block_of", "high"], ["row"]),
        helper.make_node("Mul", ["row", "block"], ["offset"]),
        helper.make_node("Add", ["offset", "low"], ["cell"]),
        helper.make_node("Gather", ["blocks", "cell"], ["spelling"]),
        helper.make_node("Gather", ["spellings", "spelling"], ["parts"]),
        helper.make_node("StringJoin", ["parts", "nothing", "axis"], ["text"], domain=_EXTENSIONS),
    ]


def _wordpiece_nodes(vocabulary: Vocabulary, end: str) -> list[Any]:
    """text (1,) -> found (F,): ids, with -1 where a word ends, except that a word that fails ends in [UNK]."""
    from onnx import helper

    size = len(vocabulary)
    pieces = {**vocabulary.ids, end: size, PREFIX + end: size + 1}
    return [
        helper.make_node(
            "WordpieceTokenizer",
            ["text", "no_rows"],
            ["pieces", "lengths", "starts", "limits"],
            domain=_EXTENSIONS,
            vocab=json.dumps(pieces, ensure_ascii=False, separators=(",", ":")),
            suffix_indicator=PREFIX,
            unknown_token="[UNK]",
            max_input_chars_per_word=MAX_WORD_CHARS + 1,
        ),
        helper.make_node(
            "LabelEncoder",
            ["pieces"],
            ["found"],
            domain="ai.onnx.ml",
            keys_strings=[*vocabulary.tokens, end, PREFIX + end],
            values_int64s=[*range(size), -1, -1],
            default_int64=vocabulary.unk_id,
        ),
    ]


def _whole_word_nodes() -> list[Any]:
    """found (F,) -> ids (K,): only [UNK] of a word that fails.

    The op leaves the pieces it found before it failed (so does `BertTokenizer`'s), BERT leaves none of them.
    """
    from onnx import TensorProto, helper

    return [
        helper.make_node("Equal", ["found", "unk_id"], ["failed"]),
        helper.make_node("Equal", ["found", "end_id"], ["ended"]),
        helper.make_node("Or", ["failed", "ended"], ["last"]),
        helper.make_node("Cast", ["last"], ["last_count"], to=TensorProto.INT64),
        helper.make_node("CumSum", ["last_count", "along"], ["word"], exclusive=1),  # which word each piece is of
        helper.make_node("Compress", ["ended", "last"], ["word_holds"], axis=0),
        helper.make_node("Gather", ["word_holds", "word"], ["holds"]),
        helper.make_node("Xor", ["holds", "ended"], ["inside"]),  # a piece of a word that holds, not its end
        helper.make_node("Or", ["inside", "failed"], ["kept"]),
        helper.make_node("Compress", ["found", "kept"], ["ids"], axis=0),
    ]
