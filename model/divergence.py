"""Telling a training that has gone wrong from one that is only noisy, by its losses."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

# A loss is compared with the first one of its stage or phase, which untrained weights give: warm-up and the mix of texts move it
# by a small factor, weights that run away by powers of ten.
AT_ONCE = 1000.0  # times as high: stop; to a hundred times a first step at the full rate may jump, and come back
FOR_LONG, LONG = 10.0, 25  # times as high, the median of so many steps: stop
LEAST_START = 10.0  # about what guessing among words costs: a stage that begins with less may well go up to it
ABOVE_RECENT = 3.0  # times the median of the last ones,
ABOVE_FIRST = 2.0  # or times the first and not level since: a bad moment to keep weights


def has_diverged(first: float, last: Sequence[float]) -> bool:
    """Whether the last of a stage's or a phase's losses, all finite, are far above its first.

    >>> has_diverged(600.0, [3000.0, 590_000.0]), has_diverged(600.0, [3000.0, 610_000.0])
    (False, True)
    >>> has_diverged(600.0, [6_100.0] * 24), has_diverged(600.0, [600.0] * 12 + [6_100.0] * 13)
    (False, True)
    """
    start = max(first, LEAST_START)
    return last[-1] > AT_ONCE * start or (len(last) >= LONG and statistics.median(last[-LONG:]) > FOR_LONG * start)


def is_calm(losses: Sequence[float], loss: float) -> bool:
    """Whether the weights that gave `loss`, after `losses` of the same stage or phase, are good ones to go back to.

    >>> is_calm([], 600.0), is_calm([600.0, 500.0], 700.0), is_calm([600.0, 100.0, 90.0], 400.0)
    (True, True, False)
    >>> is_calm([20.0, 30.0], 45.0), is_calm([20.0] + [45.0] * 25, 45.0), is_calm([20.0] + [45.0] * 50, 45.0)
    (False, False, True)
    """
    if not losses:
        return True
    earlier, later = losses[-2 * LONG : -LONG], losses[-LONG:]
    if loss > ABOVE_RECENT * statistics.median([*earlier, *later]):
        return False
    level = len(earlier) == LONG and statistics.median(later) <= statistics.median(earlier)
    return level or loss <= ABOVE_FIRST * max(losses[0], LEAST_START)
