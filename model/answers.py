"""How right answers are: exact match and F1 as SQuAD's evaluation computes them, and the best threshold for no answer.

Rajpurkar et al. 2016 and 2018. Where questions without an answer occur, the second's rules hold for all.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Lower case, without punctuation and articles, single spaces.

    >>> normalised("The  U.S. Army's,")
    'us armys'
    """
    bare = text.lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def exact_match(predicted: str, answers: Sequence[str]) -> float:
    """1 if it is one of the answers; "" is the answer of a question that has none."""
    return float(any(normalised(predicted) == normalised(answer) for answer in _gold(answers)))


def answer_f1(predicted: str, answers: Sequence[str]) -> float:
    """The best F1 over words with any of the answers.

    >>> answer_f1("the cat sat", ["a cat", "dogs"])
    0.6666666666666666
    """
    return max(_f1(normalised(predicted).split(), normalised(answer).split()) for answer in _gold(answers))


def _gold(answers: Sequence[str]) -> Sequence[str]:
    return [answer for answer in answers if normalised(answer)] or [""]


def _f1(predicted: Sequence[str], gold: Sequence[str]) -> float:
    if not predicted or not gold:
        return float(predicted == gold)
    common = sum((Counter(predicted) & Counter(gold)).values())
    return 2 * common / (len(predicted) + len(gold))


def answer_scores(predicted: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """Means of exact match and F1; where some questions have no answer, over those that have one and those without too."""
    exact = [exact_match(p, a) for p, a in zip(predicted, answers, strict=True)]
    f1 = [answer_f1(p, a) for p, a in zip(predicted, answers, strict=True)]
    scores = {"exact": _mean(exact), "f1": _mean(f1)}
    answered = [any(a) for a in answers]  # also by an answer that is but an article
    if all(answered):
        return scores
    for name, wanted in (("has_answer", True), ("no_answer", False)):
        scores[f"{name}_exact"] = _mean([v for v, a in zip(exact, answered, strict=True) if a == wanted])
        scores[f"{name}_f1"] = _mean([v for v, a in zip(f1, answered, strict=True) if a == wanted])
    return scores


def best_threshold(
    values: Sequence[float], null_scores: Sequence[float], answered: Sequence[bool]
) -> tuple[float, float]:
    """The best mean, and the threshold on the null score above which "no answer" is said to reach it.

    Args:
        values: exact match or F1 of each question's best answer that is not empty.
        null_scores: how much likelier no answer is than that one; answered: whether the question has an answer.
    """
    current = float(sum(not a for a in answered))  # as if nothing were answered
    best, threshold = current, -math.inf
    order = sorted(range(len(values)), key=lambda i: null_scores[i])
    for place, i in enumerate(order):
        current += values[i] if answered[i] else -1.0
        last = place + 1 == len(order) or null_scores[order[place + 1]] > null_scores[i]  # equal scores go together
        if last and current > best:
            best, threshold = current, null_scores[i]
    return best / len(values), threshold


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0
