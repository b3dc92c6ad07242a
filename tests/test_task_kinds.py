"""Tasks of every kind are read in the layouts in which they are given away; what is broken is counted or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pocketfed.model.task_kinds import read_task
from pocketfed.model.tasks import DataError, Dataset, read_dataset

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real data at {SHARED.name}/ beside the repository")


def write(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def write_json(path: Path, rows: list[dict[str, Any]]) -> Path:
    return write(path, "\n".join(json.dumps(row) for row in rows) + "\n")


# --- pairs and scores -----------------------------------------------------------------------------------------------


def test_a_score_makes_a_regression_and_what_is_no_number_is_counted(tmp_path: Path) -> None:
    rows = ["5.000", "2.5", "nan", "", "inf", "high"]
    lines = "".join(f'{i}\ta "{i}\tb\t{score}\n' for i, score in enumerate(rows))
    write(tmp_path / "train.tsv", "index\tsentence1\tsentence2\tscore\n" + lines)
    write(tmp_path / "dev.tsv", "index\tsentence1\tsentence2\tscore\n0\tc\td\t0.000\n")
    write(tmp_path / "test.tsv", "index\tsentence1\tsentence2\n0\te\tf\n")
    read = read_task(tmp_path)
    assert (read.kind, read.metric, read.labels) == ("regression", "pearson", ())
    assert [(e.text, e.text_pair, e.score, e.label) for e in read.train] == [
        ('a "0', "b", 5.0, None),
        ('a "1', "b", 2.5, None),
    ]
    assert [e.score for e in read.dev] == [0.0]
    assert read.skipped == {"score is not a number": 4, "test.tsv has no labels": 1}
    with pytest.raises(DataError, match="is a regression task"):
        read_dataset(tmp_path)


def test_numbers_in_a_label_column_are_a_regression_only_if_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "d.csv", "text,label\na,1\nb,3\nc,cold\n")
    assert read_task(path).kind == "classification"
    read = read_task(path, "regression")
    assert [e.score for e in read.train] == [1.0, 3.0]
    assert read.skipped == {"score is not a number": 1}


def test_mnli_has_its_gold_labels_and_other_genres(tmp_path: Path) -> None:
    head = "index\tgenre\tsentence1\tsentence2\tlabel1\tgold_label\n"
    write(
        tmp_path / "train.tsv",
        head + "0\tx\ta\tb\tneutral\tentailment\n1\tx\tc\td\tneutral\tneutral\n2\tx\te\tf\tneutral\t-\n",
    )
    write(tmp_path / "dev_matched.tsv", head + "0\tx\tg\th\tneutral\tentailment\n")
    write(tmp_path / "dev_mismatched.tsv", head + "0\ty\ti\tj\tneutral\tneutral\n")
    write(tmp_path / "test_matched.tsv", "index\tsentence1\tsentence2\n0\tk\tl\n")
    read = read_task(tmp_path)
    assert [(e.text, e.label) for e in read.train] == [("a", "entailment"), ("c", "neutral")]
    assert [e.text for e in read.dev] == ["g"]
    assert [e.label for e in read.further["mismatched"]] == ["neutral"]
    assert read.skipped == {"missing label": 1, "test_matched.tsv has no labels": 1}


def test_qqp_tells_duplicates_and_is_told_by_f1(tmp_path: Path) -> None:
    head = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
    write(tmp_path / "train.tsv", head + "0\t1\t2\twho\twhom\t1\n1\t3\t4\twhen\twhere\t0\n2\t5\t6\tbroken\n")
    read = read_task(tmp_path)
    assert [(e.text, e.text_pair, e.label) for e in read.train] == [("who", "whom", "1"), ("when", "where", "0")]
    assert (read.metric, read.skipped) == ("f1", {"wrong number of columns": 1})


@pytest.mark.parametrize(
    ("rows", "first"),
    [
        ([{"question": "is it", "passage": "it is", "label": i == 0} for i in range(2)], ("is it", "it is", "true")),
        ([{"premise": "p", "hypothesis": "h", "label": y} for y in ("neutral", "entailment")], ("p", "h", "neutral")),
        (
            [{"word": "bank", "sentence1": "s", "sentence2": "t", "start1": 0, "label": i == 1} for i in range(2)],
            ("bank: s", "t", "false"),
        ),
    ],
)
def test_superglue_rows_are_pairs(tmp_path: Path, rows: list[dict[str, Any]], first: tuple[str, str, str]) -> None:
    write_json(tmp_path / "train.jsonl", rows)
    write_json(tmp_path / "val.jsonl", rows)
    read = read_task(tmp_path)
    assert (read.train[0].text, read.train[0].text_pair, read.train[0].label) == first
    assert len(read.dev) == 2


def test_copa_is_a_pair_for_each_choice(tmp_path: Path) -> None:
    row = {"premise": "It rained.", "choice1": "wet", "choice2": "dry", "question": "effect", "label": 1}
    write_json(tmp_path / "train.jsonl", [row, row | {"question": "cause", "label": 0}])
    read = read_task(tmp_path)
    assert [(e.text, e.text_pair, e.label, e.fields["choice of"]) for e in read.train] == [
        ("It rained. What happened as a result?", "wet", "0", "0"),
        ("It rained. What happened as a result?", "dry", "1", "0"),
        ("It rained. What was the cause?", "wet", "1", "1"),
        ("It rained. What was the cause?", "dry", "0", "1"),
    ]


def test_the_choices_of_a_question_are_held_out_together(tmp_path: Path) -> None:
    row = {"premise": "It rained.", "choice1": "wet", "choice2": "dry", "question": "effect"}
    write_json(tmp_path / "train.jsonl", [row | {"label": i % 2} for i in range(20)])
    held = read_task(tmp_path).with_test(0.3)
    asked = [[e.fields["choice of"] for e in part] for part in (held.train, held.test)]
    assert [len(part) for part in asked] == [28, 12]
    assert not set(asked[0]) & set(asked[1])
    assert {asked[1].count(question) for question in asked[1]} == {2}


MULTIRC = [
    {"text": "Anna went to Oslo. Ben stayed.", "questions": [
        {"question": "Who went?", "answers": [{"text": "Anna", "label": 1, "idx": 0}, {"text": "Ben", "label": 0, "idx": 1},
                                              {"text": "She", "label": 1, "idx": 2}], "idx": 0},
        {"question": "Where to?", "answers": [{"text": "Oslo", "label": 1, "idx": 3}, {"text": "Paris", "label": 0, "idx": 4}],
         "idx": 1}]},
    {"text": "It rained.", "questions": [{"question": "Was it dry?", "answers": [{"text": "yes", "label": 0, "idx": 5}], "idx": 2}]},
]  # fmt: skip


def test_multirc_is_a_pair_for_each_answer(tmp_path: Path) -> None:
    rows = [{"idx": i, "version": 1.1, "passage": passage} for i, passage in enumerate(MULTIRC)]
    broken = [{"idx": 2, "version": 1.1, "passage": "bare"}, {"idx": 3, "passage": {"text": "x", "questions": [{}]}}]
    write_json(tmp_path / "train.jsonl", [*rows, *broken])
    write_json(tmp_path / "val.jsonl", rows[1:])
    unlabelled = {"text": "x", "questions": [{"question": "q", "answers": [{"text": "a", "idx": 0}], "idx": 0}]}
    write_json(tmp_path / "test.jsonl", [{"idx": 0, "passage": unlabelled}])
    read = read_task(tmp_path)
    assert (read.kind, read.metric, read.labels) == ("classification", "f1a", ("0", "1"))
    assert [(e.text, e.text_pair, e.label, e.fields["answer to"]) for e in read.train] == [
        ("Who went? Anna", "Anna went to Oslo. Ben stayed.", "1", "0.0"),
        ("Who went? Ben", "Anna went to Oslo. Ben stayed.", "0", "0.0"),
        ("Who went? She", "Anna went to Oslo. Ben stayed.", "1", "0.0"),
        ("Where to? Oslo", "Anna went to Oslo. Ben stayed.", "1", "0.1"),
        ("Where to? Paris", "Anna went to Oslo. Ben stayed.", "0", "0.1"),
        ("Was it dry? yes", "It rained.", "0", "1.0"),
    ]
    assert [e.text for e in read.dev] == ["Was it dry? yes"]
    assert read.skipped == {"no passage with questions and answers": 2, "test.jsonl has no labels": 1}


def test_multirc_is_told_by_f1_over_answers_and_by_questions_that_are_wholly_right(tmp_path: Path) -> None:
    from pocketfed.model.supervision import Classification

    write_json(tmp_path / "train.jsonl", [{"idx": i, "passage": passage} for i, passage in enumerate(MULTIRC)])
    read = read_task(tmp_path)
    # Right are 1 0 1 | 1 0 | 0. Of three said to be right two are, of three that are two are said: F1 2 * 2 / (3 + 3).
    # The first question has a mistake, the second has one, the third none.
    measured = Classification(read.labels).measured(["1", "0", "0", "1", "1", "0"], read.train)
    assert measured == {"f1a": pytest.approx(2 / 3), "exact": pytest.approx(1 / 3), "accuracy": pytest.approx(4 / 6)}


def test_the_answers_on_a_passage_are_held_out_together(tmp_path: Path) -> None:
    answers = [{"text": "yes", "label": 1}, {"text": "no", "label": 0}]
    passages = [{"text": f"p{i}", "questions": [{"question": q, "answers": answers} for q in "ab"]} for i in range(10)]
    write_json(tmp_path / "train.jsonl", [{"idx": 0, "passage": passage} for passage in passages])
    held = read_task(tmp_path).with_test(0.2)
    assert (len(held.train), len(held.test)) == (32, 8)
    assert not {e.text_pair for e in held.train} & {e.text_pair for e in held.test}


def test_wsc_marks_the_noun_and_the_pronoun_where_they_stand(tmp_path: Path) -> None:
    def row(text: str, one: tuple[str, int], two: tuple[str, int], label: bool) -> dict[str, Any]:
        target = {"span1_text": one[0], "span1_index": one[1], "span2_text": two[0], "span2_index": two[1]}
        return {"text": text, "target": target, "idx": 0, "label": label}

    text = "Mark told Pete many lies, which Pete kept. He should not."
    write_json(
        tmp_path / "train.jsonl",
        [
            row(text, ("Mark", 0), ("He", 8), True),
            row(text, ("pete", 6), ("He", 7), False),  # of two the nearer, and an index that is one off
            row(text, ("many lies", 3), ("them", 5), False),  # a pronoun that is not spelt so: its index counts
            row(text, ("Mark", 0), ("He", 11), True),
            row(text, ("Mark", 0), ("", 0), True),
            {"text": "no target", "idx": 1, "label": True},
        ],
    )
    read = read_task(tmp_path)
    assert [(e.text, e.label) for e in read.train] == [
        ("* Mark * told Pete many lies, which Pete kept. # He # should not.", "true"),
        ("Mark told Pete many lies, which * Pete * kept. # He # should not.", "false"),
        ("Mark told Pete * many lies, * # which # Pete kept. He should not.", "false"),
    ]
    assert (read.kind, read.metric, read.train[0].text_pair) == ("classification", "accuracy", None)
    assert read.skipped == {"span not in its text": 3}


def test_wnli_is_a_pair_with_a_label_and_its_test_has_none(tmp_path: Path) -> None:
    head = "index\tsentence1\tsentence2\tlabel\n"
    write(
        tmp_path / "train.tsv",
        head + '0\tI stuck a "pin" in a carrot.\tThe carrot had a hole.\t1\n1\tHe sat.\tShe sat.\t0\n',
    )
    write(tmp_path / "dev.tsv", head + "0\tHe sat.\tHe sat down.\t1\n")
    write(tmp_path / "test.tsv", "index\tsentence1\tsentence2\n0\tHe stood.\tShe stood.\n")
    read = read_task(tmp_path)
    assert (read.kind, read.metric, read.labels) == ("classification", "accuracy", ("0", "1"))
    assert [(e.text, e.text_pair, e.label) for e in read.train + read.dev] == [
        ('I stuck a "pin" in a carrot.', "The carrot had a hole.", "1"),
        ("He sat.", "She sat.", "0"),
        ("He sat.", "He sat down.", "1"),
    ]
    assert read.skipped == {"test.tsv has no labels": 1}
    tested = read.with_test()
    assert (tested.test_source, len(tested.test), tested.dev) == ("dev", 1, ())


# --- out of scope ---------------------------------------------------------------------------------------------------


@pytest.fixture
def clinc(tmp_path: Path) -> Path:
    document = {
        "train": [["a", "x"], ["b", "y"]], "val": [["c", "x"]], "test": [["d", "y"]],
        "oos_train": [["e", "oos"]], "oos_val": [["f", "oos"]], "oos_test": [["g", "oos"], ["h", "oos"]],
    }  # fmt: skip
    return write(tmp_path / "data_full.json", json.dumps(document))


def test_out_of_scope_is_left_out_or_a_label_more_or_for_a_threshold(clinc: Path) -> None:
    def shape(read: Dataset) -> tuple[int, int, int, tuple[str, ...], str | None]:
        return len(read.train), len(read.dev), len(read.test), read.labels, read.outside

    assert shape(read_task(clinc)) == (2, 1, 1, ("x", "y"), None)
    assert read_task(clinc).skipped["split oos_test"] == 2
    assert shape(read_task(clinc, "oos:label")) == (3, 2, 3, ("oos", "x", "y"), "oos")
    assert shape(read_task(clinc, "oos:threshold")) == (2, 2, 3, ("x", "y"), "oos")
    assert read_task(clinc, "oos:label").skipped == {}


def test_data_without_out_of_scope_texts_is_refused_for_that_task(tmp_path: Path) -> None:
    path = write(tmp_path / "d.csv", "text,label\na,x\nb,y\n")
    with pytest.raises(DataError, match="d has no out-of-scope examples for oos:label; give data with oos_train"):
        read_task(path, "oos:label")


# --- tags of words --------------------------------------------------------------------------------------------------

CONLL = "-DOCSTART- -X- O O\n\nEU NNP I-NP I-ORG\nrejects VBZ I-VP O\n\nGerman JJ I-NP B-MISC\ncall NN O O\n\n"


def test_conll_columns_are_words_and_last_column_tags(tmp_path: Path) -> None:
    write(tmp_path / "eng.train", CONLL + "too NN\n\n")
    write(tmp_path / "eng.testa", "Oslo NNP I-NP I-LOC\r\n\r\n")
    write(tmp_path / "eng.testb", "EU NNP I-NP I-ORG\n")
    read = read_task(tmp_path)
    assert (read.kind, read.metric, read.labels) == ("tokens", "f1", ("B-MISC", "I-ORG", "O"))
    assert [(e.text, e.tags) for e in read.train] == [("EU rejects", ("I-ORG", "O")), ("German call", ("B-MISC", "O"))]
    assert [(e.words, e.tags) for e in read.dev + read.test] == [(("Oslo",), ("I-LOC",)), (("EU",), ("I-ORG",))]
    assert read.skipped == {"wrong number of columns": 1}


def test_tab_separated_iob_and_json_rows_of_tokens_are_read(tmp_path: Path) -> None:
    tabbed = read_task(write(tmp_path / "a.bio", "Paris\tB-LOC\n#\tO\n"))
    assert tabbed.train[0].words == ("Paris", "#")
    rows = [{"tokens": ["in", "Oslo"], "ner_tags": ["O", "B-L"]}, {"tokens": ["x"], "ner_tags": ["O", "O"]},
            {"tokens": "x", "ner_tags": ["O"]}]  # fmt: skip
    listed = read_task(write_json(tmp_path / "b.jsonl", rows))
    assert [e.tags for e in listed.train] == [("O", "B-L")]
    assert listed.skipped == {"not one tag for each word": 2}


def test_the_same_folder_is_intents_or_slots(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        write(tmp_path / split / "seq.in", "play jazz\nrain in oslo\n")
        write(tmp_path / split / "seq.out", "O B-genre\nO O\n")
        write(tmp_path / split / "label", "music\nweather\n")
    assert read_task(tmp_path).labels == ("music", "weather")
    slots = read_task(tmp_path, "slots")
    assert (slots.kind, slots.labels) == ("tokens", ("B-genre", "O"))
    assert [len(part) for part in (slots.train, slots.dev, slots.test)] == [1, 1, 1]
    assert slots.skipped == {"not one tag for each word": 3}


@pytest.mark.parametrize(
    ("name", "content", "task", "says"),
    [
        ("d.conll", "Oslo\nParis\n", "", "has one column; give a word and its tag a line"),
        ("d.conll", "a O\nb O\n", "", "has no tag but O; there is nothing to learn"),
        ("d.conll", "a O\nb O X\n", "", r"has no usable row of words and tags \(1 × wrong number of columns\)"),
        ("d.conll", "", "", "is empty; give a file with at least one row"),
        ("d.csv", "text,label\na,x\nb,y\n", "slots", "has no train/seq.out; give a folder with seq.in and seq.out"),
        ("d.csv", "text,label\na,x\nb,y\n", "tokens", "has no usable row of words and tags"),
        ("d.csv", "text,label\na,x\nb,y\n", "spans", "holds no questions on passages; give a JSON file as SQuAD has it"),
        ("d.csv", "text,label\na,x\nb,y\n", "regression", r"has no usable row \(2 × score is not a number\); add rows"),
        ("d.csv", "text,label\na,x\nb,y\n", "translation", "there is no task 'translation'; choose one of classification"),
        ("d.json", '{"data": []}', "", r"has no usable question \(it has no questions\)"),
        ("d.json", '{"data": [{"title": "x"}, 3]}', "", r"\(2 × article without paragraphs\)"),
    ],
)  # fmt: skip
def test_data_that_is_no_such_task_is_refused_in_a_sentence(
    tmp_path: Path, name: str, content: str, task: str, says: str
) -> None:
    with pytest.raises(DataError, match=says) as refusal:
        read_task(write(tmp_path / name, content), task)
    assert "\n" not in str(refusal.value)


# --- answers in passages --------------------------------------------------------------------------------------------


def test_questions_keep_the_passage_as_it_is_and_broken_ones_are_counted(tmp_path: Path) -> None:
    context = "  The café in Oslo, the Oslo café."
    good = {"id": "1", "question": " where? ", "answers": [{"text": "Oslo", "answer_start": 14}]}
    questions = [
        good,
        {"id": "2", "question": "who?", "is_impossible": True, "answers": [], "plausible_answers": [{"text": "x"}]},
        good | {"id": "3", "answers": [{"text": "Oslo", "answer_start": 13}]},
        good | {"id": "4", "answers": [{"text": "Oslo", "answer_start": 3}, {"text": "Oslo", "answer_start": 24}]},
        good | {"id": "5", "question": "  "},
        {"id": "6", "question": "and?"},
    ]
    paragraphs = [{"context": context, "qas": questions}, {"context": " ", "qas": [good]}, {"qas": [good]}]
    path = write(
        tmp_path / "train-v2.0.json",
        json.dumps({"version": "v2.0", "data": [{"title": "Cafés", "paragraphs": paragraphs}]}),
    )
    read = read_task(path)
    assert (read.kind, read.metric) == ("spans", "f1")
    assert [(e.fields["id"], e.text, e.answers) for e in read.train] == [
        ("1", "where?", (("Oslo", 14),)), ("2", "who?", ()), ("4", "where?", (("Oslo", 24),)),
    ]  # fmt: skip
    assert all(e.text_pair == context for e in read.train)
    assert read.skipped == {
        "answer not at its offset": 1, "empty text": 1, "no list of answers": 1, "empty context": 1,
        "paragraph without context and questions": 1,
    }  # fmt: skip
    write(tmp_path / "dev-v2.0.json", path.read_text())
    assert [len(part) for part in (read_task(tmp_path).train, read_task(tmp_path).dev)] == [3, 3]


def test_questions_are_held_out_by_whole_passages(tmp_path: Path) -> None:
    def paragraph(n: int) -> dict[str, Any]:
        return {"context": f"x{n}", "qas": [{"id": f"{n}{i}", "question": "q", "answers": []} for i in range(3)]}

    document = {"data": [{"paragraphs": [paragraph(n) for n in range(10)]}]}
    read = read_task(write(tmp_path / "d.json", json.dumps(document))).with_test(0.2)
    assert (len(read.train), len(read.test)) == (24, 6)
    assert not {e.text_pair for e in read.train} & {e.text_pair for e in read.test}


# --- real data ------------------------------------------------------------------------------------------------------


@needs_shared
@pytest.mark.parametrize(
    ("folder", "task", "kind", "metric", "sizes", "labels"),
    [
        ("glue/STS-B", "", "regression", "pearson", (5749, 1500, 0), 0),
        ("glue/CoLA", "", "classification", "matthews", (8551, 1043, 0), 2),
        ("glue/MRPC", "", "classification", "f1", (3668, 408, 1725), 2),
        ("snips", "slots", "tokens", "f1", (13084, 700, 700), 72),
        ("clinc150", "oos:label", "classification", "accuracy", (15100, 3100, 5500), 151),
        ("clinc150", "oos:threshold", "classification", "accuracy", (15000, 3100, 5500), 150),
        ("squadshifts", "", "spans", "f1", (7938, 0, 0), 0),
    ],
)
def test_real_tasks_are_read_whole(
    folder: str, task: str, kind: str, metric: str, sizes: tuple[int, int, int], labels: int
) -> None:
    read = read_task(SHARED / folder, task)
    assert (read.kind, read.metric, len(read.labels)) == (kind, metric, labels)
    assert (len(read.train), len(read.dev), len(read.test)) == sizes
    assert set(read.skipped) <= {"test.tsv has no labels"}
