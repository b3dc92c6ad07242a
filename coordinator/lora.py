"""Federations of LoRA (y = W x + s B A x): where the mean of the products is not the product of the means.

Averaging A and B each by itself, as `StreamingFedAvg` does with any trainable set ("naive"; FedIT, Zhang et al. 2024),
gives mean(B_i) mean(A_i), not mean(B_i A_i). Three ways out of that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from pocketfed.coordinator import flwr_compat  # noqa: F401 - first: it silences flwr before flwr is imported

# isort: split
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from pocketfed.coordinator.aggregation import Float64, RunningMean
from pocketfed.coordinator.config import RunConfig
from pocketfed.coordinator.strategy_base import StrategyError, StreamingFedAvg, WeightedMean, moved, updates
from pocketfed.model.codecs import parse_codec
from pocketfed.model.parameters import Parameter, Split, Vector, lora_pairs, split_private

FROZEN, RANK = "update.frozen", "update.lora_rank"
Pairs = tuple[tuple[Parameter, Parameter], ...]


class _Lora(StreamingFedAvg):
    """What they share: a trainable set with LoRA, and nothing to remember from round to round."""

    pairs: Pairs = ()

    def prepare(self, config: RunConfig, layout: Sequence[Parameter]) -> None:
        self.pairs = lora_pairs(layout)
        if not self.pairs:
            raise StrategyError(f"{type(self).__name__} needs a trainable set with LoRA, e.g. lora:8; choose that")

    def state_dict(self) -> dict[str, Any]:
        """The layout is the artifact's."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing was kept."""


class FFALoRA(_Lora):
    """A stays at its shared start, B alone is trained: mean(B_i) A = mean(B_i A) (FFA-LoRA; Sun et al. 2024, section 4).

    Devices send B only: half the bytes, where A and B are of one size. theta goes down whole.
    """

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        _freeze(config, "lora_A")
        return super().configure_train(server_round, arrays, config, grid)


class RoLoRA(_Lora):
    """B in odd rounds, A in even ones, the other frozen: each mean is exact (RoLoRA; Chen et al. 2024, section 3).

    B first: it begins as 0, and A has no gradient until it has moved. Devices send half the bytes.
    """

    def prepare(self, config: RunConfig, layout: Sequence[Parameter]) -> None:
        super().prepare(config, layout)
        _need_sync(config, self)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        _freeze(config, "lora_A" if server_round % 2 else "lora_B")
        return super().configure_train(server_round, arrays, config, grid)


class ExactLoRA(_Lora):
    """Σ w_i B_i A_i, re-factored to rank r by a truncated SVD (FlexLoRA; Bai et al. 2024, section 3).

    The sum is the product of the stacked matrices (FLoRA; Wang et al. 2024, eq. 4), of rank up to n r. What rank r cannot hold
    FedEx-LoRA (Singhal et al. 2025) adds to the frozen weights; ours are int8 and stay, so it is lost, and its share of the
    sum's Frobenius norm is the metric `train_lora_residual`. The best rank-r answer there is (Eckart and Young 1936).

    Memory: 8 bytes a value of every matrix that LoRA changes, and one update.

    Args:
        ranks: device names, with * and ?, to the rank that such devices train and send: the first so many rows of A and
            columns of B, which after the SVD are the strongest. Of several patterns the longest counts, of none all ranks.
    """

    def __init__(self, ranks: Mapping[str, int] | None = None) -> None:
        super().__init__()
        given = {} if ranks is None else ranks
        whole = isinstance(given, Mapping) and all(type(rank) is int and rank >= 1 for rank in given.values())
        if not whole:
            raise ValueError(f"ranks is {ranks!r}, not a table of whole numbers from 1, e.g. {{'phone-*' = 4}}")
        self.ranks = dict(given)

    def prepare(self, config: RunConfig, layout: Sequence[Parameter]) -> None:
        super().prepare(config, layout)
        _need_sync(config, self)
        full = self.pairs[0][0].shape[0]
        for pattern, rank in self.ranks.items():
            if rank > full:
                raise StrategyError(
                    f"ranks has {rank} for {pattern!r}; the trainable set has rank {full}, give no more"
                )
        private = split_private(layout, config.update.private) if config.update.private else Split(0)
        factors = [p.offset for pair in self.pairs for p in pair]
        if parse_codec(config.update.codec).feeds_back or any(s <= o < e for o in factors for s, e in private.ranges):
            raise StrategyError(
                f"ExactLoRA factors anew every round, so nothing of A and B can stay on a device: not update.codec {config.update.codec} "
                f"with private {list(config.update.private)}; choose float32 or float16, and keep no LoRA private"
            )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        sent = list(super().configure_train(server_round, arrays, config, grid))
        if not self.ranks:
            return sent
        # Our grids know them; Flower's have no names.
        names: Mapping[int, str] = grid.cohort.devices
        for message in sent:
            rank = self.rank_of(names[message.metadata.dst_node_id])
            own = ConfigRecord({**config, RANK: rank})
            message.content = RecordDict({"arrays": arrays, "config": own})
        return sent

    def rank_of(self, device: str) -> int:
        """0: all."""
        matching = sorted((p for p in self.ranks if fnmatchcase(device, p)), key=lambda p: (len(p), p))
        return self.ranks[matching[-1]] if matching else 0

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        running, metrics = None, WeightedMean()
        products: list[Float64] = [np.zeros((b.shape[0], a.shape[1])) for a, b in self.pairs]
        for start, delta, record in updates(replies):
            running = running or RunningMean(len(start))
            weight = float(record["num-examples"])
            running.add(delta, weight)
            metrics.add(record, weight)
            trained = start.astype(np.float64) + delta.vector()
            for product, (a, b) in zip(products, self.pairs, strict=True):
                product += weight * (_matrix(trained, b) @ _matrix(trained, a))
            del delta
        if running is None:
            return None, None
        theta = start + running.result()  # (P,) float64: all but A and B as FedAvg has them
        lost, whole = 0.0, 0.0
        for product, (a, b) in zip(products, self.pairs, strict=True):
            down, up, left, norm = factored(product / running.weight, _matrix(theta, a))
            _matrix(theta, a)[...], _matrix(theta, b)[...] = down, up
            lost, whole = lost + left**2, whole + norm**2
        told = metrics.result() or MetricRecord()
        told["lora_residual"] = float(np.sqrt(lost / whole)) if whole else 0.0
        return moved(start, theta - start), told


def factored(product: Float64, near: Float64) -> tuple[Float64, Float64, float, float]:
    """A (r, in) and B (out, r) with B A nearest to the product (out, in), what is lost of its norm, and its norm.

    The rows of A are orthogonal, as long as those of `near` (r, in) on average: a balanced split would shrink A to where
    B, and so the product, hardly moves, and a row without a singular value would be dead.
    """
    rank = near.shape[0]
    left, values, right = np.linalg.svd(product, full_matrices=False)  # (out, k), (k,), (k, in); k = min(out, in) >= r
    signs = np.sign(right[np.arange(rank), np.abs(right[:rank]).argmax(1)])  # else they are LAPACK's choice
    length = float(np.linalg.norm(near)) / np.sqrt(rank) or 1.0
    down = length * signs[:, None] * right[:rank]
    up = left[:, :rank] * (signs * values[:rank] / length)
    return down, up, float(np.linalg.norm(values[rank:])), float(np.linalg.norm(values))


def _matrix(theta: Vector | Float64, p: Parameter) -> Any:
    """A view of theta."""
    return theta[p.offset : p.offset + p.size].reshape(p.shape)


def _freeze(config: ConfigRecord, name: str) -> None:
    config[FROZEN] = [*config.get(FROZEN, []), name]


def _need_sync(config: RunConfig, strategy: _Lora) -> None:
    if config.mode != "sync":
        raise StrategyError(
            f"{type(strategy).__name__} with mode {config.mode!r} would mix updates of different factors; set mode to sync"
        )
