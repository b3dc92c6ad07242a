"""How right guesses are: the measures by which tasks are usually told, in plain numpy.

Definitions are scikit-learn's, SciPy's and conlleval's; where one divides by zero, the measure is 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

_T = TypeVar("_T")
_OUTSIDE = ("O", "")
LESS_IS_BETTER = ("mse",)


def accuracy(predicted: Sequence[_T], expected: Sequence[_T]) -> float:
    """The share of guesses that are right.

    >>> accuracy(["a", "b", "b", "c"], ["a", "b", "c", "c"])
    0.75
    """
    _check(predicted, expected)
    return sum(bool(p == e) for p, e in zip(predicted, expected, strict=True)) / len(expected)


def binary_f1(predicted: Sequence[_T], expected: Sequence[_T], positive: _T) -> float:
    """Harmonic mean of precision and recall of one label.

    >>> binary_f1([1, 1, 0, 0], [1, 0, 1, 0], positive=1)
    0.5
    """
    _check(predicted, expected)
    right = sum(bool(p == e == positive) for p, e in zip(predicted, expected, strict=True))
    return f1_of(right, sum(p == positive for p in predicted), sum(e == positive for e in expected))


def macro_f1(predicted: Sequence[_T], expected: Sequence[_T]) -> float:
    """The mean of the F1 of each label that occurs, guessed or true, however rare.

    >>> macro_f1(["a", "a", "b"], ["a", "b", "b"])
    0.6666666666666666
    """
    _check(predicted, expected)
    occurring = dict.fromkeys([*expected, *predicted])
    return math.fsum(binary_f1(predicted, expected, label) for label in occurring) / len(occurring)


def matthews(predicted: Sequence[_T], expected: Sequence[_T]) -> float:
    """Matthews correlation, for any number of labels (Gorodkin 2004): 1 all right, 0 as good as chance.

    >>> matthews([1, 1, 1, 0], [1, 1, 0, 0])
    0.5773502691896258
    """
    _check(predicted, expected)
    n = len(expected)
    right = sum(bool(p == e) for p, e in zip(predicted, expected, strict=True))
    guessed, true = _counts(predicted), _counts(expected)
    together = sum(count * true.get(label, 0) for label, count in guessed.items())
    spread = (n * n - sum(c * c for c in guessed.values())) * (n * n - sum(c * c for c in true.values()))
    return (right * n - together) / math.sqrt(spread) if spread else 0.0


def pearson(predicted: ArrayLike, expected: ArrayLike) -> float:
    """Linear correlation; 0 where one side never varies.

    >>> round(pearson([1, 2, 3], [2, 4, 7]), 4)
    0.9934
    """
    x, y = np.asarray(predicted, np.float64), np.asarray(expected, np.float64)
    _check(x, y)
    x, y = x - x.mean(), y - y.mean()
    spread = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / spread if spread else 0.0


def spearman(predicted: ArrayLike, expected: ArrayLike) -> float:
    """Correlation of ranks; equal values share the mean of their ranks.

    >>> spearman([10, 20, 30], [1, 5, 9])
    1.0
    """
    return pearson(ranks(predicted), ranks(expected))


def ranks(values: ArrayLike) -> NDArray[np.float64]:
    """
    >>> ranks([7, 5, 7]).tolist()
    [2.5, 1.0, 2.5]
    """
    _, place, counts = np.unique(np.asarray(values, np.float64), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean: NDArray[np.float64] = (2 * last - counts + 1) / 2.0
    return mean[place]


# --- entities -------------------------------------------------------------------------------------------------------


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """(type, first, after the last) of each entity in IOB1, IOB2 or IOBES tags, as conlleval reads them.

    An entity ends before O, B-, S-, another type, and after E- and S-; one that begins with I- begins all the same.

    >>> sorted(entities(["B-PER", "I-PER", "O", "I-LOC", "B-LOC"]))
    [('LOC', 3, 4), ('LOC', 4, 5), ('PER', 0, 2)]
    """
    found: set[tuple[str, int, int]] = set()
    start, before, kind_before = 0, *_OUTSIDE
    for i, (prefix, kind) in enumerate((*map(_parse, tags), _OUTSIDE)):
        inside = before in ("B", "I")  # after O, E and S nothing is open
        if inside and (prefix in ("O", "B", "S") or kind != kind_before):
            found.add((kind_before, start, i))
            inside = False
        if not inside:
            start = i
        if prefix in ("E", "S"):
            found.add((kind, start, i + 1))
        before, kind_before = prefix, kind
    return found


def _parse(tag: str) -> tuple[str, str]:
    """Prefix and type. L and U are E and S by BILOU's names; a tag without a prefix is inside its type."""
    if tag in ("O", ""):
        return _OUTSIDE
    prefix, dash, kind = tag.partition("-")
    known = {"B": "B", "I": "I", "E": "E", "S": "S", "L": "E", "U": "S"}
    return (known[prefix], kind) if prefix in known and (dash or len(tag) == 1) else ("I", tag)


def entity_scores(predicted: Sequence[Sequence[str]], expected: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and F1 over whole entities, and over tags accuracy: conlleval's and seqeval's figures.

    An entity counts where type, first and last word are all right.

    >>> entity_scores([["B-A", "O", "B-B"]], [["B-A", "O", "O"]])["f1"]
    0.6666666666666666
    """
    _check(predicted, expected)
    for row, (p, e) in enumerate(zip(predicted, expected, strict=True)):
        if len(p) != len(e):
            raise ValueError(f"row {row} has {len(p)} predicted tags and {len(e)} expected; give one for each word")
    pairs = [(entities(p), entities(e)) for p, e in zip(predicted, expected, strict=True)]
    right, guessed = sum(len(p & e) for p, e in pairs), sum(len(p) for p, _ in pairs)
    true = sum(len(e) for _, e in pairs)
    words = [pair for p, e in zip(predicted, expected, strict=True) for pair in zip(p, e, strict=True)]
    return {
        "precision": right / guessed if guessed else 0.0,
        "recall": right / true if true else 0.0,
        "f1": f1_of(right, guessed, true),
        "accuracy": sum(p == e for p, e in words) / len(words) if words else 0.0,
    }


# --- groups of them -------------------------------------------------------------------------------------------------


def classification_scores(predicted: Sequence[str], expected: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """Accuracy, macro F1 and Matthews correlation; of two labels also the F1 of the positive one."""
    scores = {
        "accuracy": accuracy(predicted, expected),
        "macro_f1": macro_f1(predicted, expected),
        "matthews": matthews(predicted, expected),
    }
    return scores | ({"f1": binary_f1(predicted, expected, positive_label(labels))} if len(labels) == 2 else {})


def judged_scores(predicted: Sequence[str], expected: Sequence[str], questions: Sequence[str]) -> dict[str, float]:
    """MultiRC's two figures (Khashabi et al. 2018), and accuracy, of answers that are judged right, "1", or wrong.

    f1a: F1 over all answers to all questions. exact: the share of `questions` all answers to which are judged rightly.

    >>> judged_scores(["1", "0", "1"], ["1", "0", "0"], ["q", "q", "r"])["exact"]
    0.5
    """
    wrong = {question for p, e, question in zip(predicted, expected, questions, strict=True) if p != e}
    return {
        "f1a": binary_f1(predicted, expected, "1"),
        "exact": 1 - len(wrong) / len(set(questions)),
        "accuracy": accuracy(predicted, expected),
    }


def positive_label(labels: Sequence[str]) -> str:
    """Which of two labels says yes: GLUE's 1, true, entailment; else the second in order.

    >>> positive_label(["entailment", "not_entailment"]), positive_label(["0", "1"])
    ('entailment', '1')
    """
    yes = ("1", "true", "yes", "entailment", "positive", "equivalent")
    return next((label for label in labels if label.lower() in yes), sorted(labels)[-1])


def regression_scores(predicted: ArrayLike, expected: ArrayLike) -> dict[str, float]:
    """Pearson and Spearman correlation, and the mean squared error."""
    x, y = np.asarray(predicted, np.float64), np.asarray(expected, np.float64)
    return {"pearson": pearson(x, y), "spearman": spearman(x, y), "mse": float(np.mean((x - y) ** 2))}


def scope_scores(predicted: Sequence[str], expected: Sequence[str], outside: str) -> dict[str, float]:
    """CLINC150's two figures (Larson et al. 2019): accuracy on in-scope examples, recall of out-of-scope ones.

    >>> scope_scores(["a", "oos", "oos", "b"], ["a", "b", "oos", "oos"], outside="oos")
    {'in_scope_accuracy': 0.5, 'oos_recall': 0.5}
    """
    _check(predicted, expected)
    pairs = list(zip(predicted, expected, strict=True))
    inside = [p == e for p, e in pairs if e != outside]
    beyond = [p == outside for p, e in pairs if e == outside]
    return {
        "in_scope_accuracy": sum(inside) / len(inside) if inside else 0.0,
        "oos_recall": sum(beyond) / len(beyond) if beyond else 0.0,
    }


def goodness(scores: Mapping[str, float], metric: str) -> float:
    """What the best has most of: the measure itself, of an error its negative.

    >>> goodness({"mse": 2.0}, "mse"), goodness({"f1": 0.5}, "f1")
    (-2.0, 0.5)
    """
    return -scores[metric] if metric in LESS_IS_BETTER else scores[metric]


def summarised(rows: Sequence[Mapping[str, float]]) -> Iterator[tuple[str, float, float, float]]:
    """Name, mean, least and greatest of each measure over rows that all have it."""
    for name in rows[0] if rows else ():
        values = [row[name] for row in rows if name in row]
        if len(values) == len(rows):
            yield name, math.fsum(values) / len(values), min(values), max(values)


def f1_of(right: int, guessed: int, true: int) -> float:
    """F1 from counts: 2 right / (guessed + true)."""
    return 2 * right / (guessed + true) if guessed + true else 0.0


def _counts(values: Sequence[_T]) -> dict[_T, int]:
    counts: dict[_T, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return counts


def _check(predicted: Sequence[object] | NDArray[np.float64], expected: Sequence[object] | NDArray[np.float64]) -> None:
    if len(predicted) != len(expected) or not len(expected):
        raise ValueError(f"{len(predicted)} predictions for {len(expected)} labels; give as many, and at least one")
