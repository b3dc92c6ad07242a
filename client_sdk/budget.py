"""Keeping a process below a limit on memory: how many examples at a time a plan is given."""

from __future__ import annotations

import math
import resource
import sys
from pathlib import Path

from pocketfed.client_sdk.artifacts import Needs, TrainableSet
from pocketfed.client_sdk.errors import ConfigurationError

# Measured (docs/results.md): what a plan holds beyond the values of its graph.
COPIES_OF_WEIGHTS = 1.2  # held once, and the graph around them
SLACK = 2.3  # of the activations: nothing is computed in place, and freed memory is not always used again
OVERHEAD_BYTES = 24e6  # of a session and its first run
CACHE_SHARE = 0.2  # of the limit, for what the prefix made


def resident_bytes() -> int:
    """What this process holds in memory now (Linux), or the most that it ever held (elsewhere)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Budget:
    """Decides for one trainable set. Gradients of the parts of a batch are put together, so only time changes.

    Args:
        max_memory_mb: of the whole process, resident; 0: no limit.
    """

    def __init__(self, trainable_set: TrainableSet, name: str, max_memory_mb: float = 0.0) -> None:
        if not 0 <= max_memory_mb < math.inf:
            raise ConfigurationError(f"max_memory_mb is {max_memory_mb}; give a positive number, or 0 for no limit")
        self.limit = max_memory_mb * 1e6
        self._set, self._name = trainable_set, name
        self._resident: dict[str, float] = {}  # plan -> what the process held once it was open

    def cache_bytes(self, wanted: float) -> int:
        return int(min(wanted, CACHE_SHARE * self.limit) if self.limit else wanted)

    def before_opening(self, plan: str, tokens: int) -> None:
        """
        Raises:
            ConfigurationError: the limit is too low for this plan and one example of that length.
        """
        if self.limit:
            needs = self._set.needs[plan]
            self._demand(resident_bytes() + COPIES_OF_WEIGHTS * needs.weights, needs, tokens)

    def opened(self, plan: str) -> None:
        self._resident[plan] = resident_bytes()

    def micro_batch(self, plan: str, count: int, tokens: int) -> int:
        """How many of `count` examples of that length may be computed with at once, at least 1.

        Raises:
            ConfigurationError: not even one.
        """
        if not self.limit:
            return count
        needs, resident = self._set.needs[plan], self._resident[plan]
        self._demand(resident, needs, tokens)
        fits = [m for m in range(1, count + 1) if self._total(resident, needs, m, tokens) <= self.limit]
        most = max(fits)
        return math.ceil(count / math.ceil(count / most))  # parts of about one size

    def _total(self, resident: float, needs: Needs, batch: int, tokens: int) -> float:
        return resident + OVERHEAD_BYTES + SLACK * needs.bytes(batch, tokens)

    def _demand(self, resident: float, needs: Needs, tokens: int) -> None:
        least = self._total(resident, needs, 1, tokens)
        if least > self.limit:
            raise ConfigurationError(
                f"max_memory_mb is {self.limit / 1e6:g}; {self._name} on texts of {tokens} tokens needs {math.ceil(least / 1e6)}: "
                "allow that, shorten the texts or choose a smaller set"
            )
