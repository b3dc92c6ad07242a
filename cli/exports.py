"""export: what is written, and what is said of it."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from pocketfed.cli.output import CommandError, format_bytes, print_json

if TYPE_CHECKING:  # torch is imported only where something is exported
    from pocketfed.model.exporting import ExportedPrediction

TARGETS = "onnx, openvino, executorch, huggingface or tf1"


def prediction(
    model_dir: Path,
    out: Path,
    to: str,
    scheme: str,
    calibrate: Path | None,
    task: str,
    batch: int,
    length: int,
    json: bool,
) -> None:
    from pocketfed.model.engines import ENGINES
    from pocketfed.model.exporting import export_prediction

    if to not in ENGINES:
        raise CommandError(f"--to {to!r} is nothing to export to; choose {TARGETS}")
    try:
        texts = [t for t in calibrate.read_text(encoding="utf-8").splitlines() if t.strip()] if calibrate else []
    except UnicodeDecodeError:
        raise CommandError(f"{calibrate} is not UTF-8 text; give texts to calibrate on, one a line") from None
    if calibrate and not texts:
        raise CommandError(f"{calibrate} holds no text; give texts to calibrate on, one a line")
    made = export_prediction(model_dir, out, to, scheme, task=task, texts=texts, batch=batch, length=length)
    if json:
        print_json({"file": str(out), "engine": to, "scheme": scheme, **dataclasses.asdict(made)})
        return
    print(f"{out}: {format_bytes(made.bytes)}, {scheme} for {to}, gives {_given(made)}; {_compared(made)}")


def _given(made: ExportedPrediction) -> str:
    return (
        f"{len(made.outputs)} logits ({', '.join(made.outputs)})"
        if made.outputs
        else "a vector a text (the model has no head)"
    )


def _compared(made: ExportedPrediction) -> str:
    return (
        f"within {made.error:.1e} of the model on {made.texts} texts, with its answer on {made.agreement:.0%} of them"
    )


def training_step(
    model_dir: Path, out: Path, labels: str, train: str, batch: int, length: int, seed: int, json: bool
) -> None:
    if importlib.util.find_spec("executorch") is None:
        raise ModuleNotFoundError(name="executorch")
    from pocketfed.coordinator.artifacts import trainable_classifier
    from pocketfed.model.executorch_export import export_executorch

    model, quantized = trainable_classifier(model_dir, labels, train, seed)
    made = export_executorch(model, out, batch=batch, length=length, quantized=quantized)
    if json:
        report = {"file": str(out), "bytes": made.bytes, "parameters": made.parameters, "error": made.error}
        print_json({**report, "trainable_set": train, "batch": batch, "length": length, "int8": quantized})
        return
    print(
        f"{out}: {format_bytes(made.bytes)}, trains {train} ({made.parameters:,} parameters) on {batch} x {length} tokens; "
        f"its gradient is within {made.error:.1e} of autograd's"
    )


def to_huggingface(model_dir: Path, out: Path, task: str, json: bool) -> None:
    from pocketfed.model.huggingface_export import export_huggingface

    made = export_huggingface(model_dir, out, task)
    if json:
        print_json({**dataclasses.asdict(made), "folder": str(made.folder)})
        return
    print(f"{out}: {made.architecture}, {made.parameters:,} parameters")
    for note in made.notes:
        print(f"Note: {note}.")


def to_tf1(model_dir: Path, out: Path, json: bool) -> None:
    from pocketfed.model.google_export import export_google

    made = export_google(model_dir, out)
    if json:
        print_json({**dataclasses.asdict(made), "folder": str(made.folder)})
        return
    print(f"{out}: {made.variables:,} variables, {made.parameters:,} parameters")
    for note in made.notes:
        print(f"Note: {note}.")
