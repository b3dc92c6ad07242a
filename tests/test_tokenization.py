"""WordPiece: vocabularies, the reference tokenizer, and the plan that must agree with it on every text."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketfed.client_sdk import tokenizer as device_side
from pocketfed.client_sdk.tokenizer import PlanTokenizer
from pocketfed.model import tokenize_plan
from pocketfed.model.tokenization import (
    SPECIAL_TOKENS,
    Tokenizer,
    Vocabulary,
    VocabularyError,
    build_tokenize_plan,
    load_vocabulary,
    train_vocabulary,
)

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
SENTENCES = (
    "Play the newest song by Café Tacvba, please!",
    "what's the weather like in São Paulo tomorrow?",
    "Ärger über große Straßen; naïve façades & résumés",
    "日本語 and 中文, русский текст, ελληνικά σοφός, עברית, العربية, हिन्दी, ไทย, 한국어",
    "unaffable, unwatchable, rewatching: watch watches watched",
)
HOSTILE = (
    "", " ", "\t\r\n", "\u00a0\u1680\u2003\u3000", "\u2028\u2029\u0085\u000b\u000c",
    "family 👨‍👩‍👧‍👦 flag 🇩🇪🇧🇷 thumbs 👍🏽 heart ❤️",
    "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f tags",
    "שָׁלוֹם עוֹלָם", "السَّلامُ عَلَيْكُمْ", "\u202eright to left\u202c", "ｆｕｌｌ ｗｉｄｔｈ １２３！",
    "中文字符 mixed中text", "𠀀𪚥 plane two", "豈更 compatibility", "한국어 조선말", "한국어 jamo", "カガ が か\u3099",
    "café cafe\u0301 ÅNGSTRÖM A\u030angstro\u0308m", "q\u0323\u0307 q\u0307\u0323",
    "Z\u0351\u036b\u0343\u036a\u0302a\u0334\u0348l\u0358g\u030fo",
    "İstanbul ısı I i İ ı", "straße STRASSE ẞ ß", "ﬁ ﬂ ﬃ ﬆ Ĳ ǆ ǅ", "ΌΔΟΣ ὈΔΥΣΣΕΎΣ σς Σ", "Ⅷ ½ ² ₃ ™ № ℃ K Å Ω",
    "𝕳𝖊𝖑𝖑𝖔 𝒲𝑜𝓇𝓁𝒹 𝟙𝟚𝟛", "a\x00b\x00", "\x00",
    "a\x01b\x7fc\x9fd", "soft\u00adhyphen zero\u200bwidth\u200cjoin\u200dno\u2060word",
    "\ufeffbom", "re\ufffdplaced \ufffd", "\ue000private\U0010fffd",
    "\u0378unassigned\U000e0fff", "\uffff\U0010ffff nonchar \U0010fffe",
    "\ud800", "a\udfffb", "\ud83d\ude00 as two halves", "a" * 99, "a" * 100,
    "a" * 101, "x" * 200, "é" * 100, "e\u0301" * 101,
    "watch" * 20, "watch" * 20 + "s", "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~",
    "a$b+c<d=e>f^g`h|i~j", "«a» “b” ‘c’ …d—e–f‽ ¿g? ¡h! §¶†‡",
    "。、，！？「」『』・", "[CLS] [SEP] [UNK] [PAD] [MASK] [SEP]", "##s ## # ##watch",
    "\u1100\u1161\u11a8 \uac01", "न्\u200dय",
    "watchÿ watch\u00af watch£ £watch", "watch🎉watch",
    "\u0300\u0301 leading marks", "a\u1b44\u302eb \u302e\u1b44",
)  # fmt: skip


def _words(texts: tuple[str, ...]) -> Iterator[str]:
    """Enough repetition for a trainer to merge something."""
    for text in texts:
        yield from [text] * 4


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    return train_vocabulary(_words(SENTENCES), 800)


class Both:
    """The reference and the plan side by side."""

    def __init__(self, vocabulary: Vocabulary, folder: Path) -> None:
        plan = folder / "tokenize.onnx"
        plan.write_bytes(build_tokenize_plan(vocabulary))
        self.reference = Tokenizer(vocabulary)
        self.device = PlanTokenizer(plan, vocabulary.pad_id, vocabulary.cls_id, vocabulary.sep_id)

    def agree(self, texts: list[str], pairs: list[str | None] | None = None, max_length: int = 128) -> None:
        wanted, got = (t.encode(texts, pairs, max_length) for t in (self.reference, self.device))
        for name, a, b in zip(("ids", "mask"), wanted, got, strict=True):
            assert a.dtype == b.dtype == np.int64
            if a.shape == b.shape and np.array_equal(a, b):
                continue
            for text, pair in zip(texts, pairs or [None] * len(texts), strict=True):
                a, b = (t.encode([text], [pair], max_length)[name == "mask"] for t in (self.reference, self.device))
                assert a.tolist() == b.tolist(), f"{name} of {text!r} with {pair!r}"
            raise AssertionError(f"{name} differ only in the batch: {a.shape} and {b.shape}")


@pytest.fixture(scope="session")
def both(vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> Both:
    return Both(vocabulary, tmp_path_factory.mktemp("plan"))


@pytest.fixture(scope="session")
def both_bert(tmp_path_factory: pytest.TempPathFactory) -> Both:
    path = SHARED / "vocab" / "bert-base-uncased-vocab.txt"
    if not path.is_file():
        pytest.skip("../shared/data/vocab is absent")
    return Both(load_vocabulary(path), tmp_path_factory.mktemp("bert"))


def test_hand_checked_pieces_and_layout(tmp_path: Path) -> None:
    pair = Both(Vocabulary((*SPECIAL_TOKENS, "hello", "##s", "a", "!")), tmp_path)
    for tokenizer in (pair.reference, pair.device):
        ids, mask = tokenizer.encode(["Hellos!", "hellox a"], ["A", None])
        assert ids.tolist() == [[2, 5, 6, 8, 3, 7, 3], [2, 1, 7, 3, 0, 0, 0]]
        assert mask.tolist() == [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]]


def test_texts_that_lose_their_end_are_counted_and_those_that_just_fit_are_not(tmp_path: Path) -> None:
    device = Both(Vocabulary((*SPECIAL_TOKENS, "a", "!")), tmp_path).device
    texts, pairs = ["a a", "a a a", "a", "a"], [None, None, "a", "a !"]
    rows = device.encode_rows(texts, pairs, max_length=4)  # [CLS] a a [SEP]; a pair has room for one piece
    assert [r.tolist() for r in rows] == [[2, 5, 5, 3], [2, 5, 5, 3], [2, 3, 5, 3], [2, 3, 5, 3]]
    assert rows.truncated == 3
    assert device.encode_rows(texts, pairs, max_length=6).truncated == 0
    assert device.encode_rows([]).truncated == 0


def test_a_word_that_fails_halfway_is_one_unknown(tmp_path: Path) -> None:
    """The extensions' op would leave `hello` before [UNK]."""
    pair = Both(Vocabulary((*SPECIAL_TOKENS, "hello", "##s")), tmp_path)
    for tokenizer in (pair.reference, pair.device):
        assert tokenizer.encode(["hellosx hello xhello"])[0].tolist() == [[2, 1, 5, 1, 3]]


def test_hostile_texts_agree(both: Both) -> None:
    both.agree(list(HOSTILE))
    for text in HOSTILE:
        both.agree([text])


def test_hostile_texts_agree_with_berts_vocabulary(both_bert: Both) -> None:
    both_bert.agree(list(HOSTILE))


def test_hostile_pairs_agree_at_every_length(both: Both) -> None:
    pairs = [*HOSTILE[1:], None]
    for max_length in (3, 4, 5, 6, 7, 8, 13, 30, 128):
        both.agree(list(HOSTILE), pairs, max_length)
        both.agree(list(HOSTILE), None, max_length)


def test_sampled_code_points_agree(both: Both) -> None:
    """All of the first 0x3100 and every 61st after; the slow test below takes every one that is in use."""
    points = [*range(0x3100), *range(0x3100, 0x110000, 61)]
    for frame in ("a{}b", " {} ", "watch{}s"):
        both.agree([frame.format(chr(c)) for c in points])


@pytest.mark.slow
def test_every_code_point_of_the_planes_in_use_agrees(both: Both) -> None:
    for start in (*range(0, 0x40000, 1 << 15), 0xE0000):  # planes 0 to 3 and the beginning of 14
        both.agree([f"a{chr(c)}b {chr(c)} " for c in range(start, start + (1 << 15))])


ALPHABET = st.one_of(
    st.characters(categories=None, exclude_categories=()),
    st.sampled_from("watch s#[]!.é\u0301中 \x00\u200d\u302e\ud800"),
)
TEXT = st.text(ALPHABET, max_size=40)


@settings(max_examples=200, deadline=None, database=None, derandomize=True)
@given(
    st.lists(st.tuples(TEXT, st.one_of(st.none(), TEXT)), min_size=1, max_size=6),
    st.integers(min_value=3, max_value=40),
)
def test_any_text_agrees(both: Both, rows: list[tuple[str, str | None]], max_length: int) -> None:
    both.agree([a for a, _ in rows], [b for _, b in rows], max_length)
    both.agree([a for a, _ in rows], None, max_length)


def test_a_text_of_100000_characters_agrees(both: Both) -> None:
    both.agree(["watch the naïve song! " * 4546, "a" * 100_000, "中" * 100_000, "\x00" * 100_000, "short"])


def test_a_batch_gives_what_single_texts_give(both: Both) -> None:
    ids, mask = both.device.encode(list(SENTENCES))
    for i, text in enumerate(SENTENCES):
        alone, _ = both.device.encode([text])
        assert ids[i, : int(mask[i].sum())].tolist() == alone[0].tolist()


def test_texts_split_over_several_runs_stay_in_order(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = both.device.encode(list(SENTENCES) * 3)
    monkeypatch.setattr(device_side, "CODE_POINTS_PER_RUN", 60)
    got = both.device.encode(list(SENTENCES) * 3)
    assert np.array_equal(wanted[0], got[0])
    assert np.array_equal(wanted[1], got[1])


def test_special_tokens_in_a_text_are_text(both: Both) -> None:
    ids, _ = both.device.encode(["[SEP] [CLS] [PAD]"])
    special = {both.device.sep_id, both.device.cls_id, both.device.pad_id}
    assert ids[0, 0] == both.device.cls_id
    assert ids[0, -1] == both.device.sep_id
    assert special.isdisjoint(ids[0, 1:-1].tolist())


def test_a_cased_vocabulary_keeps_case_and_accents(vocabulary: Vocabulary, tmp_path: Path) -> None:
    tokens = (*vocabulary.tokens, "Watch", "É", "##É", "cafÉ")
    pair = Both(Vocabulary(tokens, lower_case=False), tmp_path)
    assert pair.reference.encode(["Watch"])[0].tolist() == [[2, len(vocabulary), 3]]
    pair.agree([*HOSTILE, "Watch watch É cafÉ CafÉ cafe\u0301"])


def test_marks_that_change_places_are_unknown_to_both(vocabulary: Vocabulary, tmp_path: Path) -> None:
    """U+1B44 and U+302E are kept by BERT and sorted by decomposition, which a table cannot do."""
    marks = ("\u1b44", "##\u1b44", "\u302e", "##\u302e", "##\u302f")
    pair = Both(Vocabulary((*vocabulary.tokens, *(m for m in marks if m not in vocabulary.ids))), tmp_path)
    pair.agree(["a\u1b44\u302eb", "a\u302e\u1b44b", "a\u302eb", "\u302e\u1b44", "\u302f\u1b44", *HOSTILE])


def test_the_plan_itself_knows_its_special_tokens(vocabulary: Vocabulary, tmp_path: Path) -> None:
    plan = tmp_path / "tokenize.onnx"
    plan.write_bytes(build_tokenize_plan(vocabulary))
    bare = PlanTokenizer(plan)
    assert (bare.pad_id, bare.cls_id, bare.sep_id) == (vocabulary.pad_id, vocabulary.cls_id, vocabulary.sep_id)
    assert tokenize_plan.END_OF_TEXT == device_side.END_OF_TEXT


def test_the_same_vocabulary_gives_the_same_plan(vocabulary: Vocabulary) -> None:
    first = build_tokenize_plan(vocabulary)
    tokenize_plan.build_tokenize_plan.cache_clear()
    tokenize_plan._normal_forms.cache_clear()
    assert build_tokenize_plan(Vocabulary(vocabulary.tokens)) == first
    assert build_tokenize_plan(Vocabulary((*vocabulary.tokens, "xyz"))) != first


def test_nothing_to_encode_gives_nothing(both: Both) -> None:
    for tokenizer in (both.reference, both.device):
        ids, mask = tokenizer.encode([])
        assert ids.shape == mask.shape == (0, 0)


def test_impossible_calls_say_what_is_wrong(both: Both, tmp_path: Path) -> None:
    for tokenizer in (both.reference, both.device):
        with pytest.raises(ValueError, match="max_length is 2"):
            tokenizer.encode(["a"], None, 2)
        with pytest.raises(ValueError, match="2 texts and 1 pairs"):
            tokenizer.encode(["a", "b"], ["c"])
    with pytest.raises(FileNotFoundError, match=r"no tokenize plan at .*absent\.onnx"):
        PlanTokenizer(tmp_path / "absent.onnx")


def test_the_device_side_loads_neither_torch_nor_tokenizers(vocabulary: Vocabulary, tmp_path: Path) -> None:
    code = (
        "import sys; from pocketfed.client_sdk.tokenizer import PlanTokenizer\n"
        "print(PlanTokenizer(sys.argv[1]).encode(['watch'])[0].tolist())\n"
        "print([m for m in ('torch', 'tokenizers', 'onnx', 'pocketfed.model.tokenization') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "tokenize.onnx")]
    (tmp_path / "tokenize.onnx").write_bytes(build_tokenize_plan(vocabulary))
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"[[2, {vocabulary.ids['watch']}, 3]]", "[]"]


def test_training_gives_the_same_vocabulary_in_any_order_and_process(vocabulary: Vocabulary, tmp_path: Path) -> None:
    corpus = list(_words(SENTENCES))
    assert train_vocabulary(reversed(corpus), 800) == vocabulary
    (tmp_path / "corpus.json").write_text(json.dumps(corpus))
    code = (
        "import json, sys; from pocketfed.model.tokenization import train_vocabulary;"
        "print(train_vocabulary(json.load(open(sys.argv[1])), 800).digest())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "corpus.json")]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == vocabulary.digest()
        assert done.stderr == ""  # no progress bar


def test_a_trained_vocabulary_has_whole_words_and_keeps_to_its_size(vocabulary: Vocabulary) -> None:
    assert vocabulary.tokens[:5] == SPECIAL_TOKENS
    assert {"watch", "the", "weather"} <= set(vocabulary.tokens)
    assert len(train_vocabulary(_words(SENTENCES), 60)) == 60
    assert vocabulary.lower_case
    assert not any(t != t.lower() for t in vocabulary.tokens[5:])


def test_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(VocabularyError, match="no text"):
        train_vocabulary(["", " \n"], 100)
    with pytest.raises(VocabularyError, match="9 tokens is too small"):
        train_vocabulary(["a"], 9)


def test_a_vocabulary_survives_its_file(vocabulary: Vocabulary, tmp_path: Path) -> None:
    vocabulary.save(tmp_path / "deep" / "vocab.txt")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["vocab.txt"]
    for path in (tmp_path / "deep", tmp_path / "deep" / "vocab.txt"):
        loaded = load_vocabulary(path)
        assert loaded == vocabulary
        assert loaded.digest() == vocabulary.digest()


def test_case_comes_from_the_config_else_from_capitals(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    Vocabulary((*SPECIAL_TOKENS, "hello")).save(path)
    assert load_vocabulary(path).lower_case
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert not load_vocabulary(path).lower_case
    cased = Vocabulary((*SPECIAL_TOKENS, "Hello"), lower_case=False)
    cased.save(tmp_path / "other" / "vocab.txt")
    assert load_vocabulary(tmp_path / "other") == cased


@pytest.mark.parametrize("lower_case", [True, False])
def test_a_tokenizer_json_gives_the_same_ids(vocabulary: Vocabulary, tmp_path: Path, lower_case: bool) -> None:
    from transformers import BertTokenizerFast

    wanted = Vocabulary(vocabulary.tokens, lower_case)
    theirs = BertTokenizerFast(vocab=wanted.ids, do_lower_case=lower_case)
    theirs.save_pretrained(tmp_path)
    loaded = load_vocabulary(tmp_path)
    assert loaded == wanted
    texts = list(SENTENCES)
    ids, _ = Tokenizer(loaded).encode(texts)
    assert ids.tolist() == theirs(texts, padding=True)["input_ids"]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ((), "empty; give one token per line"),
        (("[PAD]", "[UNK]", "[CLS]", "[SEP]"), r"no \[MASK\]"),
        (("a", *SPECIAL_TOKENS), "token 0 is 'a'"),
        ((*SPECIAL_TOKENS, "a", "b", "a"), "'a' has ids 5 and 7"),
        ((*SPECIAL_TOKENS, ""), "token 5 is empty"),
        ((*SPECIAL_TOKENS, "\ud800"), "half a surrogate"),
    ],
)
def test_an_unusable_vocabulary_says_why(tokens: tuple[str, ...], message: str) -> None:
    with pytest.raises(VocabularyError, match=message):
        Vocabulary(tokens)


def test_an_unusable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer\.json nor vocab\.txt"):
        load_vocabulary(tmp_path)
    with pytest.raises(FileNotFoundError, match="no vocabulary at"):
        load_vocabulary(tmp_path / "absent.txt")
    cases = {
        "vocab.txt": (b"", "vocab.txt: the vocabulary is empty"),
        "latin.txt": (b"[PAD]\n\xe9\n", "latin.txt is not UTF-8 at byte 6"),
        "broken.json": (b"{", "broken.json or its .* is not JSON"),
        "list.json": (b"[]", "list.json: model.type is None"),
        "bpe.json": (b'{"model": {"type": "BPE"}}', "model.type is 'BPE'"),
        "gap.json": (
            b'{"model": {"type": "WordPiece", "vocab": {"[PAD]": 0, "a": 2}},'
            b' "normalizer": {"type": "BertNormalizer"}}',
            "not 0, 1, 2",
        ),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(VocabularyError, match=message):
            load_vocabulary(tmp_path / name)


def _shared_texts() -> Iterator[tuple[str, list[str]]]:
    """A slice of each data set: 3,000 rows, spread over the whole."""
    if not SHARED.is_dir():
        pytest.skip("../shared/data is absent")
    lines: dict[str, list[str]] = {
        "snips": [t for p in sorted(SHARED.glob("snips/*/seq.in")) for t in p.read_text("utf-8").split("\n")],
        "mrda": [t for p in sorted(SHARED.glob("mrda/*/*.txt")) for t in p.read_text("utf-8").split("\n")],
        "glue": [t for p in sorted(SHARED.glob("glue/*/*.tsv")) for t in p.read_text("utf-8").split("\n")],
        "text": [t for p in sorted(SHARED.glob("text/*/*")) for t in p.read_text("utf-8").split("\n")],
    }
    rows = json.loads((SHARED / "clinc150" / "data_full.json").read_text("utf-8"))
    lines["clinc150"] = [text for part in rows.values() for text, _ in part]
    with (SHARED / "banking77" / "train.csv").open(encoding="utf-8", newline="") as file:
        lines["banking77"] = [row[0] for row in csv.reader(file)]
    for name, texts in lines.items():
        yield name, texts[:: max(1, len(texts) // 3000)]


@pytest.mark.slow
def test_real_texts_agree(both: Both, both_bert: Both) -> None:
    for _, texts in _shared_texts():
        both.agree(texts)
        both_bert.agree(texts)
