"""Measures against cases worked out by hand, and against scikit-learn's and SciPy's."""

from __future__ import annotations

import math
import random

import pytest

from pocketfed.model.metrics import (
    binary_f1,
    classification_scores,
    entities,
    entity_scores,
    macro_f1,
    matthews,
    pearson,
    positive_label,
    ranks,
    scope_scores,
    spearman,
    summarised,
)


def test_f1_is_the_harmonic_mean_of_precision_and_recall() -> None:
    # guessed yes 3 times, 2 of them right, of 4 that are: precision 2/3, recall 2/4
    assert binary_f1([1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 1, 0], positive=1) == pytest.approx(4 / 7)
    assert binary_f1([0, 0], [0, 0], positive=1) == 0.0
    # a: right 1, guessed 2, true 1; b: right 1, guessed 2, true 2; c is never guessed
    assert macro_f1(["a", "a", "b", "b"], ["a", "b", "b", "c"]) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)


def test_matthews_correlation_of_two_labels_is_the_textbooks() -> None:
    predicted, expected = [1] * 5 + [0] * 5, [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    tp, fp, fn, tn = 3, 2, 1, 4
    by_hand = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert matthews(predicted, expected) == pytest.approx(by_hand)
    assert matthews([1, 1, 1], [1, 0, 1]) == 0.0, "always the same guess says nothing"
    assert matthews([0, 1], [1, 0]) == -1.0


def test_correlations_by_hand() -> None:
    # deviations (-1, 0, 1) and (-2, -1, 3): 5 / sqrt(2 * 14)
    assert pearson([1, 2, 3], [1, 2, 6]) == pytest.approx(5 / math.sqrt(28))
    assert pearson([1, 1, 1], [1, 2, 3]) == 0.0
    assert spearman([1, 2, 3], [1, 2, 6]) == 1.0
    assert ranks([3, 1, 3, 3, 0]).tolist() == [4, 2, 4, 4, 1]
    # ranks (1.5, 1.5, 3) and (1, 2, 3): deviations (-.5, -.5, 1) and (-1, 0, 1): 1.5 / sqrt(1.5 * 2)
    assert spearman([5, 5, 9], [1, 2, 3]) == pytest.approx(1.5 / math.sqrt(3))


@pytest.mark.parametrize("seed", range(5))
def test_measures_are_those_of_scikit_learn_and_scipy(seed: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    stats = pytest.importorskip("scipy.stats")
    drawn = random.Random(seed)
    labels = "abcde"[: 2 + seed % 3]
    p, e = ([drawn.choice(labels) for _ in range(60)] for _ in range(2))
    assert macro_f1(p, e) == pytest.approx(metrics.f1_score(e, p, average="macro"))
    assert matthews(p, e) == pytest.approx(metrics.matthews_corrcoef(e, p))
    x, y = ([drawn.randrange(6) for _ in range(40)] for _ in range(2))
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic)


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("B-A I-A O B-B", {("A", 0, 2), ("B", 3, 4)}),
        ("I-A I-A I-B", {("A", 0, 2), ("B", 2, 3)}),  # IOB1: another type is another entity
        ("I-A B-A I-A", {("A", 0, 1), ("A", 1, 3)}),  # IOB1: B only between neighbours
        ("B-A B-A", {("A", 0, 1), ("A", 1, 2)}),
        ("O I-A O", {("A", 1, 2)}),  # conlleval: an entity may begin with I
        ("S-A B-A E-A S-B", {("A", 0, 1), ("A", 1, 3), ("B", 3, 4)}),
        ("B-A I-A E-A I-A", {("A", 0, 3), ("A", 3, 4)}),  # after E something new begins
        ("U-A B-A L-A", {("A", 0, 1), ("A", 1, 3)}),  # BILOU
        ("B-A E-B", {("A", 0, 1), ("B", 1, 2)}),
        ("O O", set()),
        ("", set()),
    ],
)
def test_entities_are_read_as_conlleval_reads_them(tags: str, found: set[tuple[str, int, int]]) -> None:
    assert entities(tags.split()) == found


def test_an_entity_counts_only_whole() -> None:
    expected = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-ORG"]]
    predicted = [["B-PER", "O", "O", "B-LOC"], ["B-ORG", "B-ORG"]]
    # guessed 4 (PER too short, LOC, ORG, ORG), true 3, right LOC and the second ORG
    assert entity_scores(predicted, expected) == {
        "precision": 2 / 4,
        "recall": 2 / 3,
        "f1": pytest.approx(4 / 7),
        "accuracy": 4 / 6,
    }
    with pytest.raises(ValueError, match="row 0 has 1 predicted tags and 2 expected"):
        entity_scores([["O"]], [["O", "O"]])


def test_out_of_scope_is_recalled_and_in_scope_is_right_apart() -> None:
    expected = ["a", "a", "b", "oos", "oos", "oos"]
    predicted = ["a", "oos", "a", "oos", "b", "a"]
    assert scope_scores(predicted, expected, "oos") == {"in_scope_accuracy": 1 / 3, "oos_recall": 1 / 3}


def test_the_positive_label_of_two_is_the_one_that_says_yes() -> None:
    assert positive_label(("0", "1")) == "1"
    assert positive_label(("entailment", "not_entailment")) == "entailment"
    assert positive_label(("false", "true")) == "true"
    assert positive_label(("ham", "spam")) == "spam"
    # guessed 1 once and rightly, of two: F1 2/3; a third label has no positive one
    assert classification_scores(["1", "0"], ["1", "1"], ("0", "1"))["f1"] == pytest.approx(2 / 3)
    assert "f1" not in classification_scores(["a", "b"], ["a", "b"], ("a", "b", "c"))


def test_a_summary_has_mean_least_and_greatest() -> None:
    assert list(summarised([{"x": 1.0, "y": 0.0}, {"x": 4.0, "y": 0.5}])) == [
        ("x", 2.5, 1.0, 4.0),
        ("y", 0.25, 0.0, 0.5),
    ]
