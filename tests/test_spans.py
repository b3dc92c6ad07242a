"""Answers in passages: SQuAD's measures by hand, windows over long passages, spans put together again."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from pocketfed.model.answers import answer_f1, answer_scores, best_threshold, exact_match, normalised
from pocketfed.model.config import STUDENTS
from pocketfed.model.finetuning import Recipe, fine_tune, make_model, predict
from pocketfed.model.spans import Spans
from pocketfed.model.tasks import Example
from pocketfed.model.tokenization import SPECIAL_TOKENS, Tokenizer, Vocabulary

WORDS = ("who", "where", "is", "it", "anna", "ben", "oslo", "paris", "went", "to", "##s", "!", "then")
VOCABULARY = Vocabulary((*SPECIAL_TOKENS, *WORDS))
TOKENIZER = Tokenizer(VOCABULARY)


def question(passage: str, *answers: str) -> Example:
    return Example("who is it", text_pair=passage, answers=tuple((a, passage.index(a)) for a in answers))


# --- measures -------------------------------------------------------------------------------------------------------


def test_case_punctuation_articles_and_spaces_do_not_count() -> None:
    assert normalised("The   Quick-Brown, (a) fox!") == "quickbrown fox"
    assert normalised("theatre an anthem") == "theatre anthem", "only whole words are articles"
    assert exact_match("an Eiffel tower.", ["x", "the Eiffel  Tower"]) == 1.0


def test_f1_is_over_words_as_often_as_they_occur_and_the_best_answer_counts() -> None:
    # in common: new, new; of 3 said and 4 right words: 2 * 2 / 7
    assert answer_f1("new new york", ["new new jersey city"]) == pytest.approx(4 / 7)
    assert answer_f1("new york", ["paris", "york"]) == pytest.approx(2 / 3)
    assert answer_f1("oslo", ["paris"]) == 0.0


def test_a_question_without_an_answer_wants_nothing_said() -> None:
    assert (exact_match("", []), answer_f1("", [])) == (1.0, 1.0)
    assert (exact_match("oslo", []), answer_f1("oslo", [])) == (0.0, 0.0)
    assert answer_f1("", ["oslo"]) == 0.0
    assert answer_scores(["oslo", "", "ben"], [["in oslo"], [], []]) == {
        "exact": 1 / 3, "f1": pytest.approx((2 / 3 + 1) / 3),
        "has_answer_exact": 0.0, "has_answer_f1": pytest.approx(2 / 3), "no_answer_exact": 0.5, "no_answer_f1": 0.5,
    }  # fmt: skip
    assert set(answer_scores(["oslo"], [["oslo"]])) == {"exact", "f1"}
    assert set(answer_scores(["oslo"], [["The"]])) == {"exact", "f1"}, "an answer of an article alone is an answer"


def test_the_best_threshold_is_the_best_of_all_that_can_be_tried() -> None:
    # answered questions 0 (f1 1, null -5) and 1 (f1 .5, null 2), 2 has no answer (null 1), 3 neither (null -6)
    assert best_threshold([1, 0.5, 0, 0], [-5, 2, 1, -6], [True, True, False, False]) == (2 / 4, -math.inf)
    drawn = random.Random(0)
    for _ in range(20):
        n = 12
        answered = [drawn.random() < 0.6 for _ in range(n)]
        values = [drawn.choice([0.0, 0.4, 1.0]) if a else 0.0 for a in answered]
        nulls = [float(drawn.randrange(-3, 4)) for _ in range(n)]

        def mean(threshold: float) -> float:
            rows = zip(values, nulls, answered, strict=True)  # noqa: B023
            return sum((v if null <= threshold else float(not a)) for v, null, a in rows) / n  # noqa: B023

        best, threshold = best_threshold(values, nulls, answered)
        assert best == pytest.approx(max(mean(t) for t in (-math.inf, *nulls)))
        assert mean(threshold) == pytest.approx(best)


# --- windows --------------------------------------------------------------------------------------------------------


def test_a_long_passage_is_read_in_windows_that_overlap() -> None:
    passage = " ".join(["anna", "went", "to", "oslo", "then", "ben", "went", "to", "paris", "!"])
    encoded = Spans(False, doc_stride=3).encode(
        [question(passage, "ben")], TOKENIZER, 12
    )  # 12 - 3 - 3: 6 pieces a window
    shown = [[VOCABULARY.tokens[i] for i in encoded.take([row])[0][0]] for row in range(len(encoded))]
    assert [" ".join(row) for row in shown] == [
        "[CLS] who is it [SEP] anna went to oslo then ben [SEP]",
        "[CLS] who is it [SEP] oslo then ben went to paris [SEP]",
        "[CLS] who is it [SEP] went to paris ! [SEP]",
    ]
    assert encoded.targets.tolist() == [[10, 10], [7, 7], [0, 0]]
    # The smaller side counts: "oslo" has 2 pieces beside it in the first and none in the second, "ben" none and 2.
    # "then" has one in both: the first. The second "to" has one in both too, but the second window is longer.
    widest = [window.widest.tolist() for window in encoded.notes]
    assert widest[0] == [True, True, True, True, True, False]
    assert widest[1] == [False, False, True, True, True, False]
    assert widest[2] == [False, False, True, True]


def test_every_piece_of_a_passage_is_widest_in_exactly_one_window() -> None:
    passage = " ".join(["anna went to oslo then ben went !"] * 5)
    encoded = Spans(False, doc_stride=4).encode([question(passage, "ben")], TOKENIZER, 16)
    counts = np.zeros(40, int)
    for window in encoded.notes:
        counts[window.first : window.first + len(window.offsets)] += window.widest
    assert counts.tolist() == [1] * 40


def test_a_long_question_is_cut_and_the_passage_keeps_its_room() -> None:
    example = Example("who is it " * 50, text_pair="anna went to oslo", answers=(("oslo", 13),))
    encoded = Spans(False, max_query_length=7).encode([example], TOKENIZER, 32)
    assert encoded.lengths.tolist() == [1 + 7 + 1 + 4 + 1]
    tight = Spans(False).encode([example], TOKENIZER, 9)  # at most half of what is left after the special tokens
    assert [VOCABULARY.tokens[i] for i in tight.take([0])[0][0]][:5] == ["[CLS]", "who", "is", "it", "[SEP]"]


def test_an_answer_is_cut_from_the_passage_as_it_was_written() -> None:
    passage = "Then  ÁNNA!\twent to Paris"
    kind = Spans(False)
    encoded = kind.encode([question(passage, "ÁNNA!\twent")], TOKENIZER, 32)
    start, end = encoded.targets[0]
    assert [VOCABULARY.tokens[i] for i in encoded.ids[start : end + 1]] == ["anna", "!", "went"]
    logits = np.zeros((encoded.lengths[0], 2), np.float32)
    logits[start, 0] = logits[end, 1] = 5
    assert kind.answers([logits], encoded)[0].text == "ÁNNA!\twent"
    assert kind.score([logits], encoded) == {"exact": 1.0, "f1": 1.0}


def test_a_span_runs_forward_is_not_too_long_and_lies_in_the_passage() -> None:
    kind = Spans(False, max_answer_length=2)
    encoded = kind.encode([question("anna went to oslo", "oslo")], TOKENIZER, 32)  # [CLS] who is it [SEP] anna ...
    logits = np.zeros((10, 2), np.float32)
    logits[1, :] = 50  # the question itself
    logits[8, 0], logits[5, 1] = 9, 9  # oslo .. anna: backwards
    logits[5, 0] = 8  # anna .. oslo: four pieces
    logits[8, 1] = 3
    assert kind.answers([logits], encoded)[0].text == "anna"  # 8 + 9, more than oslo's 9 + 3
    few = kind.encode([question("anna went to oslo", "oslo")], TOKENIZER, 32)
    assert Spans(False, max_answer_length=2, n_best=1).answers([logits], few)[0].text == "", (
        "oslo .. anna is the only pair"
    )


def test_no_answer_is_said_above_the_threshold_that_is_best_on_dev() -> None:
    kind = Spans(nullable=True)
    asked = [question("anna went", "anna"), Example("who is it", text_pair="ben went"), question("ben !", "ben")]
    encoded = kind.encode(asked, TOKENIZER, 32)
    outputs = []
    for null in (1.0, 6.0, 3.0):  # [CLS], twice; the first piece of the passage has 2 + 2
        logits = np.zeros((8, 2), np.float32)[: encoded.lengths[len(outputs)]]
        logits[0], logits[5] = null, 2
        outputs.append(logits)
    scores = [answer.null_score for answer in kind.answers(outputs, encoded)]
    assert scores == [-2.0, 8.0, 2.0]
    assert kind.score(outputs, encoded)["exact"] == 2 / 3  # at 0: the third is refused
    fitted = kind.fitted(outputs, encoded)
    assert isinstance(fitted, Spans)
    assert fitted.null_threshold == 2.0
    measured = fitted.score(outputs, encoded)
    assert (measured["exact"], measured["best_exact"], measured["best_f1"]) == (1.0, 1.0, 1.0)


def test_a_student_learns_to_point_at_the_answer() -> None:
    torch.set_num_threads(1)
    config = STUDENTS["nano"].with_changes(
        vocab_size=len(VOCABULARY), hidden_size=32, intermediate_size=32, intra_bottleneck_size=16, embedding_size=16
    )
    drawn = random.Random(0)
    examples = []
    for _ in range(96):
        words = [drawn.choice(["went", "to", "then", "is"]) for _ in range(5)]
        name = drawn.choice(["anna", "ben"])
        words.insert(drawn.randrange(6), name)
        examples.append(question(" ".join(words), name))
    kind = Spans(False)
    encoded = kind.encode(examples, TOKENIZER, 16)
    model = make_model(config, {}, VOCABULARY.sep_id, kind, seed=0)
    fine_tune(model, kind, encoded, Recipe(epochs=5, batch_size=8, learning_rate=1e-2, max_length=16), seed=0)
    assert kind.score(predict(model, encoded), encoded)["exact"] > 0.9
    assert model.classifier.weight.shape == (2, 32), "start and end: Hugging Face's qa_outputs"
