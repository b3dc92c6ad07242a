"""Quantizing a model folder: by a scheme, or by the smallest one that a task does not feel, and saying what it costs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocketfed.coordinator.quantize_attempts import Attempt, Attempts, Progress
from pocketfed.coordinator.quantize_attempts import QuantizeOptions as QuantizeOptions
from pocketfed.model.shipped import located

if TYPE_CHECKING:  # torch is imported only where models are read
    from pocketfed.model.checkpoints import Checkpoint
    from pocketfed.model.schemes import Scheme

NAMED = 5  # layers that lose most
SECTION = "## Quantization"  # of the model card


def quantize(
    model_dir: Path,
    out: Path,
    options: QuantizeOptions,
    progress: Progress = lambda what, fraction: None,
) -> dict[str, Any]:
    """Store a model by a scheme; returns what is also written to its quantization.json.

    Raises:
        CheckpointError: no usable float model there, or no room for the new one.
        QuantizationError: a scheme that does not exist or lacks what it needs, or none within the budget.
        DataError: data to measure on that is unusable.
    """
    from pocketfed.model import checkpoints

    model_dir = located(model_dir)
    checkpoints.check_writable(out)
    schemes = wanted_schemes(options)
    work = Attempts(float_model(model_dir, schemes, options.group), schemes, options, progress)
    every = [work.attempt(schemes[0], options.keep)] if options.budget is None else list(work.within_budget())
    report = report_of(work, every[-1], every, _weight_bytes(model_dir))
    card = model_dir / checkpoints.CARD
    before = card.read_text(encoding="utf-8").split(f"\n{SECTION}\n")[0] if card.is_file() else f"# {Path(out).name}\n"
    text = json.dumps(report, indent=1) + "\n"
    checkpoints.save(every[-1].checkpoint, out, f"{before}\n{card_section(report)}", text)
    return {"folder": str(out), **report}


def wanted_schemes(options: QuantizeOptions) -> list[Scheme]:
    """What to try, in order. Raises QuantizationError where a scheme lacks what it needs."""
    from pocketfed.model.quantization import QuantizationError
    from pocketfed.model.schemes import SCHEMES, scheme_of

    if options.budget is not None and not options.budget >= 0:
        raise QuantizationError(f"a budget of {options.budget} points is none; give 0 or more, such as 0.5")
    if options.budget is not None and options.dev is None:
        raise QuantizationError(f"a budget of {options.budget:g} points needs data to measure on; give --dev DATA")
    if options.budget is not None and not options.scheme:
        return [scheme for scheme in SCHEMES.values() if not scheme.learnt]
    scheme = scheme_of(options.scheme or "int8")
    if scheme.learnt and options.dev is None:
        raise QuantizationError(f"{scheme.name} trains on a task; give its data with --dev DATA")
    if scheme.activations == "static" and options.calibrate is None and options.dev is None:
        raise QuantizationError(f"{scheme.name} needs texts to fix ranges by; give --calibrate DATA or --dev DATA")
    return [scheme]


def float_model(model_dir: Path, schemes: Sequence[Scheme], group: int) -> Checkpoint:
    """The model to quantize, which is not rounded already but by the very scheme asked for.

    Raises:
        CheckpointError: an artifact, something else, or a model that another scheme has rounded.
    """
    from pocketfed.model import checkpoints

    if (Path(model_dir) / "manifest.json").is_file():
        raise checkpoints.CheckpointError(
            f"{model_dir} is a published artifact, whose weights lie in plans; quantize the model folder it was made from"
        )
    checkpoint = checkpoints.load(model_dir)
    storage = checkpoint.storage
    if storage is None:
        return checkpoint
    other = {checkpoint.quantization} != {scheme.name for scheme in schemes}
    if other or (storage.bits == 4 and storage.group != group):
        raise checkpoints.CheckpointError(
            f"{model_dir} is quantized already ({checkpoint.quantization}), and rounding twice loses twice; quantize the "
            "float model it was made from"
        )
    return checkpoint


def _weight_bytes(model_dir: Path) -> int:
    from pocketfed.model import checkpoints

    path = model_dir / checkpoints.WEIGHTS
    return (path if path.is_file() else model_dir / checkpoints.ARRAYS).stat().st_size


def report_of(work: Attempts, chosen: Attempt, every: Sequence[Attempt], bytes_before: int) -> dict[str, Any]:
    """What is told and stored of the scheme that was chosen, and of every one that was tried."""
    errors = chosen.errors
    layers = {
        name: {**asdict(error), "output": chosen.outputs.get(name.removesuffix(".weight"))}
        for name, error in errors.items()
    }
    checkpoint = chosen.checkpoint
    return {
        "scheme": checkpoint.quantization,
        "bytes_before": bytes_before,
        "bytes_after": chosen.bytes,
        "sha256": chosen.digest,
        "ratio": bytes_before / chosen.bytes,
        "group": checkpoint.group,
        "keep": list(checkpoint.keep),
        "largest_error": max((error.largest for error in errors.values()), default=0.0),
        "mean_error": sum(error.mean for error in errors.values()) / max(1, len(errors)),
        "worst": chosen.worst()[:NAMED],
        "dev": _dev(work, chosen),
        "tried": [
            {
                "scheme": a.checkpoint.quantization,
                "keep": list(a.checkpoint.keep),
                "bytes": a.bytes,
                **({} if a.value is None or work.value is None else {"lost": work.value - a.value}),
            }
            for a in every
        ],
        "errors": layers,
    }


def _dev(work: Attempts, chosen: Attempt) -> dict[str, Any] | None:
    if work.trial is None or work.value is None or chosen.value is None:
        return None
    return {
        "data": work.trial.name,
        "split": work.trial.split,
        "examples": len(work.trial.dev.examples),
        "metric": work.trial.metric,
        "float": work.value,
        "quantized": chosen.value,
        "lost": work.value - chosen.value,
    }


def card_section(report: dict[str, Any]) -> str:
    """What the folder's README.md says of it."""
    lines = [
        SECTION,
        "",
        f"{report['scheme']}: {report['bytes_after']:,} bytes of weights, {report['ratio']:.2f} times fewer than before. "
        f"Largest error of a weight {report['largest_error']:.2g}, mean {report['mean_error']:.2g}.",
        f"Layers that lose most: {', '.join(report['worst'])}.",
    ]
    if report["keep"]:
        lines.append(f"Kept wider: {', '.join(report['keep'])}.")
    dev = report["dev"]
    if dev is not None:
        lines.append(
            f"{dev['metric']} on {dev['examples']} examples of {dev['data']} ({dev['split']}): {dev['float']:.2f} before, "
            f"{dev['quantized']:.2f} after."
        )
    return "\n".join(lines) + "\n"
