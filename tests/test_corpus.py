"""Text into documents, documents into token shards, shards into batches."""

from __future__ import annotations

import errno
import hashlib
import json
import tempfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pocketfed.model import corpus as corpus_module
from pocketfed.model.corpus import CorpusError, corpus_digest, describe_files, read_documents, split_sentences
from pocketfed.model.pretraining import NO_PAIR, Batches, epoch_order, mask_tokens
from pocketfed.model.token_store import TokenCorpus, open_corpus, read_index, split_held_out, store_corpus
from pocketfed.model.tokenization import SPECIAL_TOKENS, Tokenizer, Vocabulary

LETTERS = Vocabulary((*SPECIAL_TOKENS, *"abcdefghij", "##x", "##y", "."))
TOKENIZER = Tokenizer(LETTERS)


def document(name: str, sentences: int, words: int = 4) -> tuple[str, ...]:
    return tuple(f"{name} " * words + "." for _ in range(sentences))


@pytest.fixture
def corpus(tmp_path: Path) -> TokenCorpus:
    """Ten documents of one letter each: six sentences of five tokens; three fit into 16 tokens with the special ones."""
    return store_corpus([document(c, 6) for c in "abcdefghij"], TOKENIZER, tmp_path / "corpus", 18)


# ---- documents -----------------------------------------------------------------------------------------------------


def test_a_corpus_is_read_from_every_kind_of_file_and_each_utterance_once(tmp_path: Path) -> None:
    lines = [f"line number {i}" for i in range(24)]
    (tmp_path / "a.txt").write_text("\n".join(lines[:8]) + "\nword\n" + lines[0] + "\n")
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": line, "id": 1}) for line in lines[8:14]))
    (tmp_path / "c.csv").write_text("label,text\n" + "\n".join(f'x,"{line}"' for line in lines[14:19]))
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "d.tsv").write_text("sentence\tlabel\n" + "\n".join(f"{line}\ty" for line in lines[19:]))
    (tmp_path / "ignored.png").write_bytes(b"\x89PNG\0")
    assert list(read_documents([tmp_path])) == [(line,) for line in lines]
    named = [f"{tmp_path.name}/{name}" for name in ("a.txt", "b.jsonl", "c.csv", "deep/d.tsv")]
    assert [file["name"] for file in describe_files([tmp_path])] == named
    alone = describe_files([tmp_path / "a.txt"])
    assert alone == [{**describe_files([tmp_path])[0], "name": "a.txt"}]
    assert alone[0]["sha256"] == hashlib.sha256((tmp_path / "a.txt").read_bytes()).hexdigest()


def test_prose_is_one_document_and_headings_part_it(tmp_path: Path) -> None:
    paragraph = "It was late in May. We left Mr. Smith there. He waved!"
    (tmp_path / "book.txt").write_text("\n".join([paragraph] * 10))
    (book,) = read_documents([tmp_path])
    assert book == ("It was late in May.", "We left Mr. Smith there.", "He waved!") * 10
    (tmp_path / "book.txt").write_text(f" = First = \n \n {paragraph} \n \n = = Part = = \n \n {paragraph} \n" * 10)
    documents = list(read_documents([tmp_path]))
    assert len(documents) == 20
    assert {len(d) for d in documents} == {3}


def test_lines_wrapped_in_mid_sentence_are_joined(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The quick brown\nfox jumps. The dog\nsleeps.\n\nA new\nparagraph.\n\n" * 10)
    (text,) = read_documents([tmp_path])
    assert text == ("The quick brown fox jumps.", "The dog sleeps.", "A new paragraph.") * 10


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two? Three! four", ["One.", "Two?", "Three! four"]),
        (
            "Dr. J. Watson paid 8.30 in St. Ives. I. Then left.",
            ["Dr. J. Watson paid 8.30 in St. Ives.", "I.", "Then left."],
        ),
        ("“Go.” “Why?” he said … No", ["“Go.”", "“Why?” he said …", "No"]),
        ("  ", []),
    ],
)
def test_sentences_end_where_a_reader_would_end_them(text: str, sentences: list[str]) -> None:
    assert split_sentences(text) == sentences


def test_a_quotation_mark_in_a_tsv_is_a_character(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("text\n" + "".join(f'he said "number {i}\n' for i in range(20)))
    assert len(list(read_documents([tmp_path]))) == 20


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.txt", b"", "holds 0 distinct sentences"),
        (
            "short.txt",
            b"one short line\n",
            "holds 1 distinct sentences of two words or more; pre-training needs at least",
        ),
        ("latin.txt", b"caf\xe9 au lait\n", "is not UTF-8 text"),
        ("binary.txt", b"a b\0c d\n", "holds NUL bytes"),
        ("bad.jsonl", b'{"text": "a b"}\n{"text"\n', "line 2 is not JSON"),
        ("nokey.jsonl", b'{"txt": "a b"}\n', 'line 1 has no "text"'),
        ("list.jsonl", b'["a b"]\n', 'line 1 has no "text"'),
        ("bad.csv", b"id,label\n1,x\n", "has no column named text; its columns are id, label"),
        ("none.csv", b"", "its columns are none"),
    ],
)
def test_a_bad_corpus_is_refused_in_one_sentence(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CorpusError) as refusal:
        list(read_documents([path]))
    assert said in str(refusal.value)
    assert name in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_corpus_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="nowhere does not exist"):
        list(read_documents([tmp_path / "nowhere"]))
    with pytest.raises(CorpusError, match="holds no text"):
        list(read_documents([tmp_path]))
    with pytest.raises(CorpusError, match="no corpus was given"):
        list(read_documents([]))


def test_a_line_comes_once_however_many_there_are_and_wherever_the_table_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    lines = [f"line {i}" for i in rng.integers(0, 12_000, 30_000)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    expected = [(line,) for line in dict.fromkeys(lines)]
    assert 10_000 < len(expected) < 12_000
    assert list(read_documents([tmp_path])) == expected
    monkeypatch.setattr(corpus_module, "MEMORY_SLOTS", 1 << 12)  # as it begins; every larger table is a file's
    assert list(read_documents([tmp_path])) == expected

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(CorpusError, match=r"needs 65,536 bytes in .*: No space left on device; free some space"):
        list(read_documents([tmp_path]))


# ---- shards --------------------------------------------------------------------------------------------------------


def test_chunks_are_consecutive_sentences_that_fit_the_model(corpus: TokenCorpus) -> None:
    assert len(corpus) == 20
    assert set(corpus.lengths.tolist()) == {15}
    assert corpus.tokens == 10 * 6 * 5
    first = [[LETTERS.tokens[i] for i in sentence] for sentence in corpus.sentences(0)]
    assert first == [["a", "a", "a", "a", "."]] * 3
    assert corpus.chunks[:, 3].tolist() == [i // 2 for i in range(20)]


def test_shards_make_no_difference_to_what_is_read(tmp_path: Path, corpus: TokenCorpus) -> None:
    documents = [document(c, 6) for c in "abcdefghij"]
    small = store_corpus(documents, TOKENIZER, tmp_path / "small", 18, shard_tokens=70)
    assert len(small.shards) == 4  # documents are not parted: three of 30 tokens each
    assert (small.lengths == corpus.lengths).all()
    assert (small.chunks[:, 3] == corpus.chunks[:, 3]).all()
    for chunk in range(len(corpus)):
        assert [s.tolist() for s in small.sentences(chunk)] == [s.tolist() for s in corpus.sentences(chunk)]
    assert all(isinstance(shard.tokens, np.memmap) for shard in small.shards)
    assert read_index(tmp_path / "small")["text"] == corpus_digest(documents)


def test_a_store_is_the_same_to_the_byte_as_ever(tmp_path: Path) -> None:
    documents = [tuple(f"{c} " * words + "." for words in range(2, 9)) for c in "abcdefghij"]
    store_corpus(documents, TOKENIZER, tmp_path / "corpus", 18, shard_tokens=120)
    digest = hashlib.sha256()
    for path in sorted((tmp_path / "corpus").iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    # Of the first version, which held a shard as lists.
    assert digest.hexdigest() == "e49a2c9cf4ce27b7d957ec4ca62a10f57af3f01d870dcdea0b3f6de99441d05f"


def test_reading_and_encoding_hold_a_few_bytes_a_token_and_a_line(tmp_path: Path) -> None:
    def peak(lines: int) -> int:
        """Bytes, of which what does not grow with the corpus falls away in a difference."""
        path = tmp_path / "lines.txt"

        def text() -> Iterator[str]:
            for i in range(lines):
                yield " ".join("abcdefghij"[int(c)] for c in f"{i:05}") * 4 + "\n"  # 17 words, each line another

        with path.open("w") as file:
            file.writelines(text())
        tracemalloc.start()
        try:
            stored = store_corpus(read_documents([path]), TOKENIZER, tmp_path / "corpus", 24)
            assert stored.tokens == 17 * lines
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few, many = 6_000, 14_000  # past both of the table's doublings at 3,072 and 6,144 lines
    # 17 tokens of 2 bytes, a sentence's 8, a chunk's 32, a digest's 11 to 32; as lists and a set they were 34.5 a token and 87 a line.
    assert (peak(many) - peak(few)) / (many - few) < 2 * (17 * 2 + 8 + 32 + 32)


def test_a_sentence_too_long_for_the_model_becomes_several(tmp_path: Path) -> None:
    corpus = store_corpus([("a " * 20,), document("b", 2)], TOKENIZER, tmp_path / "corpus", 11)
    assert [[len(s) for s in corpus.sentences(i)] for i in range(len(corpus))] == [[8], [8], [4], [5], [5]]


def test_the_corpus_own_unknown_words_become_unk_and_are_never_hidden(tmp_path: Path) -> None:
    corpus = store_corpus([("a <unk> b <unk>", "<unk> <unk>")] * 4, TOKENIZER, tmp_path / "corpus", 18)
    a, b, unknown = LETTERS.ids["a"], LETTERS.ids["b"], LETTERS.unk_id
    assert [s.tolist() for s in corpus.sentences(0)] == [[a, unknown, b, unknown]]  # nothing to learn from the second
    batch = Batches(corpus, LETTERS, 4, 0).batch(0)
    assert not (batch.targets == unknown).any()


def test_a_corpus_of_another_vocabulary_or_a_damaged_one_is_refused(tmp_path: Path, corpus: TokenCorpus) -> None:
    other = Vocabulary((*SPECIAL_TOKENS, "a"))
    with pytest.raises(CorpusError, match="was encoded with another vocabulary"):
        open_corpus(tmp_path / "corpus", other)
    (tmp_path / "corpus" / "00000.tokens.npy").write_bytes(b"nonsense")
    with pytest.raises(CorpusError, match="is not an encoded corpus"):
        open_corpus(tmp_path / "corpus", LETTERS)
    with pytest.raises(CorpusError, match="no sentence of known tokens"):
        store_corpus([("z z z",)], Tokenizer(other), tmp_path / "none", 18)


def test_held_out_chunks_are_not_trained_on(corpus: TokenCorpus) -> None:
    training, held_out = split_held_out(corpus, np.random.default_rng(0))
    assert (len(training), len(held_out)) == (19, 1)
    assert {tuple(c) for c in training.chunks} | {tuple(c) for c in held_out.chunks} == {
        tuple(c) for c in corpus.chunks
    }


# ---- batches -------------------------------------------------------------------------------------------------------


def test_a_batch_is_a_function_of_seed_stage_and_number(corpus: TokenCorpus) -> None:
    batches, again = Batches(corpus, LETTERS, 6, 7), Batches(corpus, LETTERS, 6, 7)
    later = batches.batch(9)  # in the third epoch
    assert batches.an_epoch == 4
    for name in later.__dataclass_fields__:
        assert getattr(again.batch(9), name).equal(getattr(later, name)), name
    assert not batches.batch(9, stage=1).input_ids.equal(later.input_ids)
    assert not Batches(corpus, LETTERS, 6, 8).batch(9).input_ids.equal(later.input_ids)


def test_pairs_are_the_rest_of_a_chunk_or_half_the_time_another_documents_text(corpus: TokenCorpus) -> None:
    batches = Batches(corpus, LETTERS, 20, 0)
    follows = elsewhere = 0
    for number in range(40):
        batch = batches.batch(number)
        for row in range(20):
            ids = batch.input_ids[row].clone()
            ids[batch.chosen[row]] = batch.targets[int(batch.chosen[:row].sum()) : int(batch.chosen[: row + 1].sum())]
            words = [LETTERS.tokens[i] for i, on in zip(ids, batch.attention_mask[row], strict=True) if on]
            cut = words.index("[SEP]")
            first, second = words[1:cut], words[cut + 1 : -1]
            assert words[0] == "[CLS]"
            assert words[-1] == "[SEP]"
            assert batch.token_type_ids[row].tolist()[: cut + 2] == [0] * (cut + 1) + [1]
            assert len(words) <= 18
            same = {*first, *second} == {first[0], "."}
            assert same == (batch.next_sentence[row] == 0)
            follows, elsewhere = follows + same, elsewhere + (not same)
    # Half of 800, but for the twentieth of draws that hit the same document.
    assert elsewhere == pytest.approx(800 * 0.5 * 0.9, abs=45)
    assert follows + elsewhere == 800


def test_a_text_of_one_sentence_is_no_pair(tmp_path: Path) -> None:
    corpus = store_corpus([(f"{c} " * 5,) for c in "abcdefgh"], TOKENIZER, tmp_path / "corpus", 18)
    batch = Batches(corpus, LETTERS, 8, 0).batch(0)
    assert batch.next_sentence.tolist() == [NO_PAIR] * 8
    assert int(batch.token_type_ids.sum()) == 0


def test_processes_share_a_batch_between_them(corpus: TokenCorpus) -> None:
    whole = Batches(corpus, LETTERS, 6, 0).batch(3)
    parts = [whole.rows(slice(rank, None, 2)) for rank in (0, 1)]
    assert parts[0].input_ids.equal(whole.input_ids[0::2])
    assert parts[1].input_ids.equal(whole.input_ids[1::2])
    assert sum(len(p.targets) for p in parts) == len(whole.targets)
    for part in parts:
        hidden = part.whole()  # targets are those of the part's own positions
        assert part.targets.equal(hidden.input_ids[part.chosen])
        assert {tuple(row) for row in hidden.input_ids.tolist()} <= {
            tuple(row) for row in whole.whole().input_ids.tolist()
        }


def test_masking_hides_fifteen_percent_of_ordinary_tokens_as_bert_does() -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(5, len(LETTERS), (400, 42))
    ids[:, 0], ids[:, 41] = LETTERS.cls_id, LETTERS.sep_id
    mask = np.ones_like(ids)
    mask[:, 30:] = 0
    hidden, chosen = mask_tokens(ids, mask, LETTERS, rng)
    assert not chosen[:, 0].any()
    assert not chosen[:, 30:].any()
    assert (hidden == ids)[~chosen].all()
    assert set(chosen.sum(1).tolist()) == {4}  # 15 % of 29 is 4.35
    assert (hidden == LETTERS.mask_id)[chosen].mean() == pytest.approx(0.8, abs=0.03)
    # A tenth stays; of the tenth that becomes a random token one in thirteen does too.
    assert (hidden == ids)[chosen].mean() == pytest.approx(0.1 + 0.1 / 13, abs=0.03)


def test_whole_words_are_hidden_with_all_their_pieces() -> None:
    word = [LETTERS.ids["a"], LETTERS.ids["##x"], LETTERS.ids["##y"]]
    ids = np.array([[LETTERS.cls_id, *word * 10, LETTERS.sep_id]] * 300)
    _, chosen = mask_tokens(ids, np.ones_like(ids), LETTERS, np.random.default_rng(0), whole_words=True)
    words = chosen[:, 1:-1].reshape(300, 10, 3)
    assert (words.all(2) == words.any(2)).all()
    assert set(words.any(2).sum(1).tolist()) == {2}  # of 30 pieces 4 or more are wanted: two words
    _, pieces = mask_tokens(ids, np.ones_like(ids), LETTERS, np.random.default_rng(0))
    parted = pieces[:, 1:-1].reshape(300, 10, 3)
    assert (parted.all(2) != parted.any(2)).any()


def test_at_most_so_many_tokens_of_a_text_are_hidden() -> None:
    word = [LETTERS.ids["a"], LETTERS.ids["##x"], LETTERS.ids["##y"]]
    ids = np.array([[LETTERS.cls_id, *word * 10, LETTERS.sep_id]] * 300)
    everywhere = np.ones_like(ids)
    everywhere[0, 8:] = 0  # 7 tokens, of which one is hidden as ever

    def hide(most: int, whole_words: bool) -> np.ndarray:
        rng = np.random.default_rng(0)
        return mask_tokens(ids, everywhere, LETTERS, rng, whole_words, most)[1]

    assert set(hide(0, False)[1:].sum(1).tolist()) == {4}  # 15 % of 30 is 4.5, and an even number is nearer
    assert set(hide(2, False)[1:].sum(1).tolist()) == {2}
    assert hide(2, False)[0].sum() == 1
    assert (hide(2, False) <= hide(0, False)).all()  # the first of those that would be
    assert set(hide(0, True)[1:].sum(1).tolist()) == {6}  # two words
    assert set(hide(6, True)[1:].sum(1).tolist()) == {6}
    assert set(hide(5, True)[1:].sum(1).tolist()) == {4}  # a word, and a piece of the next
    assert (hide(9, True) == hide(0, True)).all()


def test_an_epoch_has_each_chunk_once_in_batches_of_similar_length() -> None:
    lengths = np.random.default_rng(0).integers(3, 60, 1000)
    batches = epoch_order(lengths, 32, np.random.default_rng(1))
    assert sorted(np.concatenate(batches).tolist()) == list(range(1000))
    assert len(batches) == 32
    padded = sum(int(lengths[b].max()) * len(b) for b in batches)
    assert padded < 1.1 * lengths.sum()
