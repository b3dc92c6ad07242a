"""The floor that a student has to beat: TF-IDF of words and pairs of words, and logistic regression."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pocketfed.model.tasks import Dataset, Example

INVERSE_PENALTY = 10.0  # C: what of the summed log loss goes with half the squared weights
ITERATIONS = 60
LEAST_EXAMPLES = 2  # of train, that a term occurs in


def terms(example: Example) -> list[str]:
    """Words and pairs of neighbours, of both texts.

    >>> terms(Example("Set an alarm"))
    ['set', 'an', 'alarm', 'set an', 'an alarm']
    """
    found: list[str] = []
    for text in (example.text, example.text_pair):
        words = re.findall(r"\w+|[^\w\s]", (text or "").lower())
        found += [*words, *(f"{a} {b}" for a, b in itertools.pairwise(words))]
    return found


def features(examples: Sequence[Example], idf: dict[str, float], index: dict[str, int]) -> Tensor:
    """A row of length 1 for each example: (1 + ln count) x idf of each known term, sparse (N, terms)."""
    rows, columns, values = [], [], []
    for row, example in enumerate(examples):
        counts = {term: n for term, n in Counter(terms(example)).items() if term in index}
        weights = np.array([(1 + np.log(n)) * idf[term] for term, n in counts.items()])
        norm = float(np.linalg.norm(weights)) if len(weights) else 1.0
        rows += [row] * len(counts)
        columns += [index[term] for term in counts]
        values += list(weights / norm)
    places = torch.tensor([rows, columns], dtype=torch.int64)
    return torch.sparse_coo_tensor(
        places, torch.tensor(values, dtype=torch.float32), (len(examples), len(index)), check_invariants=False
    ).coalesce()


def fit(x: Tensor, targets: NDArray[np.int64], labels: int) -> tuple[Tensor, Tensor]:
    """Weights (terms, labels) and biases of multinomial logistic regression; the biases are not penalised."""
    weights = torch.zeros(x.shape[1], labels, dtype=torch.float32, requires_grad=True)
    biases = torch.zeros(labels, dtype=torch.float32, requires_grad=True)
    wanted = torch.from_numpy(targets)
    optimizer = torch.optim.LBFGS(
        [weights, biases], max_iter=ITERATIONS, history_size=10, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = torch.sparse.mm(x, weights) + biases
        total = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
        total = (INVERSE_PENALTY * total + 0.5 * (weights**2).sum()) / (INVERSE_PENALTY * len(wanted))
        total.backward()
        return total

    optimizer.step(loss)
    return weights.detach(), biases.detach()


def tfidf_guesses(dataset: Dataset) -> list[str]:
    """What it says of the test split of a classification."""
    within: Counter[str] = Counter(term for e in dataset.train for term in set(terms(e)))
    index = {term: i for i, term in enumerate(term for term, n in within.items() if n >= LEAST_EXAMPLES)}
    idf = {term: float(np.log((1 + len(dataset.train)) / (1 + within[term]))) + 1 for term in index}
    number = {label: i for i, label in enumerate(dataset.labels)}
    targets = np.array([number[e.label or ""] for e in dataset.train], np.int64)
    weights, biases = fit(features(dataset.train, idf, index), targets, len(number))
    logits = torch.sparse.mm(features(dataset.test, idf, index), weights) + biases
    return [dataset.labels[int(i)] for i in logits.argmax(1)]
