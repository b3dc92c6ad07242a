"""Turning a cohort's updates into one: our streaming FedAvg, and Flower's strategies by name."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from pocketfed.coordinator import flwr_compat  # noqa: F401 - first: it silences flwr before flwr is imported

# isort: split
import flwr.serverapp.strategy as flower
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

DEFAULT = "StreamingFedAvg"
THETA = "theta"
MAX_NAMES = 64  # of metrics in a round
NEEDS_OTHER_REPLIES = ("FedXgbBagging", "FedXgbCyclic")  # trees, not parameter vectors


class StrategyError(ValueError):
    """A strategy that does not exist or does not take an option."""


class StreamingFedAvg(Strategy):  # type: ignore[misc]
    """FedAvg (McMahan et al. 2017, algorithm 1) that folds replies in as they come: memory O(model), float64 sums.

    The grid yields replies in the order of the devices' names, so the result does not depend on who was first. Weights
    come checked and capped from `rounds.screen`.
    """

    def summary(self) -> None:
        """Nothing to print: the run's configuration is in the store."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return _messages(MessageType.TRAIN, server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        total, weight_sum, metrics = None, 0.0, WeightedMean()
        for reply in replies:
            if reply.has_error():
                continue
            record = reply.content["metrics"]
            weight = float(record["num-examples"])
            theta = reply.content["arrays"][THETA].numpy().astype(np.float64)
            theta *= weight
            total = theta if total is None else np.add(total, theta, out=total)
            weight_sum += weight
            metrics.add(record, weight)
        if total is None:
            return None, None
        return ArrayRecord({THETA: Array((total / weight_sum).astype(np.float32))}), metrics.result()

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
    return [DEFAULT, *sorted(names)]


def make_strategy(name: str, options: Mapping[str, Any]) -> Strategy:
    """A strategy by its class's name (upper and lower case alike). Flower's see the sampled cohort and take all of it.

    Raises:
        StrategyError: no such strategy, or an option that it does not take.
    """
    by_name = {n.lower(): n for n in strategy_names()}
    if name.lower() not in by_name:
        raise StrategyError(f"there is no strategy {name!r}; choose one of {', '.join(by_name.values())}")
    chosen = by_name[name.lower()]
    kind = StreamingFedAvg if chosen == DEFAULT else getattr(flower, chosen)
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
