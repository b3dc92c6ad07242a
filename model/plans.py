"""A model and a trainable set become plans: ONNX graphs that stock ONNX Runtime runs on a device.

    train(theta, input_ids, attention_mask, labels[, weights, label_smoothing]) -> (loss, correct, gradient, weight)
    evaluate(the same) -> (loss, correct, weight)
    predict(theta, input_ids, attention_mask) -> (logits)

theta (P,) float32 is the flat vector of the trainable parameters; ids and mask (B, T) are int64; gradient (P,) is the
loss's; `model.losses.task_loss` states the rest. B and T are free. Where the lowest trainable parameter lies above whole
blocks, what is below need not be computed twice:

    prefix(input_ids, attention_mask) -> (hidden)
    train_suffix, evaluate_suffix, predict_suffix: as above, with `hidden` in place of input_ids

Everything that is frozen lies in one external-data file that all plans of an artifact share.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import Tensor, nn
from torch._decomp import core_aten_decompositions
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from pocketfed.model.adapters import get_theta, layout_of
from pocketfed.model.footprint import Footprint, activation_bytes
from pocketfed.model.heads import TextClassifier
from pocketfed.model.lean import lean
from pocketfed.model.losses import task_loss
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
from pocketfed.model.quantization import dequantize, is_kept, is_quantized_name, quantize_per_channel
from pocketfed.model.rewriting import CONTRIB, rewritten, uses_contrib
from pocketfed.model.runtime import load_onnxruntime

BACKBONE_FILE = "backbone.bin"
ALIGNMENT = 64
GRADIENT_TOLERANCE = 1e-3  # of the largest gradient; far above rounding, far below a wrong graph
ROUNDED_TOLERANCE = 0.05  # with 8-bit activations a value at the border between two steps may fall on either side


class PlanError(RuntimeError):
    """A plan that does not compute what the model computes."""


@dataclass
class Backbone:
    """The frozen tensors of an artifact in one run of bytes; the same content is written once, whoever asks for it.

    Args:
        quantized: hold matrices as int8, one scale a row.
        activations: as in `lean`; "int8" needs `quantized`.
        keep: layers that stay float32 all the same, as in `quantization.Storage`.
    """

    quantized: bool
    activations: str = "float32"
    data: bytearray = field(default_factory=bytearray)
    places: dict[bytes, int] = field(default_factory=dict)
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.activations != "float32" and not self.quantized:
            raise ValueError(f"{self.activations} activations need int8 weights; quantize the backbone too")

    def rounds(self, name: str, dimensions: int) -> bool:
        """Whether that frozen tensor is held as int8."""
        kept = is_kept(name.removeprefix("mobilebert."), self.keep)
        return self.quantized and is_quantized_name(name, dimensions) and not kept

    def add(self, name: str, array: NDArray[Any]) -> TensorProto:
        """An initializer that points to `array` in the external file."""
        raw = np.ascontiguousarray(array)
        data = raw.tobytes()
        digest = hashlib.sha256(data).digest()
        if digest not in self.places:
            self.data.extend(b"\0" * (-len(self.data) % ALIGNMENT))
            self.places[digest] = len(self.data)
            self.data.extend(data)
        tensor = TensorProto(name=name, dims=raw.shape, data_type=helper.np_dtype_to_tensor_dtype(raw.dtype))
        tensor.data_location = TensorProto.EXTERNAL
        place = (("location", BACKBONE_FILE), ("offset", self.places[digest]), ("length", raw.nbytes))
        for key, value in place:
            tensor.external_data.add(key=key, value=str(value))
        return tensor


@dataclass(frozen=True)
class Plans:
    """The plans of one trainable set.

    theta: initial values (P,). files: ONNX bytes by the plan's name. depth: blocks in the prefix, 0 where there is none.
    hidden_size: of what the prefix gives, a row a token or, without `keeps_tokens`, an example.
    """

    trainable_set: str
    layout: tuple[Parameter, ...]
    theta: Vector
    files: Mapping[str, bytes]
    footprints: Mapping[str, Footprint]
    depth: int
    hidden_size: int
    keeps_tokens: bool


def as_shipped(model: TextClassifier, backbone: Backbone) -> TextClassifier:
    """What a device really computes with: frozen norms folded, frozen matrices rounded to int8 and back. A copy."""
    model = lean(model.eval(), backbone.activations, backbone.keep)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad and backbone.rounds(name, parameter.dim()):
                parameter.copy_(dequantize(*quantize_per_channel(parameter)))
    return model


def build_plans(model: TextClassifier, trainable_set: str, backbone: Backbone) -> Plans:
    """Plans for a model whose trainable parameters are marked (see `adapters.select`).

    Raises:
        LoweringError: the model uses an operator without an ONNX form here.
    """
    model = as_shipped(model, backbone)
    built = _build_three(model, backbone, "forward", ("input_ids", "attention_mask"), "")
    if model.depth:
        frozen = _trace(model, (), _call(model, "prefix"), ("input_ids", "attention_mask"))
        built["prefix"] = _write(frozen, backbone, list(frozen.inputs), {"hidden": 0})
        upper = ("hidden", "attention_mask") if model.keeps_tokens else ("hidden",)
        built |= _build_three(model, backbone, "suffix", upper, "_suffix")
    return Plans(
        trainable_set,
        layout_of(model),
        get_theta(model),
        {name: plan for name, (plan, _) in built.items()},
        {name: needs for name, (_, needs) in built.items()},
        model.depth,
        _hidden_size(model),
        model.keeps_tokens,
    )


def _build_three(
    model: TextClassifier, backbone: Backbone, stage: str, inputs: tuple[str, ...], suffix: str
) -> dict[str, tuple[bytes, Footprint]]:
    """Train, evaluate and predict share one trace; the latter two need less of it."""
    judged = (*inputs, "labels", "weights", "label_smoothing")
    trace = _trace(model, layout_of(model), train_step(model, stage), judged)
    return {
        f"train{suffix}": _write(trace, backbone, judged, {"loss": 0, "correct": 1, "gradient": 2, "weight": 3}),
        f"evaluate{suffix}": _write(trace, backbone, judged, {"loss": 0, "correct": 1, "weight": 3}),
        f"predict{suffix}": _write(trace, backbone, inputs, {"logits": 4}),
    }


def _hidden_size(model: TextClassifier) -> int:
    return model.config.hidden_size * (len(model.ladder.blocks) if model.ladder is not None else 1)


Step = Callable[..., tuple[Tensor, ...]]


class _Stage(nn.Module):
    """One of the model's methods, as something that `functional_call` can call."""

    def __init__(self, model: TextClassifier, stage: str) -> None:
        super().__init__()
        self.model, self.stage = model, stage

    def forward(self, *inputs: Tensor) -> Tensor:
        return getattr(self.model, self.stage)(*inputs)  # type: ignore[no-any-return]


def _call(model: TextClassifier, stage: str) -> Step:
    staged = _Stage(model, stage)

    def step(leaves: dict[str, Tensor], frozen: dict[str, Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        given = inputs if model.keeps_tokens or stage != "suffix" else (*inputs, inputs[0])  # the mask is not read
        return (functional_call(staged, {f"model.{n}": v for n, v in {**leaves, **frozen}.items()}, given),)

    return step


def train_step(model: TextClassifier, stage: str = "forward") -> Step:
    """(leaves, frozen, *inputs of a train plan) -> (loss, correct, gradient, weight, logits)"""
    call = _call(model, stage)

    def step(leaves: dict[str, Tensor], frozen: dict[str, Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        *given, labels, weights, smoothing = inputs
        leaves = {name: leaf.detach().requires_grad_(True) for name, leaf in leaves.items()}
        (logits,) = call(leaves, frozen, *given)
        mask = given[1] if len(given) > 1 else None
        loss, correct, weight = task_loss(model.task, logits, mask, labels, weights, smoothing)
        # A parameter that the loss does not use (a pooler under mean pooling) has a gradient of zeros.
        gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        gradient = torch.cat([g.reshape(-1) for g in gradients])
        return loss.detach(), correct, gradient, weight, logits.detach()

    return step


def decompositions() -> dict[Any, Any]:
    table = dict(core_aten_decompositions())
    for kept in (
        torch.ops.aten.embedding_dense_backward.default,
        torch.ops.aten.slice_backward.default,
        torch.ops.aten.select_backward.default,
    ):
        table.pop(kept, None)  # each is one ONNX node when kept whole
    return table


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing internals warn about themselves
        yield


def _inputs(model: TextClassifier, length: int) -> dict[str, tuple[torch.dtype, tuple[int, ...], list[Any]]]:
    """Name -> type, traced shape, declared shape."""
    batch, integers, floats = BATCH_PRIME, torch.int64, torch.float32
    size = _hidden_size(model)
    row = ((batch, length, size), ["batch", "length", size]) if model.keeps_tokens else ((batch, size), ["batch", size])
    labels = {
        "classification": (integers, (batch,), ["batch"]),
        "regression": (floats, (batch,), ["batch"]),
        "tokens": (integers, (batch, length), ["batch", "length"]),
        "spans": (integers, (batch, 2), ["batch", 2]),
    }
    return {
        "input_ids": (integers, (batch, length), ["batch", "length"]),
        "attention_mask": (integers, (batch, length), ["batch", "length"]),
        "hidden": (floats, *row),
        "labels": labels[model.task],
        "weights": (floats, (batch,), ["batch_or_one"]),
        "label_smoothing": (floats, (), []),
    }


@dataclass(frozen=True)
class _Trace:
    """A step as a graph of PyTorch operators; its placeholders are theta's parts, the inputs and the frozen tensors."""

    graph: torch.fx.Graph
    layout: Sequence[Parameter]
    frozen: Mapping[str, Tensor]
    length: int  # the prime that stands for it
    inputs: Mapping[str, tuple[torch.dtype, tuple[int, ...], list[Any]]]


def _trace(model: TextClassifier, layout: Sequence[Parameter], step: Step, inputs: Sequence[str]) -> _Trace:
    names = [p.name for p in layout]
    parameters = dict(model.named_parameters())
    frozen = {n: p.detach() for n, p in parameters.items() if n not in set(names)}
    sizes = {int(s) for p in parameters.values() for s in (*p.shape, p.numel())}
    length = length_prime(model.config.max_position_embeddings, sizes)
    declared = {name: _inputs(model, length)[name] for name in inputs}

    def flat_step(*values: Tensor) -> tuple[Tensor, ...]:
        leaves, rest = values[: len(names)], values[len(names) :]
        given, fixed = rest[: len(declared)], rest[len(declared) :]
        return step(dict(zip(names, leaves, strict=True)), dict(zip(frozen, fixed, strict=True)), *given)

    from torch._subclasses.fake_tensor import FakeTensorMode

    with quietly(), FakeTensorMode(allow_non_fake_inputs=True):
        fake_leaves = [torch.zeros(p.shape) for p in layout]
        fake_inputs = [torch.zeros(shape, dtype=dtype) for dtype, shape, _ in declared.values()]
        fake_frozen = [torch.zeros(p.shape) for p in frozen.values()]
        traced = make_fx(flat_step, decomposition_table=decompositions(), tracing_mode="real")(
            *fake_leaves, *fake_inputs, *fake_frozen
        )
    return _Trace(traced.graph, layout, frozen, length, declared)


def _write(
    trace: _Trace, backbone: Backbone, inputs: Sequence[str], outputs: Mapping[str, int]
) -> tuple[bytes, Footprint]:
    """The part of a trace that gives some of its outputs (name -> place), as ONNX bytes."""
    low = Lowering(trace.length)
    graph = _only(trace.graph, list(outputs.values()))
    # Unlike the hidden state of a pooled prefix, a mask tells batch and length.
    shape = low.emit("Shape", "attention_mask" if "attention_mask" in inputs else "hidden")
    for name, index in (("batch_size", 0), ("sequence_length", 1)):
        low.nodes.append(helper.make_node("Gather", [shape, low.constant([index], np.int64)], [name], name=name))
    given = []
    for name, (dtype, traced, _) in trace.inputs.items():
        sizes = low.shape(traced)  # one weight stands for all
        given.append(
            Value(sizes, dtype, low.emit("Expand", name, low.shape_vector(sizes)) if name == "weights" else name)
        )
    initializers: dict[str, TensorProto] = {}
    places = [n for n in graph.nodes if n.op == "placeholder"][len(trace.layout) + len(trace.inputs) :]
    read = {name: tensor for (name, tensor), n in zip(trace.frozen.items(), places, strict=True) if n.users}
    frozen = _frozen_values(trace.frozen, read, backbone, low, initializers)
    values = lower(graph, [*_leaves(trace.layout, low), *given, *frozen], low)
    results = [publish(low, value, name) for value, name in zip(values, outputs, strict=True)]
    nodes = prune(low.nodes, [r.name for r in results])
    if list(outputs) == ["logits"]:
        nodes = prune(rewritten(nodes, initializers, low.constant(1, np.float32)), list(outputs))
    used = used_names(nodes)
    kept = [t for t in [*constants_of(low), *initializers.values()] if t.name in used]
    defaults = {"weights": np.ones(1, np.float32), "label_smoothing": np.zeros((), np.float32)}
    kept += [onnx.numpy_helper.from_array(v, n) for n, v in defaults.items() if n in inputs]
    types = {torch.int64: TensorProto.INT64, torch.float32: TensorProto.FLOAT}
    takes = [helper.make_tensor_value_info(n, types[trace.inputs[n][0]], trace.inputs[n][2]) for n in inputs]
    if trace.layout:
        takes.insert(0, helper.make_tensor_value_info("theta", TensorProto.FLOAT, [total_size(trace.layout)]))
    model = helper.make_model(
        helper.make_graph(nodes, "plan", takes, results, kept),
        opset_imports=[helper.make_opsetid("", OPSET)] + [helper.make_opsetid(CONTRIB, 1)] * uses_contrib(nodes),
        ir_version=10,
        producer_name="pocketfed",
    )
    products = [n for n in trace.frozen if {n, n + ".int8"} & used and not n.endswith("embeddings.weight")]
    weights = sum(4 * trace.frozen[n].numel() for n in products)
    needs = Footprint(weights, activation_bytes(graph, low.shape, len(trace.layout) + len(trace.inputs)))
    return model.SerializeToString(deterministic=True), needs


def _only(graph: torch.fx.Graph, outputs: Sequence[int]) -> torch.fx.Graph:
    """A copy that computes only some of the outputs."""
    copied = torch.fx.Graph()
    results = copied.graph_copy(graph, {})
    copied.output(tuple(results[i] for i in outputs))  # type: ignore[index]
    copied.eliminate_dead_code()
    return copied


def _leaves(layout: Sequence[Parameter], low: Lowering) -> list[Value]:
    """Theta, taken apart."""
    if not layout:
        return []
    names = [f"leaf_{i}" for i in range(len(layout))]
    sizes = low.constant([p.size for p in layout], np.int64)
    low.nodes.append(helper.make_node("Split", ["theta", sizes], names, name="split"))
    wholes = (Value(low.shape((p.size,)), torch.float32, name) for p, name in zip(layout, names, strict=True))
    return [low.reshape(whole, low.shape(p.shape)) for p, whole in zip(layout, wholes, strict=True)]


def _frozen_values(
    frozen: Mapping[str, Tensor],
    read: Mapping[str, Tensor],
    backbone: Backbone,
    low: Lowering,
    initializers: dict[str, TensorProto],
) -> Iterator[Value | Quantized]:
    """Those that the graph does not read (of a prefix: all above it) are not stored."""
    for name, tensor in frozen.items():
        if name not in read:
            yield Value(low.shape(tensor.shape), tensor.dtype, name)
        elif backbone.rounds(name, tensor.dim()):
            q, scale = quantize_per_channel(tensor)
            for suffix, part in ((".int8", q), (".scale", scale)):
                initializers[name + suffix] = backbone.add(name + suffix, part.numpy())
            yield Quantized(name + ".int8", name + ".scale", tuple(tensor.shape))
        else:
            initializers[name] = backbone.add(name, tensor.numpy())
            yield Value(low.shape(tensor.shape), tensor.dtype, name)


def publish(low: Lowering, value: Value, name: str) -> onnx.ValueInfoProto:
    low.nodes.append(helper.make_node("Identity", [low.name(value)], [name], name=name))
    dtype = TensorProto.INT64 if value.dtype == torch.int64 else TensorProto.FLOAT
    symbols = {(1, 0): "batch", (0, 1): "length"}
    dims = [s.k if s.fixed else symbols[s.b, s.t] for s in value.shape]
    return helper.make_tensor_value_info(name, dtype, dims)


def verify_plans(
    model: TextClassifier, plans: Plans, folder: Path, files: Mapping[str, str], backbone: Backbone, seed: int = 0
) -> float:
    """Compare the plans in `folder` with autograd on random texts of two shapes. Returns the largest relative error.

    Args:
        files: the plan's name -> its file's.

    Raises:
        PlanError: they differ by more than is rounding; the artifact must not be published.
    """
    model = as_shipped(model, backbone)
    for file in files.values():
        onnx.checker.check_model(str(folder / file))
    opened = {name: _open(folder / file) for name, file in files.items()}
    generator = torch.Generator().manual_seed(seed)
    worst = 0.0
    for batch, length in ((3, min(11, model.config.max_position_embeddings)), (2, 5)):
        feed, expected = _sample(model, batch, length, generator)
        feed |= {"theta": plans.theta}
        if "prefix" in opened:
            (feed["hidden"],) = _run(opened["prefix"], feed, ["hidden"])
            worst = _worse(worst, feed["hidden"], expected["hidden"])
        for name, outputs in (("train", ("loss", "gradient")), ("evaluate", ("loss",)), ("predict", ("logits",))):
            for session in (opened[name], opened.get(f"{name}_suffix")):
                if session is not None:
                    for output, got in zip(outputs, _run(session, feed, outputs), strict=True):
                        worst = _worse(worst, got, expected[output])
    tolerance = GRADIENT_TOLERANCE if backbone.activations == "float32" else ROUNDED_TOLERANCE
    if not worst <= tolerance:  # NaN counts as different
        raise PlanError(
            f"the plan of {plans.trainable_set!r} differs from the model by {worst:.2e} (relative; at most "
            f"{tolerance} is accepted); check the weights for huge or non-finite values"
        )
    return worst


def _open(path: Path) -> Any:
    onnxruntime = load_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_mem_reuse = False  # its planner takes time with the square of the number of nodes
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _run(session: Any, feed: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[NDArray[Any]]:
    taken = {i.name for i in (*session.get_inputs(), *session.get_overridable_initializers())}
    return session.run(list(outputs), {k: v for k, v in feed.items() if k in taken})  # type: ignore[no-any-return]


def _worse(worst: float, got: NDArray[Any], wanted: NDArray[Any]) -> float:
    difference = float(np.abs(got - wanted).max() / max(1e-6, float(np.abs(wanted).max())))
    return float(np.max([worst, difference]))  # unlike Python's max, NaN stays NaN


def _sample(
    model: TextClassifier, batch: int, length: int, generator: torch.Generator
) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """A random batch as a plan takes it, and what autograd makes of it."""
    ids = torch.randint(model.config.vocab_size, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, length - 2 :] = 0
    classes = model.classifier.out_features
    labels = {
        "classification": lambda: torch.randint(classes, (batch,), generator=generator),
        "regression": lambda: torch.randn(batch, generator=generator),
        "tokens": lambda: torch.randint(-1, classes, (batch, length), generator=generator),
        "spans": lambda: torch.randint(length - 2, (batch, 2), generator=generator),
    }[model.task]()
    weights = torch.rand(batch, generator=generator) + 0.5
    smoothing = torch.tensor(0.1)
    hidden = model.prefix(ids, mask)
    logits = model.suffix(hidden, mask)
    loss, _, _ = task_loss(model.task, logits, mask, labels, weights, smoothing)
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, trained, materialize_grads=True)
    feed = {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "weights": weights,
        "label_smoothing": smoothing,
    }
    gradient = torch.cat([g.reshape(-1) for g in gradients])
    wanted = {"hidden": hidden, "logits": logits, "loss": loss, "gradient": gradient}
    return {k: v.numpy() for k, v in feed.items()}, {k: v.detach().numpy() for k, v in wanted.items()}
