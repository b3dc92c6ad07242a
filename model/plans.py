"""A model and a trainable set become plans: ONNX graphs that stock ONNX Runtime runs on a device.

    train(theta, input_ids, attention_mask, labels) -> (loss, correct, gradient)
    predict(theta, input_ids, attention_mask) -> (logits)

theta (P,) float32 is the flat vector of the trainable parameters; ids, mask (B, T) and labels (B,) are int64; loss is the
mean cross-entropy of the batch, correct how many predictions were right, gradient (P,) the loss's gradient. B and T are free.
Everything that is frozen lies in one external-data file that all plans of an artifact share.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import Tensor
from torch._decomp import core_aten_decompositions
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from pocketfed.model.adapters import get_theta, layout_of
from pocketfed.model.heads import TextClassifier
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
from pocketfed.model.parameters import Parameter, Vector, total_size
from pocketfed.model.quantization import dequantize, is_quantized_name, quantize_per_channel

BACKBONE_FILE = "backbone.bin"
ALIGNMENT = 64
GRADIENT_TOLERANCE = 1e-3  # of the largest gradient; far above rounding, far below a wrong graph


class PlanError(RuntimeError):
    """A plan that does not compute what the model computes."""


@dataclass
class Backbone:
    """The frozen tensors of an artifact in one run of bytes; each tensor is written once, whoever asks for it.

    Args:
        quantized: hold matrices as int8, one scale a row.
    """

    quantized: bool
    data: bytearray = field(default_factory=bytearray)
    places: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add(self, name: str, array: NDArray[Any]) -> TensorProto:
        """An initializer that points to `array` in the external file."""
        raw = np.ascontiguousarray(array)
        if name not in self.places:
            self.data.extend(b"\0" * (-len(self.data) % ALIGNMENT))
            self.places[name] = (len(self.data), raw.nbytes)
            self.data.extend(raw.tobytes())
        offset, length = self.places[name]
        tensor = TensorProto(name=name, dims=raw.shape, data_type=helper.np_dtype_to_tensor_dtype(raw.dtype))
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", BACKBONE_FILE), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor


@dataclass(frozen=True)
class Plans:
    """The plans of one trainable set, as ONNX bytes; `theta` are its initial values."""

    trainable_set: str
    layout: tuple[Parameter, ...]
    theta: Vector
    train: bytes
    predict: bytes


def frozen_as_shipped(model: TextClassifier, quantized: bool) -> TextClassifier:
    """The model with its frozen matrices rounded to int8 and back, in place: what a device really computes with."""
    if quantized:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not parameter.requires_grad and is_quantized_name(name, parameter.dim()):
                    parameter.copy_(dequantize(*quantize_per_channel(parameter)))
    return model


def build_plans(model: TextClassifier, trainable_set: str, backbone: Backbone) -> Plans:
    """Plans for a model whose trainable parameters are marked (see `adapters.select`).

    Raises:
        LoweringError: the model uses an operator without an ONNX form here.
    """
    model = frozen_as_shipped(model.eval(), backbone.quantized)
    layout = layout_of(model)
    train = _build(model, layout, backbone, _train_step(model), ("input_ids", "attention_mask", "labels"))
    predict = _build(model, layout, backbone, _predict_step(model), ("input_ids", "attention_mask"))
    return Plans(trainable_set, layout, get_theta(model), train, predict)


Step = Callable[..., tuple[Tensor, ...]]


def _train_step(model: TextClassifier) -> Step:
    labels_count = model.classifier.out_features

    def step(
        leaves: dict[str, Tensor], frozen: dict[str, Tensor], ids: Tensor, mask: Tensor, labels: Tensor
    ) -> tuple[Tensor, ...]:
        leaves = {name: leaf.detach().requires_grad_(True) for name, leaf in leaves.items()}
        logits = functional_call(model, {**leaves, **frozen}, (ids, mask))
        log_probabilities = F.log_softmax(logits, dim=-1)  # (B, labels)
        classes = torch.arange(labels_count)
        picked = (labels.unsqueeze(-1) == classes).to(logits.dtype) * log_probabilities
        loss = -picked.sum((0, 1)) / labels.shape[0]
        # A parameter that the loss does not use (a pooler under mean pooling) has a gradient of zeros.
        gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        correct = (logits.argmax(-1) == labels).to(torch.int64).sum((0,))
        return loss.detach(), correct, *gradients

    return step


def _predict_step(model: TextClassifier) -> Step:
    def step(leaves: dict[str, Tensor], frozen: dict[str, Tensor], ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return (functional_call(model, {**leaves, **frozen}, (ids, mask)),)

    return step


def _decompositions() -> dict[Any, Any]:
    table = dict(core_aten_decompositions())
    for kept in (
        torch.ops.aten.embedding_dense_backward.default,
        torch.ops.aten.slice_backward.default,
        torch.ops.aten.select_backward.default,
    ):
        table.pop(kept, None)  # each is one ONNX node when kept whole
    return table


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing internals warn about themselves
        yield


def _build(
    model: TextClassifier, layout: Sequence[Parameter], backbone: Backbone, step: Step, inputs: Sequence[str]
) -> bytes:
    names = [p.name for p in layout]
    parameters = dict(model.named_parameters())
    frozen = {n: p.detach() for n, p in parameters.items() if n not in set(names)}
    sizes = {int(s) for p in parameters.values() for s in (*p.shape, p.numel())}
    length = length_prime(model.config.max_position_embeddings, sizes)

    def flat_step(*values: Tensor) -> tuple[Tensor, ...]:
        leaves, rest = values[: len(names)], values[len(names) :]
        given, fixed = rest[: len(inputs)], rest[len(inputs) :]
        return step(dict(zip(names, leaves, strict=True)), dict(zip(frozen, fixed, strict=True)), *given)

    from torch._subclasses.fake_tensor import FakeTensorMode

    with _quiet(), FakeTensorMode(allow_non_fake_inputs=True):
        ids = torch.zeros(BATCH_PRIME, length, dtype=torch.int64)
        fake_inputs = (ids, ids.clone(), torch.zeros(BATCH_PRIME, dtype=torch.int64))[: len(inputs)]
        fake_leaves = [torch.zeros(p.shape) for p in layout]
        fake_frozen = [torch.zeros(p.shape) for p in frozen.values()]
        traced = make_fx(flat_step, decomposition_table=_decompositions(), tracing_mode="real")(
            *fake_leaves, *fake_inputs, *fake_frozen
        )
    return _assemble(traced.graph, layout, frozen, backbone, length, inputs)


def _assemble(
    graph: torch.fx.Graph,
    layout: Sequence[Parameter],
    frozen: dict[str, Tensor],
    backbone: Backbone,
    length: int,
    inputs: Sequence[str],
) -> bytes:
    low = Lowering(length)
    shape = low.emit("Shape", "input_ids")
    for name, index in (("batch_size", 0), ("sequence_length", 1)):
        low.nodes.append(helper.make_node("Gather", [shape, low.constant([index], np.int64)], [name], name=name))

    leaf_names = [f"leaf_{i}" for i in range(len(layout))]
    low.nodes.append(
        helper.make_node("Split", ["theta", low.constant([p.size for p in layout], np.int64)], leaf_names, name="split")
    )
    leaves = []
    for p, leaf in zip(layout, leaf_names, strict=True):
        whole = Value(low.shape((p.size,)), torch.float32, leaf)
        leaves.append(low.reshape(whole, low.shape(p.shape)))
    ids_shape = low.shape((BATCH_PRIME, length))
    given = [Value(ids_shape if n != "labels" else ids_shape[:1], torch.int64, n) for n in inputs]

    initializers: dict[str, TensorProto] = {}
    outputs = lower(graph, [*leaves, *given, *_frozen_values(frozen, backbone, low, initializers)], low)
    results = _name_outputs(low, outputs, layout, training="labels" in inputs)
    nodes = prune(low.nodes, [r.name for r in results])
    used = used_names(nodes)
    kept = [t for t in [*constants_of(low), *initializers.values()] if t.name in used]
    declared = [helper.make_tensor_value_info("theta", TensorProto.FLOAT, [total_size(layout)])]
    for name in inputs:
        dims = ["batch"] if name == "labels" else ["batch", "length"]
        declared.append(helper.make_tensor_value_info(name, TensorProto.INT64, dims))
    onnx_graph = helper.make_graph(nodes, "plan", declared, results, kept)
    model = helper.make_model(
        onnx_graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10, producer_name="pocketfed"
    )
    return model.SerializeToString(deterministic=True)  # type: ignore[no-any-return]


def _frozen_values(
    frozen: dict[str, Tensor], backbone: Backbone, low: Lowering, initializers: dict[str, TensorProto]
) -> Iterator[Value | Quantized]:
    for name, tensor in frozen.items():
        if backbone.quantized and is_quantized_name(name, tensor.dim()):
            q, scale = quantize_per_channel(tensor)
            for suffix, part in ((".int8", q), (".scale", scale)):
                initializers[name + suffix] = backbone.add(name + suffix, part.numpy())
            yield Quantized(name + ".int8", name + ".scale", tuple(tensor.shape))
        else:
            initializers[name] = backbone.add(name, tensor.numpy())
            yield Value(low.shape(tensor.shape), tensor.dtype, name)


def _name_outputs(
    low: Lowering, outputs: Sequence[Value], layout: Sequence[Parameter], training: bool
) -> list[onnx.ValueInfoProto]:
    def publish(source: str, name: str, dtype: int, dims: list[Any]) -> onnx.ValueInfoProto:
        low.nodes.append(helper.make_node("Identity", [source], [name], name=name))
        return helper.make_tensor_value_info(name, dtype, dims)

    if not training:
        return [publish(low.name(outputs[0]), "logits", TensorProto.FLOAT, ["batch", outputs[0].shape[1].k])]
    flat = [low.name(low.reshape(g, low.shape((p.size,)))) for g, p in zip(outputs[2:], layout, strict=True)]
    gradient = low.emit("Concat", *flat, axis=0)
    return [
        publish(low.name(outputs[0]), "loss", TensorProto.FLOAT, []),
        publish(low.name(outputs[1]), "correct", TensorProto.INT64, []),
        publish(gradient, "gradient", TensorProto.FLOAT, [total_size(layout)]),
    ]


def verify_plans(
    model: TextClassifier, plans: Plans, folder: Path, train_file: str, predict_file: str, seed: int = 0
) -> float:
    """Compare the plans in `folder` with autograd on random texts of two shapes. Returns the largest relative gradient error.

    Raises:
        PlanError: they differ by more than GRADIENT_TOLERANCE; the artifact must not be published.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    train = onnxruntime.InferenceSession(str(folder / train_file), options, providers=["CPUExecutionProvider"])
    predict = onnxruntime.InferenceSession(str(folder / predict_file), options, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(seed)
    worst = 0.0
    for batch, length in ((3, min(11, model.config.max_position_embeddings)), (2, 5)):
        ids = torch.randint(model.config.vocab_size, (batch, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[-1, length - 2 :] = 0
        labels = torch.randint(model.classifier.out_features, (batch,), generator=generator)
        logits = model(ids, mask)
        expected = F.cross_entropy(logits, labels)
        trained = [p for p in model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(expected, trained, materialize_grads=True)
        wanted = torch.cat([g.reshape(-1) for g in gradients]).numpy()
        feed = {"theta": plans.theta, "input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        loss, _, gradient = train.run(None, feed | {"labels": labels.numpy()})
        (predicted,) = predict.run(None, feed)
        errors = (
            abs(float(loss) - expected.item()) / max(1.0, abs(expected.item())),
            float(np.abs(gradient - wanted).max() / max(1e-6, np.abs(wanted).max())),
            float(np.abs(predicted - logits.detach().numpy()).max() / max(1.0, logits.abs().max().item())),
        )
        worst = float(np.max([worst, *errors]))  # unlike Python's max, NaN stays NaN
    if not worst <= GRADIENT_TOLERANCE:  # NaN counts as different
        raise PlanError(
            f"the plan of {plans.trainable_set!r} differs from the model by {worst:.2e} (relative; at most "
            f"{GRADIENT_TOLERANCE} is accepted); check the weights for huge or non-finite values"
        )
    return worst
