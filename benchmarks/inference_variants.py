"""The models that benchmarks/inference.py times: each made once, with random weights of its published geometry, as a file.

A variant is `model/engine/scheme`, or one that Hugging Face's own code is: `hf-bert-base/eager`, `hf-mobilebert/onnx/int8-usual`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pocketfed.model.config import BASELINES, STUDENTS, MobileBertConfig
from pocketfed.model.engines import measure_ranges, open_prediction, random_batches
from pocketfed.model.exporting import write_prediction
from pocketfed.model.fusing import fuse
from pocketfed.model.heads import TextClassifier
from pocketfed.model.prediction import prediction_graph

LABELS, SEPARATOR = 7, 3
Predict = Callable[[NDArray[np.int64], NDArray[np.int64]], Any]

BERT = ("hf-bert-base/eager", "hf-bert-base/onnx/float32", "hf-bert-base/onnx/int8-usual", "hf-bert-base/openvino/float32",
        "bert-base/onnx/int8-dynamic", "bert-base/openvino/int8-static")  # fmt: skip
HUGGING_FACE = ("hf-mobilebert/eager", "hf-mobilebert/onnx/float32", "hf-mobilebert/onnx/int8-usual")
OURS = ("mobilebert/eager", "mobilebert/onnx/float32", "mobilebert/onnx/int8-dynamic", "mobilebert/onnx/int8-static",
        "mobilebert/openvino/float32", "mobilebert/openvino/int8", "mobilebert/openvino/int8-static")  # fmt: skip
SMALLER = ("mobilebert-tiny/onnx/float32", "mobilebert-tiny/onnx/int8-dynamic", "mobilebert-tiny/openvino/float32",
           "mobilebert-tiny/openvino/int8-static")  # fmt: skip
PRESETS = tuple(f"{p}/onnx/{s}" for p in ("nano", "micro", "mini") for s in ("float32", "int8-dynamic"))
# Operational optimisations (Sun et al. 2020, table 7): what each norm and each activation costs, everything else alike.
OPERATIONS = tuple(
    f"{norm}-{act}/{how}"
    for norm in ("layer_norm", "no_norm")
    for act in ("gelu", "relu")
    for how in ("eager", "onnx/float32")
)
VARIANTS = (*BERT, *HUGGING_FACE, *OURS, *SMALLER, *PRESETS)
QUICK = ("hf-bert-base/onnx/float32", "hf-bert-base/onnx/int8-usual", "hf-mobilebert/onnx/int8-usual", "mobilebert/onnx/float32",
         "mobilebert/onnx/int8-dynamic", "mobilebert/openvino/float32", "mobilebert/openvino/int8-static",
         "mobilebert-tiny/onnx/float32", "hf-bert-base/openvino/float32", "bert-base/openvino/int8-static")  # fmt: skip
OPTIONAL = ("mobilebert/executorch/float32",)  # minutes to write, and for one batch and length


def config_of(name: str) -> MobileBertConfig:
    """Of a preset, a baseline, or `NORM-ACTIVATION`: the released geometry with these."""
    if name in BASELINES or name in STUDENTS:
        return (BASELINES | STUDENTS)[name]
    norm, act = name.split("-")
    return STUDENTS["mobilebert"].with_changes(normalization_type=norm, hidden_act=act)


def reference_of(name: str) -> TextClassifier:
    torch.manual_seed(0)
    return TextClassifier(config_of(name), LABELS, SEPARATOR).eval().requires_grad_(False)


def longest_of(variant: str) -> int:
    return 512 if variant.startswith("hf-") else config_of(variant.split("/")[0]).max_position_embeddings


def flops_name(variant: str) -> str:
    """The model that says how many FLOPs a variant takes."""
    return variant.split("/")[0].removeprefix("hf-")


def place_of(variant: str, work: Path) -> Path:
    return work / variant.replace("/", "--")


def make(variant: str, work: Path) -> None:
    """Write a variant's file if it is not there yet. Eager ones have none."""
    place = place_of(variant, work)
    if variant.endswith("/eager") or place.exists():
        return
    name, engine, scheme = variant.split("/")
    partial = place.with_name(place.name + ".partial")
    if name.startswith("hf-"):
        _make_hugging_face(name, engine, scheme, partial, work)
    elif engine == "executorch":
        from pocketfed.model.executorch_predict import write_program

        write_program(fuse(reference_of(name)), partial, 1, 128)
    else:
        student = fuse(reference_of(name))
        ranges = None
        if scheme == "int8-static":
            config = student.config
            texts = random_batches(config.vocab_size, SEPARATOR, min(128, config.max_position_embeddings), 0)
            ranges = measure_ranges(prediction_graph(student), texts)
        write_prediction(student, partial, engine, prediction_graph(student, scheme, ranges))
    partial.rename(place)


def open_variant(variant: str, work: Path, threads: int, shape: tuple[int, int] | None = None) -> Predict:
    """shape: OpenVINO, which gains by it, is told that all texts have it."""
    name, engine, *_ = variant.split("/")
    if engine == "eager":
        return _eager(_hugging_face(name) if name.startswith("hf-") else reference_of(name))
    return open_prediction(place_of(variant, work), engine, threads, shape)


def _eager(model: torch.nn.Module) -> Predict:
    def predict(ids: NDArray[np.int64], mask: NDArray[np.int64]) -> Any:
        with torch.no_grad():
            return model(torch.from_numpy(ids), torch.from_numpy(mask))

    return predict


# ---- Hugging Face's own --------------------------------------------------------------------------------------------


def _hugging_face(name: str) -> torch.nn.Module:
    import transformers

    torch.manual_seed(0)
    if name == "hf-bert-base":
        made = transformers.BertForSequenceClassification(transformers.BertConfig(num_labels=LABELS))
    else:
        config = transformers.MobileBertConfig(num_labels=LABELS, classifier_activation=False)
        made = transformers.MobileBertForSequenceClassification(config)
    return made.eval().requires_grad_(False)  # type: ignore[no-any-return]


class _Logits(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def _make_hugging_face(name: str, engine: str, scheme: str, place: Path, work: Path) -> None:
    """The usual way: `torch.onnx.export` with free batch and length, then ONNX Runtime's `quantize_dynamic`."""
    exported = work / f"{name}--onnx--float32"
    if engine == "openvino":
        import openvino

        make(f"{name}/onnx/float32", work)
        place.mkdir()
        openvino.save_model(openvino.Core().read_model(exported), place / "model.xml", compress_to_fp16=False)
    elif scheme == "int8-usual":
        from onnxruntime.quantization import QuantType, quantize_dynamic

        make(f"{name}/onnx/float32", work)
        quantize_dynamic(exported, place, weight_type=QuantType.QInt8)
    else:
        ids = torch.ones(2, 16, dtype=torch.int64)
        names = ["input_ids", "attention_mask"]
        free = {n: {0: "batch", 1: "length"} for n in names}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                _Logits(_hugging_face(name)), (ids, ids.clone()), str(place), dynamo=False, input_names=names,
                output_names=["logits"], dynamic_axes=free, opset_version=17,
            )  # fmt: skip
