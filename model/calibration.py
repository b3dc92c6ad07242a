"""The ranges of activations that static 8 bits stand for, from texts like those to come."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pocketfed.model.encoded import Encoded, encode_texts, joined
from pocketfed.model.fake_quant import STEPS, Site, sites
from pocketfed.model.finetuning import predict
from pocketfed.model.heads import TextClassifier
from pocketfed.model.quantization import QuantizationError
from pocketfed.model.schemes import Range
from pocketfed.model.task_layouts import read_splits
from pocketfed.model.tasks import LABELS, DataError, Example, read_dataset
from pocketfed.model.tokenization import Tokenizer

TEXTS = 256  # calibrate on so many, evenly picked
SHARES = tuple(share / 20 for share in range(20, 3, -1))  # of the seen range that may be kept: 1, 0.95, ... 0.2


def read_calibration(path: Path, tokenizer: Tokenizer, max_length: int) -> Encoded:
    """Up to TEXTS texts of a data set or a text file, evenly picked; with labels there must be two of them at least.

    Raises:
        QuantizationError: no text, or labelled texts of one label: what the other labels' texts do was not seen then.
    """
    try:
        texts = read_dataset(path, labelled=False).train
        labels = _labels(path)
    except DataError as error:
        raise QuantizationError(f"{error}; calibration needs texts like those the model will read") from None
    if len(labels) == 1:
        raise QuantizationError(
            f"{path} holds texts of the one label {min(labels)!r}; calibrate on texts of all labels, else the ranges of the "
            "others are unknown"
        )
    return encode_calibration(texts, tokenizer, max_length)


def _labels(path: Path) -> set[str]:
    """What its column of labels says; nothing where there is none."""
    table = read_splits(path, labelled=False)["train"]
    column = next((name for name in LABELS if name in table.columns), None)
    return {str(row[column]) for row in table.rows if row.get(column) not in (None, "")} if column else set()


def encode_calibration(examples: Sequence[Example], tokenizer: Tokenizer, max_length: int) -> Encoded:
    """Up to TEXTS of them, evenly picked, as rows of ids without targets."""
    picked = examples[:: max(1, len(examples) // TEXTS)][:TEXTS]
    return encode_texts(picked, np.zeros(len(picked), np.int64), tokenizer, max_length)


def some_rows(encoded: Encoded, count: int = TEXTS) -> Encoded:
    """Up to `count` rows of ids, evenly picked, without targets."""
    rows = range(0, len(encoded), max(1, len(encoded) // count))[:count]
    ids = [encoded.ids[encoded.starts[i] : encoded.starts[i + 1]] for i in rows]
    return joined((), ids, np.zeros(len(rows), np.int64))


def calibrate(model: TextClassifier, texts: Encoded) -> dict[str, Range]:
    """Ranges by the names of a model's sites (`fake_quant.as_scheme`), which are set to them.

    A site's range is the part of what was seen that leaves the least squared error at 8 bits.

    Raises:
        QuantizationError: no texts, or activations that are not finite; the message names the place.
    """
    if not len(texts):
        raise QuantizationError("there is no text to calibrate on; give some like those the model will read")
    found = dict(sites(model.mobilebert))
    for site in found.values():
        site.watching = True
    predict(model, texts)
    return dict(_settled(found.items()))


def _settled(found: Iterable[tuple[str, Site]]) -> Iterable[tuple[str, Range]]:
    for name, site in found:
        if not (torch.isfinite(site.low) and torch.isfinite(site.high)):
            raise QuantizationError(f"what {name} reads is NaN or infinite; train again at a lower rate")
        seen = torch.cat([*site.seen, site.low[None], site.high[None]])
        site.low, site.high = best_range(seen, site.low, site.high)
        site.watching, site.seen = False, []
        yield name, (float(site.low), float(site.high))


def best_range(values: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The share of low .. high, 0 within it, whose 256 steps leave the least squared error; the widest of equals.

    >>> values = torch.cat([torch.linspace(0, 1, 1000), torch.tensor([1.5])])
    >>> [round(float(end), 2) for end in best_range(values, torch.tensor(0.0), torch.tensor(1.5))]
    [0.0, 1.5]
    """
    best, chosen = torch.inf, (low, high)
    for share in SHARES:
        step = ((high - low) * (share / STEPS)).clamp_min(1e-30)
        zero = torch.round(-low * share / step).clamp(0, STEPS).to(torch.int32)
        rounded = torch.fake_quantize_per_tensor_affine(values, step, zero, 0, STEPS)
        error = float((rounded - values).double().square().sum())
        if error < best:
            best, chosen = error, (low * share, high * share)
    return chosen
