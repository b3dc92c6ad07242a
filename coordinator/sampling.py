"""Which devices take part in a round."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def sample_cohort(
    devices: Mapping[int, str], cohort: int, seed: int, round_number: int, attempt: int = 1
) -> dict[int, str]:
    """`cohort` of the devices (id -> name), uniformly without replacement; 0 or too many: all. In order of their names.

    The same names, seed, round and attempt give the same cohort, whatever the ids are.
    """
    ordered = sorted(devices.items(), key=lambda item: item[1])
    if 0 < cohort < len(ordered):
        generator = np.random.Generator(np.random.PCG64([seed, round_number, *([attempt] if attempt > 1 else [])]))
        chosen = sorted(generator.choice(len(ordered), cohort, replace=False))
        ordered = [ordered[i] for i in chosen]
    return dict(ordered)
