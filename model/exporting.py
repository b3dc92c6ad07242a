"""A model folder becomes a prediction for an engine, compared with the reference model before it is kept."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from torch import nn

from pocketfed.model import checkpoints
from pocketfed.model.engines import (
    LARGEST_ERROR,
    SENTENCES,
    XML,
    EngineError,
    Ids,
    check_engine,
    compare,
    measure_ranges,
    open_prediction,
    random_batches,
)
from pocketfed.model.fusing import FusedStudent, fuse
from pocketfed.model.heads import TASKS, TextClassifier
from pocketfed.model.huggingface import SPAN_LABELS
from pocketfed.model.prediction import prediction_graph
from pocketfed.model.tokenization import Tokenizer, Vocabulary

READ_AT_ONCE = 8


@dataclass(frozen=True)
class ExportedPrediction:
    """outputs: the labels, or nothing where the model has no head and gives the vector of a text. The rest: `Difference`."""

    bytes: int
    outputs: tuple[str, ...]
    error: float
    agreement: float
    texts: int


def export_prediction(
    folder: Path,
    out: Path,
    engine: str,
    scheme: str = "float32",
    *,
    task: str = "",
    texts: Sequence[str] = (),
    batch: int = 1,
    length: int = 128,
) -> ExportedPrediction:
    """Write what `engines.open_prediction` opens, whole or not at all; a file that is there already is replaced.

    Args:
        task: what the head does, one of `heads.TASKS`; by default spans if its labels are start and end, else classification.
        texts: int8-static measures ranges on them, and every export is compared with the model on them besides random ones.
        batch, length: of an ExecuTorch program; other engines take any.

    Raises:
        EngineError: an engine, a scheme and a model that do not go together, or a result that differs from the model.
        CheckpointError: no usable model.
        ModuleNotFoundError: the engine is not installed.
    """
    check_engine(engine, scheme)
    if scheme == "int8-static" and not texts:
        raise EngineError(
            "int8-static measures the ranges of values on texts, and there are none; give some to calibrate on"
        )
    checkpoint = checkpoints.load(folder)
    model, vocabulary = classifier_of(checkpoint, task), checkpoints.tokens_of(checkpoint)
    longest = checkpoint.config.max_position_embeddings
    shape = (batch, length) if engine == "executorch" else None
    if shape and (batch < 1 or not 3 <= length <= longest):
        raise EngineError(
            f"{batch} texts of {length} tokens do not fit the model; give at least one text and 3 to {longest} tokens"
        )
    student = fuse(model)
    real = encoded([*texts, *SENTENCES], vocabulary, longest, shape)
    batches = [*random_batches(checkpoint.config.vocab_size, vocabulary.sep_id, longest, 0, shape), *real]
    out = Path(out)
    _check_place(out, engine)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        fresh = work / "new"
        if engine == "executorch":
            from pocketfed.model.executorch_predict import write_program

            write_program(student, fresh, batch, length)
        else:
            ranges = None
            if scheme == "int8-static":
                # On random texts too: a value far outside its range would be cut down to it, whatever the others say.
                random = random_batches(checkpoint.config.vocab_size, vocabulary.sep_id, longest, 1)
                ranges = measure_ranges(prediction_graph(student), [*encoded(texts, vocabulary, longest), *random])
            write_prediction(student, fresh, engine, prediction_graph(student, scheme, ranges))
        difference = compare(model, open_prediction(fresh, engine), batches)
        if not difference.error <= LARGEST_ERROR[scheme]:  # NaN counts as different
            raise EngineError(
                f"the export for {engine} differs from the model by {difference.error:.2g} of its largest output (at most "
                f"{LARGEST_ERROR[scheme]:g} is accepted for {scheme}); choose a wider scheme, and check the weights for huge values"
            )
        size = sum(p.stat().st_size for p in (fresh.iterdir() if fresh.is_dir() else [fresh]))
        if out.is_dir():
            os.replace(out, work / "old")  # a folder that is not empty cannot be replaced in one move
        os.replace(fresh, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return ExportedPrediction(size, _outputs(checkpoint), difference.error, difference.agreement, difference.texts)


def _outputs(checkpoint: checkpoints.Checkpoint) -> tuple[str, ...]:
    """What the head's numbers are called; one without labels, such as of a regression, has Hugging Face's names for them."""
    rows = len(checkpoint.state["classifier.bias"]) if "classifier.bias" in checkpoint.state else 0
    return checkpoint.labels or tuple(f"LABEL_{i}" for i in range(rows))


def classifier_of(checkpoint: checkpoints.Checkpoint, task: str = "") -> TextClassifier:
    """The reference model of a folder; without a head it gives the vector that a head would read."""
    head = {k.removeprefix("classifier."): v for k, v in checkpoint.state.items() if k.startswith("classifier.")}
    names = checkpoint.labels or ()
    kind = task or ("spans" if names == SPAN_LABELS else "classification")
    if kind not in TASKS:
        raise EngineError(f"there is no task {kind!r}; choose one of {', '.join(TASKS)}")
    separator = checkpoints.tokens_of(checkpoint).sep_id
    model = TextClassifier(checkpoint.config, len(head["weight"]) if head else 1, separator, kind)
    model.mobilebert.load_state_dict({k: v for k, v in checkpoint.state.items() if not k.startswith("classifier.")})
    if head:
        model.classifier.load_state_dict(head)
    else:
        model.classifier = nn.Identity()  # type: ignore[assignment] # what TextClassifier calls, it need not be linear
    return model.eval()


def write_prediction(student: FusedStudent, place: Path, engine: str, graph: onnx.ModelProto) -> None:
    """place: a file, or for OpenVINO a folder."""
    if engine == "onnx":
        onnx.checker.check_model(graph)
        place.write_bytes(graph.SerializeToString(deterministic=True))
        return
    import openvino

    source = place.with_name("graph.onnx")
    source.write_bytes(graph.SerializeToString())
    place.mkdir()
    openvino.save_model(openvino.Core().read_model(source), place / XML, compress_to_fp16=False)
    source.unlink()


def encoded(
    texts: Sequence[str], vocabulary: Vocabulary, longest: int, shape: tuple[int, int] | None = None
) -> list[tuple[Ids, Ids]]:
    """Texts as a model reads them, a few at a time; with a shape, every batch is filled up to it, with empty texts last."""
    tokenizer = Tokenizer(vocabulary)
    count, length = shape or (READ_AT_ONCE, longest)
    filled = [*texts, *[""] * (-len(texts) % count)] if shape else list(texts)
    result = []
    for start in range(0, len(filled), count):
        ids, mask = tokenizer.encode(filled[start : start + count], max_length=length)
        missing = length - ids.shape[1] if shape else 0
        padding = ((0, 0), (0, missing))
        result.append((np.pad(ids, padding, constant_values=vocabulary.pad_id), np.pad(mask, padding)))
    return result


def _check_place(out: Path, engine: str) -> None:
    if engine != "openvino" and out.is_dir():
        raise EngineError(f"{out} is a folder; name a file for the model")
    if engine == "openvino" and out.exists():
        held = sorted(p.name for p in out.iterdir()) if out.is_dir() else [out.name]
        foreign = next((name for name in held if name not in (XML, "model.bin")), None)
        if foreign:
            raise EngineError(f"{out} holds {foreign} and is no OpenVINO model; name a new or an empty folder")
