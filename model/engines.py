"""A student for prediction in an engine of the reader's choice: opened, and held against the reference model.

onnx         ONNX Runtime; one file
openvino     OpenVINO (extra `openvino`); a folder with model.xml and model.bin
executorch   ExecuTorch with XNNPACK (extra `executorch`); one file, for one batch and length
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from pocketfed.model.prediction import INPUTS, OUTPUT, SCHEMES, read_by_products
from pocketfed.model.runtime import load_onnxruntime

ENGINES = {"onnx": "onnxruntime", "openvino": "openvino", "executorch": "executorch"}  # and the package that runs it
RUNS = {  # what an engine can compute with
    "onnx": SCHEMES,
    "openvino": ("float32", "int8", "int8-static"),
    "executorch": ("float32",),
}
XML = "model.xml"
# What a product reads is rounded in runs of so many values; without this OpenVINO widens the weights instead.
OPENVINO_GROUP = 128
LARGEST_ERROR = {"float32": 1e-4, "int8": 0.3, "int8-dynamic": 0.3, "int8-static": 0.3}  # of the largest output
SENTENCES = (
    "Wake me at seven.",
    "Turn off the light in the kitchen, please!",
    "Will it rain in Paris tomorrow afternoon, or should I leave the umbrella at home?",
    "I have been charged twice for the same order (no. 4711); when do I get my money back?",
    "The film is long, loud and, for all its stars, oddly empty.",
    "42",
    "",
    "Play something quiet. " * 20,
)

Ids = NDArray[np.int64]
Predict = Callable[[Ids, Ids], NDArray[np.float32]]


class EngineError(ValueError):
    """A model, a scheme and an engine that do not go together."""


def check_engine(engine: str, scheme: str) -> None:
    """Raises:
    EngineError: no such engine, or a scheme that it cannot run.
    ModuleNotFoundError: it is not installed.
    """
    if engine not in ENGINES:
        raise EngineError(f"there is no engine {engine!r}; choose one of {', '.join(ENGINES)}")
    if scheme not in RUNS[engine]:
        can = ", ".join(RUNS[engine])
        what = "cannot run the scheme" if scheme in SCHEMES else "knows no scheme"
        raise EngineError(f"{engine} {what} {scheme!r}; choose one of {can}")
    if importlib.util.find_spec(ENGINES[engine]) is None:
        raise ModuleNotFoundError(f"no module named {ENGINES[engine]!r}", name=ENGINES[engine])


def open_prediction(path: Path, engine: str, threads: int = 1, shape: tuple[int, int] | None = None) -> Predict:
    """A file or folder that `exporting.export_prediction` wrote, ready to be called with ids and mask, (B, T) each.

    Args:
        shape: texts and tokens, if all calls have them; OpenVINO makes faster code for one shape.

    Raises:
        EngineError: it is none, or one for something else.
    """
    path = Path(path)
    if not path.exists():
        raise EngineError(f"there is nothing at {path}; export a model there first")
    openers: dict[str, Callable[[Path, int], Predict]] = {"onnx": open_onnx, "executorch": _open_executorch}
    try:
        return _open_openvino(path, threads, shape) if engine == "openvino" else openers[engine](path, threads)
    except EngineError:
        raise
    except Exception as error:  # each engine has its own, and some only RuntimeError
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EngineError(f"{path} is not a prediction that {engine} can open ({why}); export it again") from None


def open_onnx(source: Path | bytes, threads: int = 1) -> Predict:
    session = _session(source, threads)
    takes, gives = [i.name for i in session.get_inputs()], [o.name for o in session.get_outputs()]
    _check_signature(source, takes, gives)
    return lambda ids, mask: session.run(gives, {INPUTS[0]: ids, INPUTS[1]: mask})[0]


def _session(source: Path | bytes, threads: int) -> Any:
    onnxruntime = load_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Threads that spin while they wait take their cores from whatever else the device does.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    held = source if isinstance(source, bytes) else str(source)
    return onnxruntime.InferenceSession(held, options, providers=["CPUExecutionProvider"])


def _open_openvino(path: Path, threads: int, shape: tuple[int, int] | None = None) -> Predict:
    import openvino

    core = openvino.Core()
    model = core.read_model(path / XML if path.is_dir() else path)
    takes = [next(iter(i.get_names())) for i in model.inputs]
    _check_signature(path, takes, [next(iter(o.get_names())) for o in model.outputs])
    _read_keys_as_they_lie(model)
    if shape is not None:
        model.reshape({name: list(shape) for name in INPUTS})
    # Beside products of 8 bits the rest may have 16, on CPUs that have them: about 5 % less time, most of it attention's.
    rounded = any(operation.get_type_name() == "FakeQuantize" for operation in model.get_ops())
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "bf16" if rounded else "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": OPENVINO_GROUP,
    }
    request = core.compile_model(model, "CPU", settings).create_infer_request()

    def predict(ids: Ids, mask: Ids) -> NDArray[np.float32]:
        request.infer({INPUTS[0]: ids, INPUTS[1]: mask}, share_inputs=True)
        return request.get_output_tensor(0).data.copy()  # type: ignore[no-any-return]

    return predict


def _read_keys_as_they_lie(model: Any) -> None:
    """ONNX has no product with a transposed second factor; OpenVINO has, and then need not move the keys around."""
    from openvino import opset8

    for product in [node for node in model.get_ordered_ops() if node.get_type_name() == "MatMul"]:
        keys = product.input_value(1).get_node()
        if keys.get_type_name() == "Transpose" and keys.input_value(1).get_node().get_data().tolist() == [0, 2, 3, 1]:
            heads = opset8.transpose(keys.input_value(0), opset8.constant(np.array([0, 2, 1, 3])))
            scores = opset8.matmul(product.input_value(0), heads, False, True)
            for reader in product.output(0).get_target_inputs():
                reader.replace_source_output(scores.output(0))


def _open_executorch(path: Path, threads: int) -> Predict:
    """It takes its threads from the machine; a process has one pool for all programs."""
    from pocketfed.model.executorch_predict import METHOD, load_program

    method = load_program(path, METHOD)
    return lambda ids, mask: method.execute((torch.from_numpy(ids), torch.from_numpy(mask)))[0].numpy()


def _check_signature(source: Path | bytes, takes: Sequence[str], gives: Sequence[str]) -> None:
    if set(takes) != set(INPUTS) or list(gives) != [OUTPUT]:
        name = "the graph" if isinstance(source, bytes) else str(source)
        raise EngineError(
            f"{name} takes {', '.join(takes)} and gives {', '.join(gives)}: a model of another kind; give one that takes "
            f"{', '.join(INPUTS)} and gives {OUTPUT}"
        )


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure_ranges(graph: onnx.ModelProto, batches: Sequence[tuple[Ids, Ids]]) -> dict[str, tuple[float, float]]:
    """What each product of a float32 graph reads, least and largest over some texts.

    Raises:
        EngineError: no texts, or values that are not finite.
    """
    if not batches:
        raise EngineError("there are no texts to measure ranges on; give some of the kind that will be read")
    read = read_by_products(graph)
    watched = onnx.ModelProto()
    watched.CopyFrom(graph)
    names = sorted(set(read.values()))
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = _session(watched.SerializeToString(), 1)
    seen: dict[str, tuple[float, float]] = {}
    for ids, mask in batches:
        for name, value in zip(names, session.run(names, dict(zip(INPUTS, (ids, mask), strict=True))), strict=True):
            least, largest = seen.get(name, (0.0, 0.0))
            seen[name] = (min(least, float(value.min())), max(largest, float(value.max())))
    bad = next((name for name, range_ in seen.items() if not np.isfinite(range_).all()), None)
    if bad:
        raise EngineError(f"the student's values are not finite at {bad}; train it again at a lower rate")
    return {weight: seen[name] for weight, name in read.items()}


@dataclass(frozen=True)
class Difference:
    """From the reference model: error, the largest of an output over the largest output; agreement, the share of texts
    with the same highest output; texts, how many were compared."""

    error: float
    agreement: float
    texts: int


def compare(reference: nn.Module, predict: Predict, batches: Sequence[tuple[Ids, Ids]]) -> Difference:
    errors, same, texts = [], 0, 0
    for ids, mask in batches:
        with torch.no_grad():
            wanted = reference(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()
        got = predict(ids, mask)
        if got.shape != wanted.shape:
            raise EngineError(f"the export gives values of shape {got.shape} where the model gives {wanted.shape}")
        size = max(1e-6, float(np.abs(wanted).max()))
        errors.append(float(np.abs(got - wanted).max()) / size)
        rows = (len(ids), -1)
        same += int((got.reshape(rows).argmax(1) == wanted.reshape(rows).argmax(1)).sum())
        texts += len(ids)
    return Difference(float(np.max(errors)), same / texts, texts)  # unlike Python's max, NaN stays NaN


def random_batches(
    vocabulary: int, separator: int, longest: int, seed: int, shape: tuple[int, int] | None = None
) -> list[tuple[Ids, Ids]]:
    """Random texts of several batches and lengths, or of one; some rows are shorter than their batch, some are pairs."""
    generator = np.random.default_rng(seed)
    result = []
    for count, length in [shape] * 2 if shape else [(1, min(3, longest)), (3, min(11, longest)), (2, longest)]:
        ids = generator.integers(min(5, vocabulary - 1), vocabulary, (count, length), dtype=np.int64)
        mask = np.ones_like(ids)
        mask[-1, max(2, length // 2) :] = 0 if count > 1 else 1
        ids[0, length // 2] = separator
        result.append((ids * mask, mask))
    return result


def settings_of(difference: Difference) -> Mapping[str, float]:
    return {"error": difference.error, "agreement": difference.agreement, "texts": difference.texts}
