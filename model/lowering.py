"""From a traced PyTorch graph to plain ONNX: the few dozen operators that MobileBERT's forward and backward need.

Why not `torch.onnx.export`: it takes half a minute for a graph that this turns over in a second, and hides the choices
that matter on a device (int8 weights, transposes folded into products, reshapes that never run). docs/architecture.md has the figures.

Batch and length stay dynamic without symbolic tracing: the trace runs on fake tensors whose batch and length are two
primes that divide no size of the model, so every size in the graph is k * batch^b * length^t in exactly one way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

import pocketfed.model.lean  # noqa: F401 - registers torch.ops.pocketfed.int8_linear

OPSET = 20
BATCH_PRIME = 100_003

_DTYPES: dict[torch.dtype, int] = {
    torch.float32: TensorProto.FLOAT,
    torch.int64: TensorProto.INT64,
    torch.bool: TensorProto.BOOL,
}


class LoweringError(RuntimeError):
    """The traced graph holds something that has no place in a plan."""


def length_prime(limit: int, sizes: set[int]) -> int:
    """The largest prime of at most `limit` that divides none of the model's sizes."""
    for candidate in range(limit, 2, -1):
        prime = all(candidate % d for d in range(2, math.isqrt(candidate) + 1))
        if prime and not any(size % candidate == 0 for size in sizes):
            return candidate
    raise LoweringError(
        f"no prime up to {limit} tells the length from the model's sizes; raise max_position_embeddings"
    )


@dataclass(frozen=True)
class Size:
    """k * batch^b * length^t"""

    k: int
    b: int = 0
    t: int = 0

    @property
    def fixed(self) -> bool:
        return not (self.b or self.t)


Shape = tuple[Size, ...]


@dataclass
class Value:
    """A tensor of the graph. `name` is empty while a reshape, expand or transpose of `source` has not had to run."""

    shape: Shape
    dtype: torch.dtype
    name: str = ""
    source: Value | None = None
    view: str = ""  # reshape, expand, transpose
    order: tuple[int, ...] = ()  # of a transpose


@dataclass
class Quantized:
    """A frozen weight (out, in) held as int8, one scale a row: value = q * scale. Names of initializers.

    It lies as (out, in) on purpose: from (in, out) ONNX Runtime, unasked, makes a product of 8-bit activations.
    """

    q: str
    scale: str
    shape: tuple[int, ...]


@dataclass
class Lowering:
    """ONNX nodes under construction."""

    length: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, NDArray[Any]] = field(default_factory=dict)
    positive: dict[torch.fx.Node, Value] = field(default_factory=dict)  # of a ReLU: where its input was above zero
    _cache: dict[Any, str] = field(default_factory=dict)
    _count: int = 0

    # ---- emitting --------------------------------------------------------------------------------------------------------

    def fresh(self, stem: str) -> str:
        self._count += 1
        return f"{stem}_{self._count}"

    def emit(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        """Append a node; returns its first output's name (the others are `<name>:1`, `<name>:2`)."""
        name = self.fresh(op.lower())
        names = [name, *(f"{name}:{i}" for i in range(1, outputs))]
        self.nodes.append(helper.make_node(op, list(inputs), names, name=name, **attributes))
        return name

    def once(self, op: str, *inputs: str, **attributes: Any) -> str:
        """As `emit`, but the same node is made only once."""
        key = (op, inputs, tuple(sorted((k, str(v)) for k, v in attributes.items())))
        if key not in self._cache:
            self._cache[key] = self.emit(op, *inputs, **attributes)
        return self._cache[key]

    def constant(self, value: Any, dtype: Any) -> str:
        array = np.asarray(value, dtype)
        key = ("constant", array.dtype.str, array.shape, array.tobytes())
        if key not in self._cache:
            self._cache[key] = self.fresh("constant")
            self.constants[self._cache[key]] = array
        return self._cache[key]

    # ---- sizes -----------------------------------------------------------------------------------------------------------

    def size(self, n: int) -> Size:
        b = t = 0
        while n and n % BATCH_PRIME == 0:
            n, b = n // BATCH_PRIME, b + 1
        while n and n % self.length == 0:
            n, t = n // self.length, t + 1
        return Size(n, b, t)

    def shape(self, sizes: Sequence[int]) -> Shape:
        return tuple(self.size(int(n)) for n in sizes)

    def size_vector(self, size: Size) -> str:
        """Name of a 1-element int64 tensor with that size's value at run time."""
        if size.fixed:
            return self.constant([size.k], np.int64)
        factors = ["batch_size"] * size.b + ["sequence_length"] * size.t
        factors += [self.constant([size.k], np.int64)] if size.k != 1 else []
        result = factors[0]
        for factor in factors[1:]:
            result = self.once("Mul", result, factor)
        return result

    def shape_vector(self, shape: Shape, infer: bool = False) -> str:
        """Name of an int64 tensor with the shape; with `infer` one dynamic size may be left to the runtime as -1."""
        dynamic = [i for i, s in enumerate(shape) if not s.fixed]
        left_out = dynamic[0] if infer and dynamic else None
        if len(dynamic) <= (1 if infer else 0):
            return self.constant([-1 if i == left_out else s.k for i, s in enumerate(shape)], np.int64)
        parts = [self.constant([-1], np.int64) if i == left_out else self.size_vector(s) for i, s in enumerate(shape)]
        return self.once("Concat", *parts, axis=0)

    # ---- views that run only when they must --------------------------------------------------------------------------------

    def name(self, value: Value) -> str:
        if not value.name:
            assert value.source is not None
            source = self.name(value.source)
            if value.view == "reshape":
                value.name = self.emit("Reshape", source, self._reshape_vector(value.source.shape, value.shape))
            elif value.view == "expand":
                value.name = self.emit("Expand", source, self.shape_vector(value.shape))
            else:
                value.name = self.emit("Transpose", source, perm=list(value.order))
        return value.name

    def _reshape_vector(self, old: Shape, new: Shape) -> str:
        kept = [i < len(old) and old[i] == new[i] and not new[i].fixed for i in range(len(new))]
        if sum(not s.fixed and not k for s, k in zip(new, kept, strict=True)) <= 1:
            sizes = [0 if k else s.k if s.fixed else -1 for s, k in zip(new, kept, strict=True)]
            return self.constant(sizes, np.int64)  # 0 copies the size of the same axis
        return self.shape_vector(new, infer=True)

    def reshape(self, value: Value, shape: Shape) -> Value:
        while value.view == "reshape" and value.source is not None:
            value = value.source
        return value if value.shape == shape else Value(shape, value.dtype, source=value, view="reshape")

    def transpose(self, value: Value, order: Sequence[int]) -> Value:
        order = tuple(o % len(value.shape) for o in order)
        if value.view == "transpose" and value.source is not None:
            order, value = tuple(value.order[o] for o in order), value.source
        if order == tuple(range(len(order))):
            return value
        shape = tuple(value.shape[o] for o in order)
        return Value(shape, value.dtype, source=value, view="transpose", order=order)

    def expand(self, value: Value, shape: Shape) -> Value:
        return value if value.shape == shape else Value(shape, value.dtype, source=value, view="expand")

    def flat(self, value: Value) -> Value | None:
        """The matrix behind a view that only splits its rows: (B * T, D) behind (B, T, D). None if there is no such."""
        source = value.source
        if value.name or value.view != "reshape" or source is None or len(source.shape) != 2:
            return None
        return source if len(value.shape) > 2 and source.shape[-1] == value.shape[-1] else None

    def operand(self, value: Value, partner: Shape, result: Shape) -> str:
        """An elementwise operand's name: an expand need not run where the partner already has the result's shape."""
        if not value.name and value.view == "expand" and partner == result and value.source is not None:
            return self.name(value.source)
        return self.name(value)


Arguments = tuple[Any, ...]
Rule = Callable[[Lowering, torch.fx.Node, Arguments], Any]
RULES: dict[Any, Rule] = {}
aten = torch.ops.aten
INT8_LINEAR = torch.ops.pocketfed.int8_linear.default


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, function))
        return function

    return register


def result(low: Lowering, node: torch.fx.Node, name: str) -> Value:
    meta = node.meta["val"]
    return Value(low.shape(meta.shape), meta.dtype, name)


def numpy_type(dtype: torch.dtype) -> Any:
    return {torch.float32: np.float32, torch.int64: np.int64, torch.bool: np.bool_}[dtype]


def scalar(low: Lowering, number: Any, dtype: torch.dtype) -> str:
    """A Python number as an operand; whole numbers may be sizes."""
    if isinstance(number, int) and not isinstance(number, bool) and not low.size(number).fixed:
        vector = low.once("Squeeze", low.size_vector(low.size(number)))  # a scalar: it must not add an axis
        return vector if dtype == torch.int64 else low.once("Cast", vector, to=_DTYPES[dtype])
    return low.constant(number, numpy_type(dtype))


def elementwise(low: Lowering, node: torch.fx.Node, op: str, a: Any, b: Any) -> Value:
    shape = low.shape(node.meta["val"].shape)
    dtype = next(x.dtype for x in (a, b) if isinstance(x, Value))
    flat = _flat_operands(low, a, b, shape)
    if flat is not None:  # on the matrices behind the views, so that no reshape has to run
        a, b, inner = flat
        out = Value(inner, node.meta["val"].dtype, low.emit(op, *_operand_names(low, a, b, inner, dtype)))
        return low.reshape(out, shape)
    return result(low, node, low.emit(op, *_operand_names(low, a, b, shape, dtype)))


def _operand_names(low: Lowering, a: Any, b: Any, shape: Shape, dtype: torch.dtype) -> list[str]:
    names = []
    for mine, other in ((a, b), (b, a)):
        if isinstance(mine, Value):
            partner = other.shape if isinstance(other, Value) else ()
            name = low.operand(mine, partner, shape)
            names.append(name if mine.dtype == dtype else low.once("Cast", name, to=_DTYPES[dtype]))
        else:
            names.append(scalar(low, mine, dtype))
    return names


def _flat_operands(low: Lowering, a: Any, b: Any, shape: Shape) -> tuple[Any, Any, Shape] | None:
    sources = [low.flat(x) if isinstance(x, Value) and x.shape == shape else None for x in (a, b)]
    inner = next((x.shape for x in sources if x is not None), None)
    if inner is None:
        return None
    operands = []
    for value, source in zip((a, b), sources, strict=True):
        if source is not None and source.shape == inner:
            operands.append(source)
        elif not isinstance(value, Value) or value.shape in ((), inner[-1:]):
            operands.append(value)
        elif value.shape == shape and value.view != "expand":
            operands.append(low.reshape(value, inner))
        else:
            return None
    return operands[0], operands[1], inner


def _binary(op: str) -> Rule:
    def apply(low: Lowering, node: torch.fx.Node, args: Arguments) -> Value:
        if node.kwargs.get("alpha", 1) != 1:
            raise LoweringError(f"{node.target} with alpha={node.kwargs['alpha']} has no ONNX form here")
        return elementwise(low, node, op, args[0], args[1])

    return apply


for _op, _targets in {
    "Add": (aten.add.Tensor,),
    "Sub": (aten.sub.Tensor,),
    "Mul": (aten.mul.Tensor, aten.mul.Scalar),
    "Div": (aten.div.Tensor, aten.div.Scalar),
    "Equal": (aten.eq.Tensor, aten.eq.Scalar),
    "LessOrEqual": (aten.le.Tensor, aten.le.Scalar),
    "GreaterOrEqual": (aten.ge.Tensor, aten.ge.Scalar),
    "Less": (aten.lt.Tensor, aten.lt.Scalar),
    "Greater": (aten.gt.Tensor, aten.gt.Scalar),
    "Pow": (aten.pow.Tensor_Scalar,),
    "And": (aten.bitwise_and.Tensor, aten.logical_and.default),
    "Or": (aten.bitwise_or.Tensor, aten.logical_or.default),
}.items():
    RULES.update(dict.fromkeys(_targets, _binary(_op)))


def unary(low: Lowering, node: torch.fx.Node, value: Value, op: str, *more: str, **attributes: Any) -> Value:
    flat = low.flat(value)
    if flat is None:
        return result(low, node, low.emit(op, low.name(value), *more, **attributes))
    inner = Value(flat.shape, node.meta["val"].dtype, low.emit(op, low.name(flat), *more, **attributes))
    return low.reshape(inner, value.shape)


def _unary(op: str, **attributes: Any) -> Rule:
    return lambda low, node, args: unary(low, node, args[0], op, **attributes)


_SAME = (aten.alias.default, aten.detach.default)  # autograd puts some between a value and what the backward pass reads


def _uses(node: torch.fx.Node) -> Iterator[torch.fx.Node]:
    for user in node.users:
        if user.target in _SAME:
            yield from _uses(user)
        else:
            yield user


def _origin(node: Any) -> Any:
    while isinstance(node, torch.fx.Node) and node.target in _SAME:
        node = node.args[0]
    return node


@rule(aten.relu.default)
def _relu(low: Lowering, node: torch.fx.Node, args: Arguments) -> Value:
    out = unary(low, node, args[0], "Relu")
    if any(user.target is aten.le.Scalar and user.args[1] == 0 for user in _uses(node)):
        # The backward pass needs only where x was above zero: asked now, one byte is kept for each four.
        inner = low.flat(out) or out
        low.positive[node] = low.reshape(
            Value(inner.shape, torch.bool, low.emit("Greater", low.name(inner), low.constant(0, np.float32))), out.shape
        )
    return out


for _op, _target in {
    "Neg": aten.neg.default,
    "Exp": aten.exp.default,
    "Erf": aten.erf.default,
    "Tanh": aten.tanh.default,
    "Sqrt": aten.sqrt.default,
    "Reciprocal": aten.reciprocal.default,
    "Not": aten.bitwise_not.default,
    "Log": aten.log.default,
}.items():
    RULES[_target] = _unary(_op)


@rule(aten.alias.default, aten.detach.default, aten.clone.default, aten.lift_fresh_copy.default)
def _same(low: Lowering, node: torch.fx.Node, args: Arguments) -> Value:
    return args[0]  # type: ignore[no-any-return]


@rule(
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
)
def _view(low: Lowering, node: torch.fx.Node, args: Arguments) -> Value:
    return low.reshape(args[0], low.shape(node.meta["val"].shape))


@rule(aten.expand.default)
def _expand(low: Lowering, node: torch.fx.Node, args: Arguments) -> Value:
    return low.expand(args[0], low.shape(node.meta["val"].shape))


@rule(aten.permute.default)
def _permute(low: Lowering, node: torch.fx.Node, args: Arguments) -> Value:
    return low.transpose(args[0], args[1])


@rule(aten.t.default)
def _t(low: Lowering, node: torch.fx.Node, args: Arguments) -> Value:
    return low.transpose(args[0], (1, 0))


@rule(aten.transpose.int)
def _transpose(low: Lowering, node: torch.fx.Node, args: Arguments) -> Value:
    order = list(range(len(args[0].shape)))
    order[args[1]], order[args[2]] = order[args[2]], order[args[1]]
    return low.transpose(args[0], order)


def _flip(low: Lowering, value: Value) -> tuple[str, int]:
    """A matrix operand's name, and 1 if it is to be read transposed (so that the transpose itself never runs)."""
    if not value.name and value.view == "transpose" and value.source is not None and value.order == (1, 0):
        return low.name(value.source), 1
    return low.name(value), 0


@rule(aten.mm.default)
def _mm(low: Lowering, node: torch.fx.Node, args: Arguments) -> Value:
    (a, flip_a), (b, flip_b) = _flip(low, args[0]), _flip(low, args[1])
    return result(low, node, low.emit("Gemm", a, b, transA=flip_a, transB=flip_b))


@rule(aten.addmm.default)
def _addmm(low: Lowering, node: torch.fx.Node, args: Arguments) -> Value:
    (a, flip_a), (b, flip_b) = _flip(low, args[1]), _flip(low, args[2])
    return result(low, node, low.emit("Gemm", a, b, low.name(args[0]), transA=flip_a, transB=flip_b))


@rule(aten.bmm.default)
def _bmm(low: Lowering, node: torch.fx.Node, args: Arguments) -> Value:
    """Batched over examples and heads: on the 4-D tensors behind the views, where there are such."""
    a, b = (_four_dimensional(x) for x in args[:2])
    out = result(low, node, "")
    if a is None or b is None or a.shape[:2] != b.shape[:2]:
        out.name = low.emit("MatMul", low.name(args[0]), low.name(args[1]))
        return out
    product = Value((*a.shape[:2], *out.shape[1:]), out.dtype, low.emit("MatMul", low.name(a), low.name(b)))
    return low.reshape(product, out.shape)


def _four_dimensional(value: Value) -> Value | None:
    source = value.source
    if value.name or value.view != "reshape" or source is None or len(source.shape) != 4:
        return None
    return source if source.shape[2:] == value.shape[1:] else None


@rule(INT8_LINEAR)
def _int8_linear(low: Lowering, node: torch.fx.Node, args: Arguments) -> Value:
    """Rows of x to uint8 around 128, one scale a row; their product with int8 weights is exact, and scaled back."""
    x, weight = args
    if not isinstance(weight, Quantized):
        raise LoweringError("8-bit activations need a weight that is frozen as int8; quantize the backbone")
    rows = Size(1)
    for s in x.shape[:-1]:
        rows = Size(rows.k * s.k, rows.b + s.b, rows.t + s.t)
    flat = low.name(low.reshape(x, (rows, x.shape[-1])))
    largest = low.once("ReduceMax", low.once("Abs", flat), low.constant([1], np.int64), keepdims=0)
    scale = low.once("Div", low.once("Max", largest, low.constant(1e-30, np.float32)), low.constant(127, np.float32))
    middle = low.constant(128, np.uint8)
    zero_points = low.once("Expand", middle, low.shape_vector((rows,)))
    q = low.once("QuantizeLinear", flat, scale, zero_points, axis=0)
    columns = low.once(
        "Transpose", weight.q, perm=[1, 0]
    )  # of a constant: the runtime does it once, when it opens the plan
    product = low.emit("Cast", low.emit("MatMulInteger", q, columns, middle), to=TensorProto.FLOAT)
    column = low.once("Unsqueeze", scale, low.constant([1], np.int64))
    out = low.emit("Mul", low.emit("Mul", product, weight.scale), column)
    shape = low.shape(node.meta["val"].shape)
    return low.reshape(Value((rows, shape[-1]), torch.float32, out), shape)


@rule(aten.sum.dim_IntList, aten.mean.dim)
def _reduce(low: Lowering, node: torch.fx.Node, args: Arguments) -> Value:
    op = "ReduceSum" if node.target is aten.sum.dim_IntList else "ReduceMean"
    keep = int(args[2]) if len(args) > 2 else 0
    rank = len(args[0].shape)
    axes = [a % rank for a in args[1]] if args[1] else list(range(rank))
    flat = low.flat(args[0])
    if flat is not None and axes == list(range(rank - 1)):  # over all rows
        name = low.emit(op, low.name(flat), low.constant([0], np.int64), keepdims=1)
        return low.reshape(Value((Size(1), flat.shape[1]), flat.dtype, name), low.shape(node.meta["val"].shape))
    if op == "ReduceSum" and rank == 3 and axes == [1] and args[0].dtype == torch.float32:
        # Over tokens, as a product with ones: ONNX Runtime's own sum takes another order for a lone example.
        one = numpy_helper.from_array(np.ones(1, np.float32))
        ones = low.once("ConstantOfShape", low.shape_vector((Size(1), args[0].shape[1])), value=one)
        batch, _, width = args[0].shape
        summed = Value((batch, Size(1), width), torch.float32, low.emit("MatMul", ones, low.name(args[0])))
        return low.reshape(summed, low.shape(node.meta["val"].shape))
    return result(low, node, low.emit(op, low.name(args[0]), low.constant(axes, np.int64), keepdims=keep))


@rule(aten.sum.default)
def _sum(low: Lowering, node: torch.fx.Node, args: Arguments) -> Value:
    return result(low, node, low.emit("ReduceSum", low.name(args[0]), keepdims=0))


@rule(aten._softmax.default, aten._log_softmax.default)
def _softmax(low: Lowering, node: torch.fx.Node, args: Arguments) -> Value:
    op = "Softmax" if node.target is aten._softmax.default else "LogSoftmax"
    return result(low, node, low.emit(op, low.name(args[0]), axis=args[1]))


@rule(aten.gelu.default)
def _gelu(low: Lowering, node: torch.fx.Node, args: Arguments) -> Value:
    return result(low, node, low.emit("Gelu", low.name(args[0]), approximate=node.kwargs.get("approximate", "none")))


@rule(aten.clamp.default)
def _clamp(low: Lowering, node: torch.fx.Node, args: Arguments) -> Value:
    bounds = ["" if x is None else low.constant(x, np.float32) for x in (*args[1:], None, None)[:2]]
    return result(low, node, low.emit("Clip", low.name(args[0]), *bounds))


@rule(aten.hardtanh.default)
def _hardtanh(low: Lowering, node: torch.fx.Node, args: Arguments) -> Value:
    """ReLU6 is a hardtanh from 0 to 6."""
    low_bound, high_bound = (low.constant(x, np.float32) for x in (*args[1:], -1.0, 1.0)[:2])
    return result(low, node, low.emit("Clip", low.name(args[0]), low_bound, high_bound))


@rule(aten.native_layer_norm.default)
def _layer_norm(low: Lowering, node: torch.fx.Node, args: Arguments) -> tuple[Value, ...]:
    x, sizes, weight, bias, eps = args
    scale = low.name(weight) if weight is not None else low.constant(np.ones(sizes), np.float32)
    inputs = [low.name(x), scale] + ([low.name(bias)] if bias is not None else [])
    name = low.emit("LayerNormalization", *inputs, outputs=3, axis=-len(sizes), epsilon=eps)
    metas = node.meta["val"]
    return tuple(
        Value(low.shape(m.shape), m.dtype, n) for m, n in zip(metas, (name, f"{name}:1", f"{name}:2"), strict=True)
    )


@rule(aten._to_copy.default)
def _cast(low: Lowering, node: torch.fx.Node, args: Arguments) -> Value:
    dtype = node.meta["val"].dtype
    if dtype == args[0].dtype:
        return args[0]  # type: ignore[no-any-return]
    return result(low, node, low.once("Cast", low.name(args[0]), to=_DTYPES[dtype]))


@rule(aten.scalar_tensor.default)
def _scalar_tensor(low: Lowering, node: torch.fx.Node, args: Arguments) -> Value:
    return result(low, node, low.constant(args[0], numpy_type(node.meta["val"].dtype)))


@rule(aten.full.default, aten.full_like.default)
def _full(low: Lowering, node: torch.fx.Node, args: Arguments) -> Value:
    meta = node.meta["val"]
    one = Value((), meta.dtype, low.constant(args[1], numpy_type(meta.dtype)))
    return low.expand(one, low.shape(meta.shape))


@rule(aten.where.self)
def _where(low: Lowering, node: torch.fx.Node, args: Arguments) -> Value:
    condition = node.args[0]
    if isinstance(condition, torch.fx.Node) and condition.target is aten.le.Scalar and condition.args[1] == 0:
        positive = low.positive.get(_origin(condition.args[0]))
        if positive is not None and _is_zero(node.args[1]):  # a ReLU's gradient
            # Not a product with the mask as numbers: that would be made at once, and four bytes kept for each of its one.
            return _where_positive(low, node, positive, args[2])
    return result(low, node, low.emit("Where", *(low.name(x) for x in args)))


def _where_positive(low: Lowering, node: torch.fx.Node, positive: Value, gradient: Value) -> Value:
    flat, zero = low.flat(gradient), low.constant(0, np.float32)
    if flat is None:
        return result(low, node, low.emit("Where", low.name(positive), low.name(gradient), zero))
    mask = low.name(low.reshape(positive, flat.shape))
    return low.reshape(Value(flat.shape, torch.float32, low.emit("Where", mask, low.name(flat), zero)), gradient.shape)


def _is_zero(argument: Any) -> bool:
    if isinstance(argument, torch.fx.Node):
        if argument.target not in (aten.scalar_tensor.default, aten.full.default):
            return False
        argument = argument.args[-1]
    return bool(argument == 0)


@rule(aten.embedding.default)
def _embedding(low: Lowering, node: torch.fx.Node, args: Arguments) -> Value:
    table, ids = args[0], low.name(args[1])
    if isinstance(table, Quantized):  # gather the int8 rows first, so that the table itself is never widened
        rows = low.emit("Cast", low.emit("Gather", table.q, ids), to=TensorProto.FLOAT)
        scales = low.emit("Unsqueeze", low.emit("Gather", table.scale, ids), low.constant([-1], np.int64))
        return result(low, node, low.emit("Mul", rows, scales))
    return result(low, node, low.emit("Gather", low.name(table), ids))


@rule(aten.embedding_dense_backward.default)
def _embedding_backward(low: Lowering, node: torch.fx.Node, args: Arguments) -> Value:
    grad, ids, rows = args[:3]
    out = result(low, node, "")
    tokens = Size(1)
    for s in ids.shape:
        tokens = Size(tokens.k * s.k, tokens.b + s.b, tokens.t + s.t)
    zeros = low.emit("ConstantOfShape", low.constant([rows, out.shape[1].k], np.int64))
    # Not ScatterND: on several threads ONNX Runtime's adds race there, and updates of a row named twice are lost.
    row = low.reshape(ids, (tokens, Size(1)))
    index = low.name(low.expand(row, (tokens, out.shape[1])))
    update = low.name(low.reshape(grad, (tokens, out.shape[1])))
    out.name = low.emit("ScatterElements", zeros, index, update, axis=0, reduction="add")
    return out


@rule(aten.slice.Tensor)
def _slice(low: Lowering, node: torch.fx.Node, args: Arguments) -> Value:
    shape = low.shape(node.meta["val"].shape)
    if shape == args[0].shape:
        return args[0]  # type: ignore[no-any-return]
    axis, start, end = args[1], args[2] or 0, args[3]
    ends = low.constant([end], np.int64) if end < 0 or end > 1 << 40 else low.size_vector(low.size(end))
    return result(
        low,
        node,
        low.emit("Slice", low.name(args[0]), low.constant([start], np.int64), ends, low.constant([axis], np.int64)),
    )


@rule(aten.slice_backward.default)
def _slice_backward(low: Lowering, node: torch.fx.Node, args: Arguments) -> Value:
    grad, sizes, axis, start, end, step = args
    if start != 0 or step != 1:
        raise LoweringError(f"the gradient of a slice from {start} by {step} has no ONNX form here")
    left = low.once("Sub", low.size_vector(low.size(sizes[axis])), low.size_vector(low.size(min(end, sizes[axis]))))
    pads = [low.constant([0], np.int64)] * (2 * len(sizes))
    pads[len(sizes) + axis] = left
    return result(low, node, low.emit("Pad", low.name(grad), low.once("Concat", *pads, axis=0)))


@rule(aten.select.int)
def _select(low: Lowering, node: torch.fx.Node, args: Arguments) -> Value:
    return result(low, node, low.emit("Gather", low.name(args[0]), low.constant(args[2], np.int64), axis=args[1]))


@rule(aten.select_backward.default)
def _select_backward(low: Lowering, node: torch.fx.Node, args: Arguments) -> Value:
    grad, sizes, axis, index = args
    if index != 0:
        raise LoweringError(f"the gradient of element {index} has no ONNX form here; only the first has")
    one = low.reshape(grad, (*grad.shape[:axis], Size(1), *grad.shape[axis:]))
    left = low.once("Sub", low.size_vector(low.size(sizes[axis])), low.constant([1], np.int64))
    pads = [low.constant([0], np.int64)] * (2 * len(sizes))
    pads[len(sizes) + axis] = left
    return result(low, node, low.emit("Pad", low.name(one), low.once("Concat", *pads, axis=0)))


@rule(aten.constant_pad_nd.default)
def _pad(low: Lowering, node: torch.fx.Node, args: Arguments) -> Value:
    pairs, rank = args[1], len(args[0].shape)
    pads = [0] * (2 * rank)
    for i in range(len(pairs) // 2):
        pads[rank - 1 - i], pads[2 * rank - 1 - i] = pairs[2 * i], pairs[2 * i + 1]
    return result(low, node, low.emit("Pad", low.name(args[0]), low.constant(pads, np.int64)))


@rule(aten.cat.default)
def _cat(low: Lowering, node: torch.fx.Node, args: Arguments) -> Value:
    axis = args[1] if len(args) > 1 else 0
    return result(low, node, low.emit("Concat", *(low.name(x) for x in args[0]), axis=axis))


@rule(aten.cumsum.default)
def _cumsum(low: Lowering, node: torch.fx.Node, args: Arguments) -> Value:
    return result(low, node, low.emit("CumSum", low.name(args[0]), low.constant(args[1], np.int64)))


@rule(aten.argmax.default)
def _argmax(low: Lowering, node: torch.fx.Node, args: Arguments) -> Value:
    return result(low, node, low.emit("ArgMax", low.name(args[0]), axis=args[1], keepdims=0))


@rule(aten.split_with_sizes.default)
def _split(low: Lowering, node: torch.fx.Node, args: Arguments) -> tuple[Value, ...]:
    axis = args[2] if len(args) > 2 else 0
    shapes = [low.shape(m.shape) for m in node.meta["val"]]
    flat = low.flat(args[0]) if axis % len(args[0].shape) == len(args[0].shape) - 1 else None
    source, axis = (flat, 1) if flat is not None else (args[0], axis)  # the matrix behind the view, as it is
    name = low.emit("Split", low.name(source), low.constant(args[1], np.int64), outputs=len(args[1]), axis=axis)
    names = [name, *(f"{name}:{i}" for i in range(1, len(args[1])))]
    parts = (
        Value((*source.shape[:axis], s[-1]) if flat else s, source.dtype, n) for s, n in zip(shapes, names, strict=True)
    )
    return tuple(low.reshape(part, s) for part, s in zip(parts, shapes, strict=True))


@rule(aten.arange.start_step)
def _arange(low: Lowering, node: torch.fx.Node, args: Arguments) -> Value:
    if len(args) > 1 and not low.size(args[1]).fixed:
        return result(low, node, low.once("Range", *(scalar(low, x, torch.int64) for x in (args[0], args[1], 1))))
    return result(low, node, low.constant(np.arange(*args[:3]), np.int64))


def lower(graph: torch.fx.Graph, inputs: Sequence[Any], low: Lowering) -> list[Value]:
    """Lower a traced graph whose placeholders are `inputs` (Values or Quantized weights, in order). Returns its outputs.

    Raises:
        LoweringError: an operator that RULES does not know.
    """
    graph.eliminate_dead_code()
    values: dict[torch.fx.Node, Any] = {}
    supply = iter(inputs)

    def get(argument: Any) -> Any:
        if isinstance(argument, torch.fx.Node):
            return values[argument]
        if isinstance(argument, (list, tuple)):
            return type(argument)(get(a) for a in argument)
        return argument

    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = next(supply)
        elif node.op == "call_function" and node.target in RULES:
            values[node] = RULES[node.target](low, node, tuple(_dequantized(low, node, get(a)) for a in node.args))
        elif node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem":
            values[node] = values[node.args[0]][node.args[1]]
        elif node.op == "output":
            return [get(a) for a in node.args[0]]
        else:
            raise LoweringError(f"{node.op} {node.target} has no ONNX form in model/lowering.py; add a rule")
    raise LoweringError("the traced graph has no output")


def _dequantized(low: Lowering, node: torch.fx.Node, value: Any) -> Any:
    """Frozen int8 weights are widened where they are used, except in an embedding and in a product of integers."""
    if not isinstance(value, Quantized) or node.target in (aten.embedding.default, INT8_LINEAR):
        return value
    name = low.once("DequantizeLinear", value.q, value.scale, axis=0)
    return Value(low.shape(value.shape), torch.float32, name)


def constants_of(low: Lowering) -> list[TensorProto]:
    return [numpy_helper.from_array(array, name) for name, array in low.constants.items()]


def prune(nodes: Sequence[onnx.NodeProto], outputs: Sequence[str]) -> list[onnx.NodeProto]:
    """Only the nodes that outputs depend on."""
    needed, kept = set(outputs), []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    return kept[::-1]


def used_names(nodes: Sequence[onnx.NodeProto]) -> set[str]:
    return {name for node in nodes for name in node.input}
