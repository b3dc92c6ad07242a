"""SCAFFOLD: control variates that take the drift of unlike devices out of their steps (Karimireddy et al. 2020)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pocketfed.coordinator import flwr_compat  # noqa: F401 - first: it silences flwr before flwr is imported

# isort: split
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from pocketfed.coordinator.aggregation import Float64, RunningMean
from pocketfed.coordinator.config import RunConfig
from pocketfed.coordinator.strategy_base import THETA, Ours, StrategyError, WeightedMean, moved, read_update, within
from pocketfed.model.codecs import parse_codec
from pocketfed.model.parameters import CONTROL, Parameter, Vector


class Scaffold(Ours):
    """SCAFFOLD with option II (Karimireddy et al. 2020, algorithm 1), its means unweighted as there.

    A device steps by g - c_i + c (eq. 3) and keeps c_i+ = c_i - c + (x - y_i) / (K η) (eq. 4), K its steps, η its rate. Since
    c_i+ - c_i then follows from c and the update y_i - x, the coordinator works it out: nothing goes up that FedAvg does not
    send. c goes down with theta: twice the bytes there. A c_i is a mean of clipped gradients, so an honest one changes by at most
    two `local.max_grad_norm`: what a device makes of it by lying about K is cut to that.

    Args:
        server_learning_rate: η_g of eq. 5.
        devices: N, how many there are in all; 0: as many as have taken part so far.
    """

    def __init__(self, server_learning_rate: float = 1.0, devices: int = 0) -> None:
        self.server_learning_rate = within("server_learning_rate", server_learning_rate, 0, 100)
        self.devices = within("devices", devices, 0, 10**9)
        self.rate = self.most = 0.0
        self.total: Float64 = np.zeros(0)  # the sum of all c_i, (P,); empty: before the first round
        self.seen: set[int] = set()  # nodes that have taken part

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "seen": sorted(self.seen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.total, self.seen = state["total"], set(state["seen"])

    def prepare(self, config: RunConfig, layout: Sequence[Parameter]) -> None:
        local, update = config.local, config.update
        wanted = {
            "mode": (config.mode, "sync"),
            "local.optimizer": (local.optimizer, "sgd"),
            "local.momentum": (local.momentum, 0),
            "local.proximal_mu": (local.proximal_mu, 0),
            "local.schedule": (local.schedule, "constant"),
            "local.warmup": (local.warmup, 0),
            "local.patience": (local.patience, 0),
            "update.noise": (update.noise, 0),
            "update.private": (list(update.private), []),
        }
        for name, (has, needs) in wanted.items():
            if has != needs:
                raise StrategyError(f"Scaffold is defined for {name} = {needs!r}, not {has!r}; set that")
        if "steps" not in update.metrics or parse_codec(update.codec).feeds_back:
            raise StrategyError(
                "Scaffold needs devices to tell their steps (update.metrics), and a codec without error feedback "
                f"(not {update.codec}); set these"
            )
        if not (local.learning_rate and local.max_grad_norm):
            raise StrategyError(
                f"Scaffold divides by local.learning_rate, {local.learning_rate:g}, and bounds its control variate by "
                f"local.max_grad_norm, {local.max_grad_norm:g}; set both above 0"
            )
        self.most = 2 * local.max_grad_norm

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self.rate = float(config["learning_rate"])  # of this round
        size = arrays[THETA].numpy().size
        self.total = self.total if self.total.size else np.zeros(size)
        both = ArrayRecord({THETA: arrays[THETA], CONTROL: Array(self.control())})
        return super().configure_train(server_round, both, config, grid)

    def control(self) -> Vector:
        """c, the mean of all c_i, those of devices that have not taken part yet being 0; as it goes down."""
        return (self.total / max(self.devices, len(self.seen), 1)).astype(np.float32)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        mean, metrics, control = None, WeightedMean(), self.control()
        for reply in replies:
            if reply.has_error():
                continue
            start, delta, record = read_update(reply)
            mean = mean or RunningMean(start.size)
            mean.add(delta, 1.0)
            metrics.add(record, float(record["num-examples"]))
            self.seen.add(int(reply.metadata.src_node_id))
            if per_step := _per_step(record.get("steps"), self.rate):
                change = -(control + per_step * delta.vector().astype(np.float64))  # c_i+ - c_i (eq. 4)
                length = float(np.linalg.norm(change))
                self.total = self.total + change * min(1.0, self.most / length if length else 1.0)
            del delta
        if mean is None:
            return None, None
        return moved(start, self.server_learning_rate * mean.result()), metrics.result()


def _per_step(steps: Any, rate: float) -> float:
    """1 / (K η) (eq. 4); 0 where the number of steps is none."""
    known = isinstance(steps, int | float) and not isinstance(steps, bool) and np.isfinite(steps) and steps >= 1
    return 1.0 / (float(steps) * rate) if known else 0.0
