"""Strategies that withstand devices which lie: trimmed mean, median, Krum, geometric median."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from pocketfed.coordinator import flwr_compat  # noqa: F401 - first: it silences flwr before flwr is imported

# isort: split
from flwr.app import ArrayRecord, Message, MetricRecord

from pocketfed.coordinator import aggregation
from pocketfed.coordinator.aggregation import Delta
from pocketfed.coordinator.strategy_base import Ours, WeightedMean, moved, updates, within


class _Robust(Ours):
    """Strategies that need all updates at once: they stay in their files, a block of parameters is read at a time."""

    @abstractmethod
    def combine(self, deltas: Sequence[Delta], weights: Sequence[float]) -> NDArray[np.float64]:
        """What the updates come to, (P,)."""

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        deltas: list[Delta] = []
        weights: list[float] = []
        metrics = WeightedMean()
        start = None
        for start, delta, record in updates(replies):  # noqa: B007 - the same start for all
            delta.drop()
            deltas.append(delta)
            weights.append(float(record["num-examples"]))
            metrics.add(record, weights[-1])
        if start is None:
            return None, None
        return moved(start, self.combine(deltas, weights)), metrics.result()


class StreamingTrimmedMean(_Robust):
    """Each parameter's mean without its smallest and largest values; unweighted (Yin et al. 2018).

    Memory: 8 bytes a parameter and 32 MB; the updates stay in the spool.

    Args:
        beta: the share cut off at either end; it withstands that share of colluders.
    """

    def __init__(self, beta: float = 0.2) -> None:
        self.beta = within("beta", beta, 0, 0.499)

    def combine(self, deltas: Sequence[Delta], weights: Sequence[float]) -> NDArray[np.float64]:
        return aggregation.trimmed_mean(deltas, self.beta)


class StreamingMedian(_Robust):
    """Each parameter's median; unweighted (Yin et al. 2018). Memory: 8 bytes a parameter and 100 MB."""

    def combine(self, deltas: Sequence[Delta], weights: Sequence[float]) -> NDArray[np.float64]:
        return aggregation.median(deltas)


class StreamingKrum(_Robust):
    """The mean of the updates that lie closest to others (Blanchard et al. 2017). Memory: as the median, and 24 n² bytes.

    Args:
        malicious: the share of devices that may collude, below a half.
        selected: how many updates are taken: 1 is Krum, more Multi-Krum, 0 all but the malicious share.
    """

    def __init__(self, malicious: float = 0.2, selected: int = 0) -> None:
        self.malicious, self.selected = within("malicious", malicious, 0, 0.499), within("selected", selected, 0, 1e9)

    def combine(self, deltas: Sequence[Delta], weights: Sequence[float]) -> NDArray[np.float64]:
        suspects = math.ceil(self.malicious * len(deltas))
        return aggregation.krum(deltas, weights, suspects, int(self.selected) or max(1, len(deltas) - suspects))


class StreamingGeometricMedian(_Robust):
    """The point nearest to all updates, RFA (Pillutla et al. 2022); weighted. Memory: 16 bytes a parameter and one update.

    Args:
        iterations: of Weiszfeld's algorithm, each of which reads all updates once.
    """

    def __init__(self, iterations: int = 8) -> None:
        self.iterations = within("iterations", iterations, 1, 1000)

    def combine(self, deltas: Sequence[Delta], weights: Sequence[float]) -> NDArray[np.float64]:
        return aggregation.geometric_median(deltas, weights, int(self.iterations))
