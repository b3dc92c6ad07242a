"""The fused student as one ONNX graph, `predict(input_ids, attention_mask) -> logits`, in float32 or with products of integers.

    float32      products in float32
    int8         weights held in 8 bits, one scale a column, as they are; what reads them is for the engine to say
    int8-dynamic products of integers; what a product reads is rounded to 8 bits at run time, one scale for all of it
    int8-static  products of integers; what a product reads is rounded to 8 bits in a range measured beforehand

Batch and length are free. A head's product stays in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from pocketfed.model.fusing import FusedStudent
from pocketfed.model.lowering import (
    BATCH_PRIME,
    OPSET,
    Lowering,
    Quantized,
    Value,
    constants_of,
    length_prime,
    lower,
    prune,
    used_names,
)
from pocketfed.model.plans import decompositions, publish, quietly
from pocketfed.model.quantization import LEVELS, quantize_per_channel

SCHEMES = ("float32", "int8", "int8-dynamic", "int8-static")
INPUTS = ("input_ids", "attention_mask")
OUTPUT = "logits"  # or the vector of a text, (B, D), from a student without a head
CONTRIB = "com.microsoft"  # operators of ONNX Runtime beyond ONNX's own
WORDS = "embeddings.word_embeddings.weight"
HEAD = "classifier.weight"

Ranges = Mapping[str, tuple[float, float]]  # the weight's name -> least and largest value that its product reads
Tensors = dict[str, NDArray[Any]]


def prediction_graph(student: FusedStudent, scheme: str = "float32", ranges: Ranges | None = None) -> onnx.ModelProto:
    """Args:
        ranges: for int8-static, of every product but the head's (see `engines.measure_ranges`).

    Raises:
        ValueError: an unknown scheme, or a product without a range.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"there is no scheme {scheme!r}; choose one of {', '.join(SCHEMES)}")
    nodes, tensors, result = _lowered(student, int8_words=scheme != "float32")
    nodes = _residuals_in_products(nodes, tensors)
    if scheme != "float32":
        nodes = _with_integers(nodes, tensors, _PRODUCTS[scheme](ranges or {}))
    used = used_names(nodes)
    takes = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"]) for name in INPUTS]
    held = [numpy_helper.from_array(array, name) for name, array in tensors.items() if name in used]
    opsets = [helper.make_opsetid("", OPSET)] + [helper.make_opsetid(CONTRIB, 1)] * (scheme == "int8-dynamic")
    return helper.make_model(
        helper.make_graph(nodes, "predict", takes, [result], held),
        opset_imports=opsets,
        ir_version=10,
        producer_name="pocketfed",
    )


def _lowered(student: FusedStudent, int8_words: bool) -> tuple[list[NodeProto], Tensors, onnx.ValueInfoProto]:
    held = {name: t.detach() for name, t in (*student.named_parameters(), *student.named_buffers())}
    sizes = {int(s) for t in held.values() for s in (*t.shape, t.numel())}
    length = length_prime(student.config.max_position_embeddings, sizes)

    def call(ids: Tensor, mask: Tensor, *values: Tensor) -> tuple[Tensor]:
        return (functional_call(student, dict(zip(held, values, strict=True)), (ids, mask)),)

    from torch._subclasses.fake_tensor import FakeTensorMode

    with quietly(), FakeTensorMode(allow_non_fake_inputs=True):
        ids, mask = (torch.zeros((BATCH_PRIME, length), dtype=torch.int64) for _ in INPUTS)
        fakes = [torch.zeros(t.shape) for t in held.values()]
        graph = make_fx(call, decomposition_table=decompositions())(ids, mask, *fakes).graph
    low = Lowering(length)
    shape = low.emit("Shape", INPUTS[1])
    for name, index in (("batch_size", 0), ("sequence_length", 1)):
        low.nodes.append(helper.make_node("Gather", [shape, low.constant([index], np.int64)], [name], name=name))
    tensors: Tensors = {}
    inputs: list[Any] = [Value(low.shape(ids.shape), torch.int64, name) for name in INPUTS]
    for name, tensor in held.items():
        if int8_words and name == WORDS:
            q, scale = quantize_per_channel(tensor)
            tensors |= {f"{name}.int8": q.numpy(), f"{name}.scale": scale.numpy()}
            inputs.append(Quantized(f"{name}.int8", f"{name}.scale", tuple(tensor.shape)))
        else:
            tensors[name] = tensor.numpy()
            inputs.append(Value(low.shape(tensor.shape), tensor.dtype, name))
    (logits,) = lower(graph, inputs, low)
    result = publish(low, logits, OUTPUT)
    tensors |= {c.name: numpy_helper.to_array(c) for c in constants_of(low)}
    return prune(low.nodes, [OUTPUT]), tensors, result


# ---- transformations of the graph ------------------------------------------------------------------------------------


def _residuals_in_products(nodes: Sequence[NodeProto], tensors: Tensors) -> list[NodeProto]:
    """A residual added to a product without bias is what the product starts from: no pass of its own over it."""
    users: dict[str, int] = {}
    for node in nodes:
        for name in node.input:
            users[name] = users.get(name, 0) + 1
    plain = {n.output[0]: n for n in nodes if n.op_type == "Gemm" and len(n.input) == 2 and users[n.output[0]] == 1}
    kept: list[NodeProto] = []
    moved: set[str] = set()
    for node in nodes:
        product = next((plain[name] for name in node.input if name in plain), None) if node.op_type == "Add" else None
        if product is None or node.input[0] == node.input[1]:
            kept.append(node)
            continue
        residual = next(name for name in node.input if name != product.output[0])
        fused = NodeProto()
        fused.CopyFrom(product)
        fused.input.append(residual)
        fused.output[0] = node.output[0]
        kept.append(fused)
        moved.add(product.output[0])
    return [node for node in kept if node.output[0] not in moved]


# (what is read, weight's name, int8 weight and its scales, constants) -> the name of the product, and its nodes
_Product = Callable[[str, str, str, str, Tensors], tuple[str, list[NodeProto]]]


def _with_integers(nodes: Iterable[NodeProto], tensors: Tensors, product: _Product) -> list[NodeProto]:
    """Every product with a weight but the head's, its bias or residual added after it."""
    result: list[NodeProto] = []
    for node in nodes:
        weight = node.input[1] if node.op_type == "Gemm" else ""
        if weight not in tensors or weight == HEAD:
            result.append(node)
            continue
        q, scale = f"{weight}.int8", f"{weight}.scale"
        if q not in tensors:
            rows, scales = quantize_per_channel(torch.from_numpy(tensors[weight]))
            tensors |= {q: np.ascontiguousarray(rows.numpy().T), scale: scales.numpy()}
        added = node.input[2] if len(node.input) > 2 else ""
        name, made = product(node.input[0], weight, q, scale, tensors)
        if added and made[-1].op_type == "DynamicQuantizeMatMul" and added in tensors:
            made[-1].input.append(added)
        elif added:
            made.append(helper.make_node("Add", [name, added], [f"{name}.added"], name=f"{name}.added"))
        made[-1].output[0] = node.output[0]
        result += made
    return result


def _weights_only(ranges: Ranges) -> _Product:
    def make(x: str, weight: str, q: str, scale: str, tensors: Tensors) -> tuple[str, list[NodeProto]]:
        wide, out = f"{weight}.wide", f"{weight}.product"
        return out, [
            helper.make_node("DequantizeLinear", [q, scale], [wide], name=wide, axis=1),
            helper.make_node("MatMul", [x, wide], [out], name=out),
        ]

    return make


def _dynamic(ranges: Ranges) -> _Product:
    def make(x: str, weight: str, q: str, scale: str, tensors: Tensors) -> tuple[str, list[NodeProto]]:
        out = f"{weight}.product"
        return out, [helper.make_node("DynamicQuantizeMatMul", [x, q, scale, ""], [out], name=out, domain=CONTRIB)]

    return make


def _static(ranges: Ranges) -> _Product:
    def make(x: str, weight: str, q: str, scale: str, tensors: Tensors) -> tuple[str, list[NodeProto]]:
        if weight not in ranges:
            raise ValueError(f"the product with {weight} has no range; measure ranges on texts first")
        step, kind = step_of(*ranges[weight])
        tensors |= {f"{weight}.step": np.array(step, np.float32), f"{weight}.zero": np.array(0, kind)}
        constants = [f"{weight}.step", f"{weight}.zero"]
        names = [f"{weight}.{part}" for part in ("rounded", "read")]
        out, made = _weights_only(ranges)(names[1], weight, q, scale, tensors)
        return out, [
            helper.make_node("QuantizeLinear", [x, *constants], [names[0]], name=names[0]),
            helper.make_node("DequantizeLinear", [names[0], *constants], [names[1]], name=names[1]),
            *made,
        ]

    return make


_PRODUCTS: dict[str, Callable[[Ranges], _Product]] = {
    "int8": _weights_only,
    "int8-dynamic": _dynamic,
    "int8-static": _static,
}


def step_of(least: float, largest: float) -> tuple[float, type[np.integer[Any]]]:
    """The step of 8-bit levels that hold a range, and their type: unsigned where nothing is below 0, else signed.

    Zero is always level 0: a zero point elsewhere is a subtraction more in every product, and most of what the student's
    products read lies about evenly around 0.

    >>> step_of(0.0, 255.0), step_of(-127.0, 3.0), step_of(0.0, 0.0)
    ((1.0, <class 'numpy.uint8'>), (1.0, <class 'numpy.int8'>), (1.0, <class 'numpy.uint8'>))
    """
    if least < 0:
        return max(-least, largest) / LEVELS, np.int8
    return (largest / (2 * LEVELS + 1) if largest > 0 else 1.0), np.uint8


def read_by_products(graph: onnx.ModelProto) -> dict[str, str]:
    """Of a float32 graph: weight -> the name of what its product reads."""
    held = {tensor.name for tensor in graph.graph.initializer}
    return {
        node.input[1]: node.input[0]
        for node in graph.graph.node
        if node.op_type == "Gemm" and node.input[1] in held and node.input[1] != HEAD
    }
