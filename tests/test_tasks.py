"""What people have is read; what cannot be used is counted or refused in a sentence."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from pathlib import Path

import pytest

from pocketfed.model.tasks import (
    DataError,
    Dataset,
    Example,
    accuracy,
    majority_accuracy,
    read_dataset,
    read_texts,
)

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real data at {SHARED.name}/ beside the repository")
TWO = "text,label\nhello,greet\nbye,leave\n"


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def texts(dataset: Dataset) -> list[str]:
    return [e.text for e in dataset.train]


# --- files ----------------------------------------------------------------------------------------------------------


def test_a_csv_is_read_with_its_user_and_other_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "d.csv", 'text,label,user,room\n"hi, you",greet,ann,7\nbye,leave,,8\n')
    assert read_dataset(path) == Dataset(
        name="d",
        train=(
            Example("hi, you", "greet", user="ann", fields={"room": "7"}),
            Example("bye", "leave", fields={"room": "8"}),
        ),
        dev=(),
        test=(),
        labels=("greet", "leave"),
        skipped={},
        test_source="none",
    )


@pytest.mark.parametrize("text", ["text", "sentence", "utterance", "question", "Text", " SENTENCE "])
@pytest.mark.parametrize("label", ["label", "category", "intent", "class", "Label"])
def test_columns_go_by_several_names(tmp_path: Path, text: str, label: str) -> None:
    read = read_dataset(write(tmp_path / "d.csv", f"{label},{text}\na,one\nb,two\n"))
    assert [(e.text, e.label) for e in read.train] == [("one", "a"), ("two", "b")]


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("text", "text_pair"),
        ("sentence1", "sentence2"),
        ("text_a", "text_b"),
        ("question1", "question2"),
        ("premise", "hypothesis"),
        ("question", "sentence"),
    ],
)
def test_pairs_go_by_several_names(tmp_path: Path, one: str, two: str) -> None:
    read = read_dataset(write(tmp_path / "d.tsv", f"{two}\t{one}\tlabel\nsecond\tfirst\t1\nsecond\tfirst\t0\n"))
    assert [(e.text, e.text_pair) for e in read.train] == [("first", "second")] * 2
    assert read_texts(tmp_path / "d.tsv") == ["first", "second"] * 2


def test_a_tsv_does_not_quote(tmp_path: Path) -> None:
    read = read_dataset(write(tmp_path / "d.tsv", 'sentence\tlabel\n" an open quote\t1\nit \'s 5" long\t0\r\n'))
    assert texts(read) == ['" an open quote', "it 's 5\" long"]
    assert read.labels == ("0", "1")


def test_a_csv_cell_may_hold_commas_quotes_and_line_breaks(tmp_path: Path) -> None:
    read = read_dataset(write(tmp_path / "d.csv", 'text,label\n"a ""b"", c\nd",x\ne,y\n'))
    assert texts(read) == ['a "b", c\nd', "e"]


def test_json_lines_are_read_with_labels_of_any_scalar_kind(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": True, "speaker": 7}, {"label": "x", "text": "c\u2028d"}]
    content = "\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n\n"
    read = read_dataset(write(tmp_path / "d.jsonl", content))
    assert [(e.text, e.label, e.user) for e in read.train] == [
        ("a", "1", None),
        ("b", "true", "7"),
        ("c\u2028d", "x", None),
    ]


def test_a_json_list_is_read(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}, 3]
    read = read_dataset(write(tmp_path / "d.json", json.dumps(rows)))
    assert texts(read) == ["a", "b"]
    assert read.skipped == {"not a JSON object": 1}


def test_a_byte_order_mark_is_not_part_of_the_first_column(tmp_path: Path) -> None:
    assert texts(read_dataset(write(tmp_path / "d.csv", b"\xef\xbb\xbf" + TWO.encode()))) == ["hello", "bye"]


def test_emoji_and_every_script_survive(tmp_path: Path) -> None:
    strange = "👩‍🚀 ½ ß ÅÅ 你好 مرحبا \u200b"
    path = write(tmp_path / "d.jsonl", json.dumps({"text": strange, "label": "🙂"}) + '\n{"text": "x", "label": "b"}')
    assert read_dataset(path).train[0] == Example(strange.strip(), "🙂")


# --- rows that cannot be used ---------------------------------------------------------------------------------------


def test_bad_rows_are_counted_with_a_reason_and_the_rest_is_kept(tmp_path: Path) -> None:
    rows = [
        '{"text": "good", "label": "a"}',
        '{"text": "fine", "label": "b"}',
        '{"text": "", "label": "a"}',
        '{"text": "  ", "label": "a"}',
        '{"text": "\\u0000", "label": "a"}',
        '{"label": "a"}',
        '{"text": null, "label": "a"}',
        '{"text": 5, "label": "a"}',
        '{"text": "x"}',
        '{"text": "x", "label": ""}',
        '{"text": "x", "label": ["a"]}',
        '{"text": "x", "label": "' + "y" * 201 + '"}',
        "not json",
        "[1]",
        "[" * 100_000,
    ]
    read = read_dataset(write(tmp_path / "d.jsonl", "\n".join(rows)))
    assert texts(read) == ["good", "fine"]
    assert read.skipped == {
        "empty text": 5,
        "text is not a string": 1,
        "missing label": 2,
        "label is not a string": 1,
        "label over 200 characters": 1,
        "not a JSON object": 3,
    }


def test_rows_of_the_wrong_width_are_counted(tmp_path: Path) -> None:
    read = read_dataset(write(tmp_path / "d.csv", TWO + "one, two,greet\nlonely\n\n"))
    assert texts(read) == ["hello", "bye"]
    assert read.skipped == {"wrong number of columns": 2}


def test_a_label_that_train_does_not_have_is_skipped_in_dev_and_test(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", TWO)
    write(tmp_path / "valid.csv", "text,label\na,greet\nb,sing\n")
    write(tmp_path / "test.csv", "text,label\nc,leave\nd,sing\ne,dance\n")
    read = read_dataset(tmp_path)
    assert [e.text for e in read.dev] == ["a"]
    assert [e.text for e in read.test] == ["c"]
    assert read.labels == ("greet", "leave")
    assert read.skipped == {"label not in train": 3}


@pytest.mark.parametrize("name", ["d.csv", "d.tsv", "d.jsonl"])
def test_nul_bytes_are_removed_and_what_is_left_is_kept(tmp_path: Path, name: str) -> None:
    if name.endswith("jsonl"):
        content = '{"text": "he\\u0000llo", "label": "a"}\n{"text": "another one", "label": "b"}'
    else:
        mark = "," if name.endswith("csv") else "\t"
        content = f"text{mark}label\nhe\0llo{mark}a\na longer text so that it is no binary file{mark}b\n"
    assert texts(read_dataset(write(tmp_path / name, content)))[0] == "hello"


def test_half_a_surrogate_pair_becomes_a_replacement_character(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", '{"text": "a\\ud83d", "label": "x"}\n{"text": "b", "label": "y"}')
    assert texts(read_dataset(path)) == ["a\ufffd", "b"]


@pytest.mark.parametrize("name", ["d.csv", "d.tsv", "d.jsonl"])
def test_a_text_of_100_000_characters_is_kept_and_one_of_ten_million_is_skipped(tmp_path: Path, name: str) -> None:
    rows = [("ab " * 33_333 + "c", "a"), ("short", "b"), ("x" * 10_000_000, "a")]
    if name.endswith("jsonl"):
        content = "\n".join(json.dumps({"text": t, "label": y}) for t, y in rows)
    else:
        mark = "," if name.endswith("csv") else "\t"
        content = "\n".join([f"text{mark}label", *(f"{t}{mark}{y}" for t, y in rows)])
    before = csv.field_size_limit()
    read = read_dataset(write(tmp_path / name, content))
    assert [len(t) for t in texts(read)] == [100_000, 5]
    assert read.skipped == {"text over 1,000,000 characters": 1}
    assert csv.field_size_limit() == before


# --- files that cannot be used --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("d.csv", b"", "is empty; give a file with at least one row"),
        ("d.csv", b" \n\n ", "is empty"),
        ("d.csv", b"text,label\n", r"has no usable row \(it has no rows\)"),
        ("d.csv", b"text,label\n,a\n,b\n", r"has no usable row \(2 × empty text\); add rows with a text and a label"),
        ("d.csv", b"body,tag\nx,y\n", r"has no text column \(found: body, tag\); name one of them text or sentence"),
        ("d.csv", b"text,tag\nx,y\n", r"has no label column \(found: text, tag\); name one of them label"),
        ("d.csv", b"text,label\nx,y\nz,y\n", "has only the label 'y'; a classifier needs at least two"),
        ("d.csv", b'text,label\n"never closed,a\nx,b\n', "opens a quotation mark .* never closed"),
        ("d.csv", "text,label\ncafé,a\n".encode("latin-1"), "is not UTF-8 .byte 0xe9 at offset 14.; save it as UTF-8"),
        ("d.csv", TWO.encode("utf-16"), "is UTF-16; save it as UTF-8"),
        ("d.csv", TWO.encode("utf-16-le"), "is binary or UTF-16"),
        ("d.csv", bytes(range(256)) * 4, "is not UTF-8"),
        ("d.jsonl", b"\0" * 50 + b"x", "is binary or UTF-16 .50 NUL bytes."),
        ("d.jsonl", b"hello\nyou\n", r"has no text column \(found: none\)"),
        ("d.json", b'{"text": "a"}\n{"text": "b"}', "is not JSON .*name it .jsonl"),
        ("d.json", b'{"text": "a"}', 'has no list "train"'),
        ("d.json", b'{"train": [["a", "x", "y"]]}', "has no usable row .1 × not a pair of text and label."),
        ("d.xlsx", b"PK", r"has the extension \.xlsx, which is not read; give one of \.csv, \.tsv, \.jsonl"),
        ("d", b"hello", r"has the extension \(none\)"),
        ("d.tsv", b"sentence1\tsentence2\tscore\na\tb\t5.0\n", "is a regression task .*give data with a label column"),
    ],
)
def test_an_unusable_file_is_refused_in_a_sentence(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=says) as refusal:
        read_dataset(path)
    assert str(refusal.value).startswith(str(path))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["missing.csv", "missing"])
def test_a_missing_path_is_refused_in_a_sentence(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=rf"{name} does not exist; give the path of a file or folder"):
        read_dataset(tmp_path / name)


def test_a_folder_of_something_else_says_what_was_looked_for(tmp_path: Path) -> None:
    write(tmp_path / "notes.md", "hello")
    with pytest.raises(DataError, match=r"none of the known layouts; looked for train\.csv.*seq\.in.*data_full\.json"):
        read_dataset(tmp_path)


def test_two_files_for_one_split_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", TWO)
    write(tmp_path / "train.tsv", TWO)
    with pytest.raises(DataError, match=r"has both train\.csv and train\.tsv; leave one of them"):
        read_dataset(tmp_path)


# --- folders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dev", ["dev", "valid", "validation", "val"])
def test_a_folder_of_splits_may_mix_formats(tmp_path: Path, dev: str) -> None:
    write(tmp_path / "train.csv", TWO)
    write(tmp_path / f"{dev}.tsv", "sentence\tlabel\nhey\tgreet\n")
    write(tmp_path / "test.jsonl", '{"utterance": "ciao", "intent": "leave"}')
    write(tmp_path / "readme.txt", "not data")
    read = read_dataset(tmp_path)
    assert texts(read) == ["hello", "bye"]
    assert [e.text for e in read.dev + read.test] == ["hey", "ciao"]
    assert read.test_source == "given"
    assert read.name == tmp_path.name


def test_a_test_without_labels_is_no_test(tmp_path: Path) -> None:
    write(tmp_path / "train.tsv", "sentence\tlabel\na\t0\nb\t1\n")
    write(tmp_path / "test.tsv", "index\tsentence\n0\tc\n1\td\n")
    read = read_dataset(tmp_path)
    assert read.test == ()
    assert read.skipped == {"test.tsv has no labels": 2}
    assert read.test_source == "none"


def test_cola_has_no_header(tmp_path: Path) -> None:
    write(tmp_path / "train.tsv", "gj04\t1\t\tShe ran.\ngj04\t0\t*\tRan she the.\n")
    read = read_dataset(tmp_path)
    assert [(e.text, e.label) for e in read.train] == [("She ran.", "1"), ("Ran she the.", "0")]


def test_mrpc_train_is_split_by_dev_ids(tmp_path: Path) -> None:
    header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    write(tmp_path / "msr_paraphrase_train.txt", header + '1\t1\t2\ta "\tb\n1\t3\t4\tc\td\n0\t4\t3\te\tf\n')
    write(tmp_path / "dev_ids.tsv", "3\t4\n")
    write(tmp_path / "msr_paraphrase_test.txt", header + "0\t9\t8\tg\th\n")
    read = read_dataset(tmp_path)
    assert [[(e.text, e.text_pair, e.label) for e in split] for split in (read.train, read.dev, read.test)] == [
        [('a "', "b", "1"), ("e", "f", "0")],
        [("c", "d", "1")],
        [("g", "h", "0")],
    ]


def test_seq_in_and_label_are_matched_line_by_line(tmp_path: Path) -> None:
    content = {"train": ("a b\nc\n", "X\nY\n"), "valid": ("d\n", "X\n"), "test": ("e \n\n", "Y\nX\n")}
    for split, (lines, labels) in content.items():
        write(tmp_path / split / "seq.in", lines)
        write(tmp_path / split / "label", labels)
    read = read_dataset(tmp_path)
    assert [(e.text, e.label) for e in read.train] == [("a b", "X"), ("c", "Y")]
    assert [(e.text, e.label) for e in read.dev + read.test] == [("d", "X"), ("e", "Y")]
    assert read.skipped == {"empty text": 1}


def test_seq_in_and_label_of_different_length_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "train" / "seq.in", "a\nb\nc\n")
    write(tmp_path / "train" / "label", "X\nY\n")
    with pytest.raises(DataError, match=r"seq\.in has 3 lines and .*label has 2; they must match"):
        read_dataset(tmp_path)


def test_clinc_json_has_splits_domains_and_counted_out_of_scope(tmp_path: Path) -> None:
    document = {
        "train": [["a", "x"], ["b", "y"]],
        "val": [["c", "x"]],
        "test": [["d", "y"]],
        "oos_test": [["e", "oos"]] * 3,
    }
    path = write(tmp_path / "data_full.json", json.dumps(document))
    write(tmp_path / "domains.json", '{"letters": ["x"]}')
    read = read_dataset(tmp_path)
    assert read.train == (Example("a", "x", fields={"domain": "letters"}), Example("b", "y"))
    assert (len(read.dev), len(read.test)) == (1, 1)
    assert read.skipped == {"split oos_test": 3}
    assert read_dataset(path).train == read.train


def test_meetings_keep_their_speakers(tmp_path: Path) -> None:
    write(tmp_path / "train" / "m1.txt", "ann|okay.|S|s|s\nbob|yes?|Q|qy|d\nbroken line\n")
    write(tmp_path / "train" / "m2.txt", "ann|so|D|fh|fh\n")
    write(tmp_path / "test" / "m3.txt", "cid|right?|Q|qy|d\n")
    read = read_dataset(tmp_path)
    assert [(e.user, e.text, e.label, e.fields["meeting"]) for e in read.train] == [
        ("ann", "okay.", "S", "m1"),
        ("bob", "yes?", "Q", "m1"),
        ("ann", "so", "D", "m2"),
    ]
    assert [e.user for e in read.test] == ["cid"]
    assert read.skipped == {"wrong number of columns": 1}


# --- texts ----------------------------------------------------------------------------------------------------------


def test_texts_need_no_labels(tmp_path: Path) -> None:
    assert read_texts(write(tmp_path / "a.csv", "text\none\ntwo\n\n")) == ["one", "two"]
    assert read_texts(write(tmp_path / "b.txt", "one\n\n  two \r\n")) == ["one", "two"]
    assert read_texts(write(tmp_path / "c.jsonl", '{"text": "one"}\n{"text": "two", "label": null}')) == ["one", "two"]
    write(tmp_path / "folder" / "train.txt", "one\ntwo")
    write(tmp_path / "folder" / "test.txt", "never")
    assert read_texts(tmp_path / "folder") == ["one", "two"]


def test_unlabelled_data_can_be_read_as_a_data_set(tmp_path: Path) -> None:
    read = read_dataset(write(tmp_path / "a.csv", "text\none\ntwo\n"), labelled=False)
    assert (texts(read), read.labels) == (["one", "two"], ())


# --- a test where there is none -------------------------------------------------------------------------------------


def labelled(counts: dict[str, int], **splits: tuple[Example, ...]) -> Dataset:
    train = tuple(Example(f"{label}{i}", label) for label, n in counts.items() for i in range(n))
    return Dataset("d", train, splits.get("dev", ()), splits.get("test", ()), tuple(sorted(counts)), {})


def test_a_given_test_is_used() -> None:
    given = labelled({"a": 5, "b": 5}, test=(Example("t", "a"),), dev=(Example("v", "a"),))
    assert given.with_test() is given


def test_dev_becomes_the_test_and_is_no_longer_dev() -> None:
    read = labelled({"a": 5, "b": 5}, dev=(Example("v", "a"),)).with_test()
    assert (read.dev, [e.text for e in read.test], read.test_source) == ((), ["v"], "dev")


def test_a_part_of_train_is_held_out_of_each_label() -> None:
    whole = labelled({"a": 50, "b": 10, "c": 1})
    read = whole.with_test(fraction=0.2, seed=0)
    assert Counter(e.label for e in read.test) == {"a": 10, "b": 2}
    assert sorted(e.text for e in read.train + read.test) == sorted(e.text for e in whole.train)
    assert read.test_source == "held out"
    assert read == whole.with_test(fraction=0.2, seed=0)
    assert read.test != whole.with_test(fraction=0.2, seed=1).test


def test_too_little_to_hold_out_is_refused() -> None:
    with pytest.raises(DataError, match="d has 2 training examples, too few to hold out 20%; add a test file"):
        labelled({"a": 1, "b": 1}).with_test()
    for fraction in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(DataError, match="choose one between 0 and 1"):
            labelled({"a": 5, "b": 5}).with_test(fraction)


# --- metrics --------------------------------------------------------------------------------------------------------


def test_accuracy_is_the_share_that_agrees() -> None:
    assert accuracy([1, 2, 3], [1, 2, 4]) == 2 / 3
    assert accuracy(["x"], ["x"]) == 1.0


@pytest.mark.parametrize(("predicted", "expected"), [([], []), ([1], [1, 2])])
def test_accuracy_of_nothing_or_of_a_mismatch_is_refused(predicted: list[int], expected: list[int]) -> None:
    with pytest.raises(ValueError, match=r"predictions for \d labels"):
        accuracy(predicted, expected)


def test_a_majority_vote_is_of_train_and_judged_on_test() -> None:
    judged = tuple(Example("t", y) for y in ("a", "b", "b", "b"))
    assert majority_accuracy(labelled({"a": 3, "b": 2}, test=judged)) == 0.25
    assert majority_accuracy(labelled({"b": 2, "a": 2}, test=judged)) == 0.25  # a tie goes to the first label
    with pytest.raises(DataError, match="no labelled test examples"):
        majority_accuracy(labelled({"a": 3, "b": 2}))


# --- real data ------------------------------------------------------------------------------------------------------


@needs_shared
@pytest.mark.parametrize(
    ("folder", "sizes", "labels"),
    [
        ("snips", (13084, 700, 700), 7),
        ("clinc150", (15000, 3000, 4500), 150),
        ("banking77", (10003, 0, 3080), 77),
        ("glue/SST-2", (67349, 872, 0), 2),
        ("glue/CoLA", (8551, 1043, 0), 2),
        ("glue/MRPC", (3668, 408, 1725), 2),
        ("glue/RTE", (2490, 277, 0), 2),
        ("mrda", (75067, 16433, 16702), 5),
    ],
)
def test_real_data_is_read_whole(folder: str, sizes: tuple[int, int, int], labels: int) -> None:
    read = read_dataset(SHARED / folder)
    assert (len(read.train), len(read.dev), len(read.test)) == sizes
    assert len(read.labels) == labels
    assert all("has no labels" in reason or reason.startswith("split oos") for reason in read.skipped)


@needs_shared
def test_regression_is_refused() -> None:
    with pytest.raises(DataError, match=r"train\.tsv is a regression task"):
        read_dataset(SHARED / "glue" / "STS-B")


@needs_shared
def test_a_pretraining_corpus_is_read() -> None:
    lines = read_texts(SHARED / "text" / "wikitext-2" / "wiki.valid.tokens")
    assert lines[0] == "= Homarus gammarus ="
    assert len(lines) > 2000
