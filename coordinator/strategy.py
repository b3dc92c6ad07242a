"""Strategies by name: ours, which read updates from the spool as they need them, and Flower's."""

from __future__ import annotations

import inspect
import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pocketfed.coordinator import flwr_compat  # noqa: F401 - first: it silences flwr before flwr is imported

# isort: split
import flwr.serverapp.strategy as flower
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from pocketfed.coordinator import aggregation
from pocketfed.coordinator.aggregation import Delta, RunningMean
from pocketfed.model.parameters import Vector

T = TypeVar("T", int, float)
DEFAULT = "StreamingFedAvg"
THETA = "theta"
MAX_NAMES = 64  # of metrics in a round
NEEDS_OTHER_REPLIES = ("FedXgbBagging", "FedXgbCyclic")  # trees, not parameter vectors


class StrategyError(ValueError):
    """A strategy that does not exist or does not take an option."""


class DeltaArray(Array):  # type: ignore[misc]
    """A device's trained parameters as any Flower strategy expects them: start + update, added when they are asked for."""

    def __init__(self, start: Vector, delta: Delta) -> None:
        # Array's own would serialize the values; these are read from their file if somebody wants them.
        self.dtype, self.shape, self.stype = "float32", start.shape, "numpy.ndarray"
        self.start, self.delta = start, delta

    def numpy(self) -> Vector:
        trained: Vector = self.start + self.delta.vector()
        return trained

    @property
    def data(self) -> bytes:
        serialized: bytes = Array(self.numpy()).data
        return serialized


class _Ours(Strategy):  # type: ignore[misc]
    """What our strategies share: they ask the whole cohort, and take metrics' means weighted by examples.

    Replies come checked, clipped and capped from `screening.screen`, in the order of the devices' names, so the result
    does not depend on who was first.
    """

    def summary(self) -> None:
        """Nothing to print: the run's configuration is in the store."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return _messages(MessageType.TRAIN, server_round, arrays, config, grid)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return _messages(MessageType.EVALUATE, server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        metrics = WeightedMean()
        for reply in replies:
            if not reply.has_error():
                record = reply.content["metrics"]
                metrics.add(record, float(record["num-examples"]))
        return metrics.result()


class StreamingFedAvg(_Ours):
    """FedAvg (McMahan et al. 2017, algorithm 1), replies folded in as they come, float64 sums.

    Memory: 8 bytes a parameter and one update, whatever the number of devices.

    Args:
        workers: threads that share out the parameters; any number gives the same bits. For models of many MB.
    """

    def __init__(self, workers: int = 1) -> None:
        self.workers = _within("workers", workers, 1, 64)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        running, metrics = None, WeightedMean()
        with ThreadPoolExecutor(self.workers) as pool:  # which makes no thread before it is given work
            for start, delta, record in _updates(replies):
                running = running or RunningMean(len(start), pool, self.workers)
                weight = float(record["num-examples"])
                running.add(delta, weight)
                metrics.add(record, weight)
                del delta  # or it would be held while the next one is made
        if running is None:
            return None, None
        return _result(start, running.result()), metrics.result()


class _Robust(_Ours):
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
        for start, delta, record in _updates(replies):  # noqa: B007 - the same start for all
            delta.drop()
            deltas.append(delta)
            weights.append(float(record["num-examples"]))
            metrics.add(record, weights[-1])
        if start is None:
            return None, None
        return _result(start, self.combine(deltas, weights)), metrics.result()


class StreamingTrimmedMean(_Robust):
    """Each parameter's mean without its smallest and largest values; unweighted (Yin et al. 2018).

    Memory: 8 bytes a parameter and 32 MB; the updates stay in the spool.

    Args:
        beta: the share cut off at either end; it withstands that share of colluders.
    """

    def __init__(self, beta: float = 0.2) -> None:
        self.beta = _within("beta", beta, 0, 0.499)

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
        self.malicious, self.selected = _within("malicious", malicious, 0, 0.499), _within("selected", selected, 0, 1e9)

    def combine(self, deltas: Sequence[Delta], weights: Sequence[float]) -> NDArray[np.float64]:
        suspects = math.ceil(self.malicious * len(deltas))
        return aggregation.krum(deltas, weights, suspects, int(self.selected) or max(1, len(deltas) - suspects))


class StreamingGeometricMedian(_Robust):
    """The point nearest to all updates, RFA (Pillutla et al. 2022); weighted. Memory: 16 bytes a parameter and one update.

    Args:
        iterations: of Weiszfeld's algorithm, each of which reads all updates once.
    """

    def __init__(self, iterations: int = 8) -> None:
        self.iterations = _within("iterations", iterations, 1, 1000)

    def combine(self, deltas: Sequence[Delta], weights: Sequence[float]) -> NDArray[np.float64]:
        return aggregation.geometric_median(deltas, weights, int(self.iterations))


OURS: dict[str, type[_Ours]] = {
    kind.__name__: kind
    for kind in (StreamingFedAvg, StreamingTrimmedMean, StreamingMedian, StreamingKrum, StreamingGeometricMedian)
}


def _within(name: str, value: T, low: float, high: float) -> T:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}, not a number between {low:g} and {high:g}")
    return value


def _updates(replies: Iterable[Message]) -> Iterator[tuple[Vector, Delta, MetricRecord]]:
    """(start, update, metrics) of each reply; one that no screen has seen is taken as a difference from nothing."""
    for reply in replies:
        if not reply.has_error():
            array = reply.content["arrays"][THETA]
            if not isinstance(array, DeltaArray):
                trained = array.numpy()
                array = DeltaArray(np.zeros(trained.shape, np.float32), Delta(trained, trained.size))
            yield array.start, array.delta, reply.content["metrics"]


def _result(start: Vector, difference: NDArray[np.float64]) -> ArrayRecord:
    return ArrayRecord({THETA: Array(aggregation.apply(start, difference))})


def _messages(kind: str, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> list[Message]:
    """The same message to every node that the grid shows."""
    config["server-round"] = server_round
    record = RecordDict({"arrays": arrays, "config": config})
    return [Message(content=record, message_type=kind, dst_node_id=node) for node in grid.get_node_ids()]


class WeightedMean:
    """Means of metrics over devices, weighted by their examples; of the first MAX_NAMES names, whatever devices make up."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._weights: dict[str, float] = {}

    def add(self, record: Mapping[str, Any], weight: float) -> None:
        for name, value in record.items():
            room = name in self._sums or len(self._sums) < MAX_NAMES
            if room and name != "num-examples" and isinstance(value, (int, float)):
                self._sums[name] = self._sums.get(name, 0.0) + weight * value
                self._weights[name] = self._weights.get(name, 0.0) + weight

    def result(self) -> MetricRecord | None:
        return MetricRecord({n: s / self._weights[n] for n, s in self._sums.items()}) if self._sums else None


def strategy_names() -> list[str]:
    """Ours first, then those of Flower that aggregate parameter vectors."""
    names = [
        n
        for n in flower.__all__
        if n not in ("Strategy", "Result", *NEEDS_OTHER_REPLIES) and not n.startswith("DifferentialPrivacy")
    ]
    return [*OURS, *sorted(names)]


def make_strategy(name: str, options: Mapping[str, Any]) -> Strategy:
    """A strategy by its class's name (upper and lower case alike). Flower's see the sampled cohort and take all of it.

    Raises:
        StrategyError: no such strategy, or an option that it does not take.
    """
    by_name = {n.lower(): n for n in strategy_names()}
    if name.lower() not in by_name:
        raise StrategyError(f"there is no strategy {name!r}; choose one of {', '.join(by_name.values())}")
    chosen = by_name[name.lower()]
    kind = OURS.get(chosen) or getattr(flower, chosen)
    accepted = set(inspect.signature(kind).parameters)
    for option in options:
        if option not in accepted:
            raise StrategyError(
                f"{chosen} takes no option {option!r}; it takes {', '.join(sorted(accepted)) or 'none'}"
            )
    # The cohort was sampled already: Flower's strategy is shown only that, and takes all of it.
    defaults = {
        "fraction_train": 1.0,
        "min_train_nodes": 1,
        "fraction_evaluate": 1.0,
        "min_evaluate_nodes": 1,
        "min_available_nodes": 1,
    }
    try:
        return kind(**{k: v for k, v in defaults.items() if k in accepted} | dict(options))
    except (TypeError, ValueError) as error:
        raise StrategyError(
            f"{chosen} does not take the options {dict(options)}: {error}; give what is missing as "
            "strategy_options.NAME=VALUE"
        ) from None
