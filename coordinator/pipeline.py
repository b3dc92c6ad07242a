"""A model at rest: its weights in eight bits, and what it measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pocketfed.model.config import BASELINES, STUDENTS, ConfigError, MobileBertConfig, any_preset
from pocketfed.model.shipped import located

INSPECTED_TOKENS = 128  # the length at which the paper counts


def quantize(model_dir: Path, out: Path, scheme: str = "int8") -> dict[str, Any]:
    """Store a model's weights by a scheme that needs nothing but the weights (`coordinator.quantizing` has the others).

    Raises:
        CheckpointError, QuantizationError: no usable model there, no room for the new one, or an unknown scheme.
    """
    from pocketfed.coordinator.quantizing import QuantizeOptions
    from pocketfed.coordinator.quantizing import quantize as by_options

    return by_options(model_dir, out, QuantizeOptions(scheme=scheme))


def inspect(name_or_dir: str | Path) -> dict[str, Any]:
    """Parameters, FLOPs (2 a multiply-add, 128 tokens) and bytes of a preset or a model folder, without its weights.

    Raises:
        ConfigError: neither a preset nor a folder. CheckpointError: a folder that holds no usable model.
    """
    name = str(name_or_dir)
    if name in STUDENTS or name in BASELINES:
        return {"name": name, "quantization": None, "labels": None, **sizes(any_preset(name))}
    folder = located(name_or_dir)
    if not folder.is_dir():
        try:
            any_preset(name)
        except ConfigError as error:
            raise ConfigError(f"{error}; nor is there a folder of that name") from None
    from pocketfed.model import checkpoints

    checkpoint = checkpoints.load(folder)
    return {
        "name": name,
        "quantization": checkpoint.quantization,
        "labels": list(checkpoint.labels) if checkpoint.labels else None,
        "bytes_on_disk": sum(p.stat().st_size for p in folder.iterdir() if p.is_file()),
        **sizes(checkpoint.config),
    }


def size_table() -> list[dict[str, Any]]:
    """The paper's models, its figures beside those counted here (`model.published`)."""
    from pocketfed.model.published import PUBLISHED

    return [
        {
            "name": row.name,
            "parameters": row.parameters,
            "paper_parameters": None if row.millions is None else round(row.millions * 1e6),
            "flops": row.flops,
            "paper_flops": None if row.billions is None else round(row.billions * 1e9),
            "note": row.note,
        }
        for row in PUBLISHED
    ]


def sizes(config: MobileBertConfig) -> dict[str, Any]:
    from pocketfed.model.checkpoints import stored_sizes
    from pocketfed.model.mobilebert import count_flops

    return {
        "parameters": count(config),
        "flops": count_flops(config, INSPECTED_TOKENS),
        "tokens": INSPECTED_TOKENS,
        "bytes": stored_sizes(config),
        "config": config.to_dict(),
    }


def count(config: MobileBertConfig) -> int:
    from pocketfed.model.mobilebert import count_parameters

    return count_parameters(config)
