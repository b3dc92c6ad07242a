"""Strategies by name: ours, which read updates from the spool as they need them, and Flower's."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from pocketfed.coordinator import flwr_compat  # noqa: F401 - first: it silences flwr before flwr is imported

# isort: split
import flwr.serverapp.strategy as flower
from flwr.serverapp.strategy import Strategy

from pocketfed.coordinator.lora import ExactLoRA, FFALoRA, RoLoRA
from pocketfed.coordinator.robust import (
    StreamingGeometricMedian,
    StreamingKrum,
    StreamingMedian,
    StreamingTrimmedMean,
)
from pocketfed.coordinator.scaffold import Scaffold
from pocketfed.coordinator.strategy_base import THETA, DeltaArray, Ours, StrategyError, StreamingFedAvg

__all__ = [
    "AVERAGING",
    "DEFAULT",
    "OURS",
    "THETA",
    "DeltaArray",
    "StrategyError",
    "asks_more",
    "make_strategy",
    "strategy_names",
]

DEFAULT = "StreamingFedAvg"
NEEDS_OTHER_REPLIES = ("FedXgbBagging", "FedXgbCyclic")  # trees, not parameter vectors
AVERAGING = (StreamingFedAvg, StreamingTrimmedMean, StreamingMedian, StreamingKrum, StreamingGeometricMedian)
ASKING_MORE = (FFALoRA, RoLoRA, ExactLoRA, Scaffold)  # of devices than to train and send all of theta
OURS: dict[str, type[Ours]] = {kind.__name__: kind for kind in (*AVERAGING, *ASKING_MORE)}


def asks_more(name: str) -> bool:
    """Whether a strategy asks devices for forms or steps that only those know which know forms."""
    return name.lower() in {kind.__name__.lower() for kind in ASKING_MORE}


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
    if chosen == "FedProx" and not options.get("proximal_mu"):  # Flower's default, 0, would also undo local.proximal_mu
        raise StrategyError("FedProx without strategy_options.proximal_mu is FedAvg; set it, e.g. to 0.01")
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
