"""The ways to quantize a model: their names, what each stores, and what products read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pocketfed.model.quantization import QuantizationError

Range = tuple[float, float]  # least and greatest value that eight bits of an activation stand for


@dataclass(frozen=True)
class Scheme:
    """bits: of a weight. activations: what matrix products read. learnt: trained on a task with the rounding in place."""

    name: str
    bits: int
    activations: Literal["float32", "dynamic", "static"]
    learnt: bool
    says: str


# From the smallest on; of equally small ones those whose products are of integers first.
SCHEMES: Mapping[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("int4", 4, "float32", False, "weights in 4 bits, a scale a group"),
        Scheme("int8-static", 8, "static", False, "int8, and products read 8 bits of ranges fixed by calibration"),
        Scheme("int8-qat", 8, "static", True, "int8-static, trained on a task with the rounding in place"),
        Scheme("int8-dynamic", 8, "dynamic", False, "int8, and products read 8 bits, one scale a token"),
        Scheme("int8", 8, "float32", False, "weights in 8 bits, a scale an output channel"),
    )
}


def scheme_of(name: str) -> Scheme:
    """
    >>> scheme_of("int4").bits
    4

    Raises:
        QuantizationError: no such scheme; the message lists those there are.
    """
    if name not in SCHEMES:
        raise QuantizationError(f"there is no quantization scheme {name!r}; choose one of {', '.join(SCHEMES)}")
    return SCHEMES[name]


def write_ranges(ranges: Mapping[str, Range]) -> str:
    """The text of `ranges.json`: `{"<where>": [least, greatest]}`, by name."""
    return json.dumps({name: list(ranges[name]) for name in sorted(ranges)}, indent=1) + "\n"


def read_ranges(text: str | bytes) -> dict[str, Range]:
    """The inverse of `write_ranges`.

    Raises:
        QuantizationError: something else.
    """
    try:
        ranges = {str(name): (float(low), float(high)) for name, (low, high) in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError, OverflowError):
        raise QuantizationError("ranges.json holds no ranges of activations; quantize the model again") from None
    for name, (low, high) in ranges.items():
        if not (math.isfinite(low) and math.isfinite(high) and low <= 0 <= high):
            raise QuantizationError(f"ranges.json gives {name} the range {low} to {high}; quantize the model again")
    return ranges
