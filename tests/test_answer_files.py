"""Answers in SQuAD's files: lists of the best, predictions and null odds, by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from math import log
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pocketfed.model.answer_files import check_answerable, write_answers
from pocketfed.model.answers import answer_scores
from pocketfed.model.encoded import Encoded
from pocketfed.model.spans import Guess, Spans
from pocketfed.model.tasks import DataError, Dataset, Example
from pocketfed.model.tokenization import SPECIAL_TOKENS, Tokenizer, Vocabulary

VOCABULARY = Vocabulary((*SPECIAL_TOKENS, *("who", "is", "it", "anna", "went", "to", "oslo", "then", "ben")))
TOKENIZER = Tokenizer(VOCABULARY)


def question(identity: str, passage: str, *answers: str) -> Example:
    told = tuple((answer, passage.index(answer)) for answer in answers)
    return Example("who is it", text_pair=passage, answers=told, fields={"id": identity})


def case(kind: Spans, start_of_anna: float = log(3)) -> tuple[Encoded, list[NDArray[np.float32]]]:
    """[CLS] who is it [SEP] anna went to oslo [SEP]: of answers of one piece, anna has a score of ln 6, went ln 1, none ln 3."""
    encoded = kind.encode([question("q1", "Anna went to Oslo", "Anna")], TOKENIZER, 32)
    logits = np.full((10, 2), -50, np.float32)
    logits[0] = log(1.5), log(2)
    logits[5], logits[6] = (start_of_anna, log(2)), (0, 0)
    return encoded, [logits]


def read(folder: Path) -> dict[str, object]:
    return {path.name: json.loads(path.read_text()) for path in folder.iterdir()}


def test_the_files_hold_what_the_logits_say(tmp_path: Path) -> None:
    kind = Spans(nullable=True, n_best=3, max_answer_length=1)
    encoded, outputs = case(kind)
    write_answers(tmp_path / "new" / "er", kind, outputs, encoded)
    written = read(tmp_path / "new" / "er")
    assert set(written) == {"predictions.json", "nbest_predictions.json", "null_odds.json"}
    assert written["predictions.json"] == {"q1": "Anna"}
    assert written["null_odds.json"] == {"q1": pytest.approx(log(3) - log(6))}
    rows = written["nbest_predictions.json"]
    assert isinstance(rows, dict)
    assert rows["q1"] == [
        {"text": "Anna", "probability": pytest.approx(0.6), "start_logit": pytest.approx(log(3)), "end_logit": pytest.approx(log(2))},
        {"text": "", "probability": pytest.approx(0.3), "start_logit": pytest.approx(log(1.5)), "end_logit": pytest.approx(log(2))},
        {"text": "went", "probability": pytest.approx(0.1), "start_logit": 0.0, "end_logit": 0.0},
    ]  # fmt: skip


def test_no_answer_is_written_where_it_is_likelier_by_more_than_the_threshold(tmp_path: Path) -> None:
    kind = Spans(nullable=True, max_answer_length=1)
    encoded, outputs = case(kind)
    write_answers(tmp_path, replace(kind, null_threshold=-0.7), outputs, encoded)  # -ln 2 is -0.693
    assert read(tmp_path)["predictions.json"] == {"q1": ""}
    write_answers(tmp_path, replace(kind, null_threshold=-0.69), outputs, encoded)
    assert read(tmp_path)["predictions.json"] == {"q1": "Anna"}


def test_without_unanswerable_questions_no_answer_is_none_of_the_guesses(tmp_path: Path) -> None:
    kind = Spans(nullable=False, n_best=2, max_answer_length=1)
    encoded, outputs = case(kind)
    assert [guess.text for guess in kind.guesses(outputs, encoded)[0]] == ["Anna", "went"]
    write_answers(tmp_path, kind, outputs, encoded)
    assert set(read(tmp_path)) == {"predictions.json", "nbest_predictions.json"}


def test_no_answer_comes_on_top_of_the_best_and_a_text_is_told_once() -> None:
    kind = Spans(nullable=True, n_best=1, max_answer_length=1)
    encoded, outputs = case(kind)
    assert [guess.text for guess in kind.guesses(outputs, encoded)[0]] == ["Anna", ""]
    kind = Spans(nullable=False, max_answer_length=1)
    encoded = kind.encode([question("q1", "anna then anna")], TOKENIZER, 32)
    logits = np.zeros((9, 2), np.float32)
    logits[7] = 1, 2  # the second anna
    assert kind.guesses([logits], encoded) == [[Guess("anna", 1.0, 2.0), Guess("then", 0.0, 0.0)]]


def test_guesses_are_taken_from_all_windows_and_the_first_is_the_answer() -> None:
    passage = " ".join(["anna went to oslo then ben went"] * 4)
    kind = Spans(nullable=True, doc_stride=4)
    encoded = kind.encode([question("a", "anna went"), question("b", passage), question("c", "to oslo")], TOKENIZER, 14)
    drawn = np.random.Generator(np.random.PCG64(0))
    outputs = [drawn.normal(size=(int(length), 2)).astype(np.float32) for length in encoded.lengths]
    assert len(outputs) > 5
    for answer, guesses in zip(kind.answers(outputs, encoded), kind.guesses(outputs, encoded), strict=True):
        said = [guess for guess in guesses if guess.text]
        (none,) = (guess for guess in guesses if not guess.text)
        assert said[0].text == answer.text
        assert none.start_logit + none.end_logit - said[0].start_logit - said[0].end_logit == pytest.approx(
            answer.null_score
        )
        scores = [guess.start_logit + guess.end_logit for guess in said]
        assert scores == sorted(scores, reverse=True)


def test_the_files_score_what_the_row_says(tmp_path: Path) -> None:
    kind = Spans(nullable=True)
    encoded = kind.encode([question("a", "anna went", "anna"), question("b", "ben went")], TOKENIZER, 32)
    outputs = [np.random.Generator(np.random.PCG64(i)).normal(size=(8, 2)).astype(np.float32) for i in range(2)]
    write_answers(tmp_path, kind, outputs, encoded)
    said = read(tmp_path)["predictions.json"]
    assert isinstance(said, dict)
    scored = answer_scores([said["a"], said["b"]], [["anna"], []])
    assert scored.items() <= kind.score(outputs, encoded).items()


def test_answers_are_written_to_questions_with_ids_of_their_own() -> None:
    asked = (question("a", "anna"), question("a", "ben"), question("b", "to"))
    data = Dataset("d", asked, (), asked, (), {}, kind="spans")
    with pytest.raises(DataError, match="2 questions of d have the id 'a'; give each an id of its own"):
        check_answerable(data)
    check_answerable(replace(data, test=asked[1:]))
    with pytest.raises(
        DataError, match="d is of the kind tokens, and answers are written to questions on passages alone"
    ):
        check_answerable(replace(data, kind="tokens"))
