"""What our strategies share: the whole cohort asked, updates read from the spool as they are needed; and FedAvg."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pocketfed.coordinator import flwr_compat  # noqa: F401 - first: it silences flwr before flwr is imported

# isort: split
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from pocketfed.coordinator import aggregation
from pocketfed.coordinator.aggregation import Delta, RunningMean
from pocketfed.coordinator.config import RunConfig
from pocketfed.model.parameters import Parameter, Vector

T = TypeVar("T", int, float)
THETA = "theta"
MAX_NAMES = 64  # of metrics in a round


class StrategyError(ValueError):
    """A strategy that does not exist, does not take an option, or does not suit the run."""


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


class HeldArray(Array):  # type: ignore[misc]
    """Values as they are, serialized when somebody asks for their bytes: who is in this process never does."""

    def __init__(self, values: Vector) -> None:
        self.dtype, self.shape, self.stype = str(values.dtype), values.shape, "numpy.ndarray"
        self.values = values

    def numpy(self) -> Vector:
        copied: Vector = self.values.copy()  # a reader may change its own
        return copied

    @property
    def data(self) -> bytes:
        serialized: bytes = Array(self.values).data
        return serialized


class Ours(Strategy):  # type: ignore[misc]
    """What our strategies share: they ask the whole cohort, and take metrics' means weighted by examples.

    Replies come checked, clipped and capped from `screening.screen`, in the order of the devices' names, so the result
    does not depend on who was first.
    """

    def prepare(self, config: RunConfig, layout: Sequence[Parameter]) -> None:
        """Told of the run it is to drive, and what theta's values are called, whenever a coordinator begins with it.

        Raises:
            StrategyError: the run is not one for this strategy.
        """

    def summary(self) -> None:
        """Nothing to print: the run's configuration is in the store."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return messages_for(MessageType.TRAIN, server_round, arrays, config, grid)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return messages_for(MessageType.EVALUATE, server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        metrics = WeightedMean()
        for reply in replies:
            if not reply.has_error():
                record = reply.content["metrics"]
                metrics.add(record, float(record["num-examples"]))
        return metrics.result()


class StreamingFedAvg(Ours):
    """FedAvg (McMahan et al. 2017, algorithm 1), replies folded in as they come, float64 sums.

    Memory: 8 bytes a parameter and one update, whatever the number of devices.

    Args:
        workers: threads that share out the parameters; any number gives the same bits. For models of many MB.
    """

    def __init__(self, workers: int = 1) -> None:
        self.workers = within("workers", workers, 1, 64)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        running, metrics = None, WeightedMean()
        with ThreadPoolExecutor(self.workers) as pool:  # which makes no thread before it is given work
            for start, delta, record in updates(replies):
                running = running or RunningMean(len(start), pool, self.workers)
                weight = float(record["num-examples"])
                running.add(delta, weight)
                metrics.add(record, weight)
                del delta  # or it would be held while the next one is made
        if running is None:
            return None, None
        return moved(start, running.result()), metrics.result()


def within(name: str, value: T, low: float, high: float) -> T:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}, not a number between {low:g} and {high:g}")
    return value


def updates(replies: Iterable[Message]) -> Iterator[tuple[Vector, Delta, MetricRecord]]:
    """(start, update, metrics) of each reply; one that no screen has seen is taken as a difference from nothing."""
    for reply in replies:
        if not reply.has_error():
            yield read_update(reply)


def read_update(reply: Message) -> tuple[Vector, Delta, MetricRecord]:
    array = reply.content["arrays"][THETA]
    if not isinstance(array, DeltaArray):
        trained = array.numpy()
        array = DeltaArray(np.zeros(trained.shape, np.float32), Delta(trained, trained.size))
    return array.start, array.delta, reply.content["metrics"]


def arrays_of(theta: Vector) -> ArrayRecord:
    """What a round's messages start from."""
    arrays = ArrayRecord()
    arrays[THETA] = HeldArray(theta)  # not in the constructor: that would make a plain Array of it
    return arrays


def moved(start: Vector, difference: NDArray[np.float64]) -> ArrayRecord:
    return ArrayRecord({THETA: Array(aggregation.apply(start, difference))})


def messages_for(kind: str, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> list[Message]:
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
