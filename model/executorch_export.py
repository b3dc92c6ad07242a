"""The training plan for ExecuTorch: the same step, in one `.pte` that its runtime and XNNPACK run on Android and iOS.

    train(theta, input_ids, attention_mask, labels) -> (loss, correct, gradient)
    initial() -> theta

Inputs and outputs are those of `plans.py`, so an app keeps its code; but batch and length are fixed when the file is made.
A batch that is not full is filled with rows of label -1 and at least one token: they add nothing to loss and gradient,
which are means over the whole batch, so multiply both by batch / examples. What is frozen lies in the file, as int8 where
it was quantized, and is widened just before each use.

XNNPACK takes fewer operators than PyTorch traces, and whatever it does not take ends a delegated stretch. `_REWRITES`
states the rest of the step in those that it takes; what remains (embedding, label comparison) runs on portable kernels.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._decomp import core_aten_decompositions
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from pocketfed.model.adapters import get_theta, layout_of
from pocketfed.model.heads import TextClassifier
from pocketfed.model.parameters import total_size
from pocketfed.model.plans import Backbone, PlanError, as_shipped, train_step
from pocketfed.model.quantization import LEVELS, is_quantized_name, quantize_per_channel

METHOD = "train"
INITIAL = "initial"
EXECUTORCH_TOLERANCE = 1e-4  # of the largest gradient
DELEGATE_NODES = 256  # about two blocks: the activations and widened weights of one delegate are alive together

aten = torch.ops.aten


@dataclass(frozen=True)
class Exported:
    """error: the largest relative difference from autograd; delegates: how many stretches run in XNNPACK."""

    bytes: int
    parameters: int
    delegates: int
    error: float


def export_executorch(model: TextClassifier, path: Path, *, batch: int, length: int, quantized: bool) -> Exported:
    """Write the training plan of a model whose trainable parameters are marked; only a file that passed its check is kept.

    Args:
        quantized: hold frozen matrices as int8, one scale a row.

    Raises:
        PlanError: sizes that the model cannot take, or gradients that differ from autograd's.
        ModuleNotFoundError: executorch is not installed.
    """
    if batch < 1 or not 1 <= length <= model.config.max_position_embeddings:
        raise PlanError(
            f"batch {batch} of length {length} does not fit the model; give at least one example and a length of 1 to "
            f"{model.config.max_position_embeddings}"
        )
    if model.task != "classification":
        raise PlanError(
            f"a student for {model.task} has no ExecuTorch program here yet; only one for classification has"
        )
    model = as_shipped(model, Backbone(quantized))
    data, delegates = _lower(trace_step(model, batch, length, quantized), _example(model, batch, length, 0), model)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
        error = verify_executorch(model, Path(partial), batch, length)
        os.chmod(partial, 0o644)  # mkstemp's is for its owner only
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    return Exported(len(data), total_size(layout_of(model)), delegates, error)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Tracing and executorch, at its import too, warn and log about themselves."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# ---- the step as a graph ---------------------------------------------------------------------------------------------


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """XNNPACK's linear wants fixed weights; its batched product takes any two."""
    product: Tensor = aten.bmm(a.reshape(1, *a.shape), b.reshape(1, *b.shape))
    return product.view(a.shape[0], b.shape[1])


def _multiply_add(bias: Tensor, a: Tensor, b: Tensor, beta: float = 1, alpha: float = 1) -> Any:
    if (beta, alpha) != (1, 1):
        return NotImplemented
    return _multiply(a, b) + bias


def _relu_backward(gradient: Tensor, x: Tensor, threshold: float) -> Any:
    return NotImplemented if threshold else gradient * torch.clamp(torch.ceil(x), 0, 1)  # 1 where x > 0


def _sum(x: Tensor, dims: Sequence[int] | None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    """A product with ones."""
    if not x.dtype.is_floating_point or dtype not in (None, x.dtype):
        return NotImplemented
    summed = [d % x.dim() for d in dims or range(x.dim())]
    kept = [d for d in range(x.dim()) if d not in summed]
    count = math.prod(x.shape[d] for d in summed)
    rows = x.permute(*kept, *summed).reshape(1, -1, count)
    total = aten.bmm(rows, x.new_ones(1, count, 1))
    return total.view([1 if d in summed else x.shape[d] for d in range(x.dim()) if keepdim or d in kept])


def _unsqueeze(x: Tensor, dim: int) -> Tensor:
    at = dim % (x.dim() + 1)
    return x.reshape(*x.shape[:at], 1, *x.shape[at:])


def _squeeze(x: Tensor, dims: int | Sequence[int]) -> Tensor:
    given = [d % x.dim() for d in ([dims] if isinstance(dims, int) else dims)]
    return x.reshape([size for d, size in enumerate(x.shape) if size != 1 or d not in given])


def pad_or_crop(x: Tensor, widths: Sequence[int], value: float = 0) -> Tensor:
    """The portable kernel refuses to crop, which is how MobileBERT shifts a sequence by one token."""
    for i in range(len(widths) // 2):
        dim, (before, after) = x.dim() - 1 - i, widths[2 * i : 2 * i + 2]
        x = x.narrow(dim, max(0, -before), x.shape[dim] - max(0, -before) - max(0, -after))
        sides = [x.new_full((*x.shape[:dim], max(0, n), *x.shape[dim + 1 :]), value) for n in (before, after)]
        x = torch.cat([part for part in (sides[0], x, sides[1]) if part.shape[dim]], dim)
    return x


# One that returns NotImplemented leaves the operator as it is.
_REWRITES: dict[Any, Callable[..., Any]] = {
    aten.mm.default: _multiply,
    aten.addmm.default: _multiply_add,
    aten.threshold_backward.default: _relu_backward,
    aten.sum.dim_IntList: _sum,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.constant_pad_nd.default: pad_or_crop,
}
_VIEWS = (aten.view.default, aten._unsafe_view.default)
_SAME = (aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default)


def trace_step(model: TextClassifier, batch: int, length: int, quantized: bool) -> fx.GraphModule:
    """Forward, loss and backward of one batch as a module (theta, ids, mask, labels) -> (loss, correct, gradient)."""
    layout = layout_of(model)
    frozen = {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad}
    stored: dict[str, Tensor] = {}
    for name, value in frozen.items():
        if quantized and is_quantized_name(name, value.dim()):
            q, scale = quantize_per_channel(value)
            stored[name], stored[name + ".scale"] = q, scale.unsqueeze(1)
        else:
            stored[name] = value
    step = train_step(model)

    def widened(held: dict[str, Tensor], name: str) -> Tensor:
        value = held[name]
        return value.to(torch.float32) * held[name + ".scale"] if name + ".scale" in held else value

    def flat_step(theta: Tensor, ids: Tensor, mask: Tensor, labels: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        held = dict(zip(stored, values, strict=True))
        parts = theta.split([p.size for p in layout])
        leaves = {p.name: part.view(p.shape) for p, part in zip(layout, parts, strict=True)}
        once, none = torch.ones(batch), torch.zeros(())  # weights and label smoothing
        loss, correct, gradient, *_ = step(leaves, {n: widened(held, n) for n in frozen}, ids, mask, labels, once, none)
        return loss, correct, gradient

    with quietly():
        traced = make_fx(flat_step, decomposition_table=core_aten_decompositions() | _REWRITES, tracing_mode="fake")(
            *_example(model, batch, length, 0), *stored.values()
        )
    _hold(traced, list(stored.values()))
    _widen_at_each_use(traced.graph)
    _drop_what_does_nothing(traced.graph)
    traced.recompile()
    return traced


def _hold(traced: fx.GraphModule, values: Sequence[Tensor]) -> None:
    """Turn the last inputs of the graph into buffers of the module."""
    inputs = [n for n in traced.graph.nodes if n.op == "placeholder"]
    for i, (node, value) in enumerate(zip(inputs[-len(values) :], values, strict=True) if values else ()):
        traced.register_buffer(f"frozen_{i}", value)
        with traced.graph.inserting_before(node):
            attribute = traced.graph.get_attr(f"frozen_{i}")
        attribute.meta = dict(node.meta)
        node.replace_all_uses_with(attribute)
        traced.graph.erase_node(node)


def _widen_at_each_use(graph: fx.Graph) -> None:
    """q.float() * scale moves to where it is needed, so that no float weight lives from the forward pass to the backward.

    An embedding gathers its int8 rows first. A weight is converted as if by a scale of 1, which XNNPACK does inside a
    delegate; the portable cast takes several times as long.
    """
    import torch.ao.quantization.fx._decomposed  # registers the operator

    in_delegate = torch.ops.quantized_decomposed.dequantize_per_tensor.default
    widenings = [n for n in graph.nodes if n.target is aten.mul.Tensor and _is_widened(n.args[0])]
    for product in widenings:
        wide, scale = product.args
        q = wide.args[0]
        for user in list(product.users):
            rows: list[Any] = [q, scale]
            with graph.inserting_before(user):
                if user.target is aten.embedding.default and user.args[0] is product:
                    rows = [graph.call_function(user.target, (table, *user.args[1:])) for table in rows]
                    floats = graph.call_function(wide.target, (rows[0],), wide.kwargs)
                else:
                    floats = graph.call_function(in_delegate, (q, 1.0, 0, -LEVELS, LEVELS, torch.int8))
                weight = graph.call_function(product.target, (floats, rows[1]))
            if user.target is aten.embedding.default:
                weight.meta = user.meta
                user.replace_all_uses_with(weight)
            else:
                weight.meta = product.meta
                user.replace_input_with(product, weight)
    graph.eliminate_dead_code()


def _is_widened(node: Any) -> bool:
    return (
        isinstance(node, fx.Node) and node.target is aten._to_copy.default and node.args[0].op == "get_attr"  # type: ignore[union-attr]
    )


def _drop_what_does_nothing(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.target in _VIEWS:
            while node.args[0].target in _VIEWS:
                node.args = (node.args[0].args[0], node.args[1])
        same = node.target in _SAME or (
            node.target in (*_VIEWS, aten.expand.default) and node.args[0].meta["val"].shape == node.meta["val"].shape
        )
        if same:
            node.replace_all_uses_with(node.args[0])
    graph.eliminate_dead_code()


# ---- the graph as a program ------------------------------------------------------------------------------------------


def _lower(step: fx.GraphModule, inputs: tuple[Tensor, ...], model: TextClassifier) -> tuple[bytes, int]:
    """The program's bytes, and how many delegates it has."""
    with quietly():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
        from torch.fx.passes.infra.partitioner import Partition

        class InOrder(XnnpackPartitioner):  # type: ignore[misc]
            """Delegates are stretches of the graph as it runs: found in one pass, and none holds on to all activations."""

            def generate_partitions(self, program: Any) -> list[Partition]:
                taken = {node for group in self.get_matched_nodes_from_configs(program) for node in group}
                return [
                    Partition(id=i, nodes=stretch) for i, stretch in enumerate(_stretches(program.graph.nodes, taken))
                ]

        edge = to_edge_transform_and_lower(
            {METHOD: torch.export.export(step, inputs)},
            partitioner=[InOrder()],
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
            constant_methods={INITIAL: torch.from_numpy(get_theta(model))},
        )
        delegates = sum("call_delegate" in str(n.target) for n in edge.exported_program(METHOD).graph.nodes)
        program = edge.to_executorch(ExecutorchBackendConfig(passes=[_sink]))
    return bytes(program.buffer), delegates


def _stretches(nodes: Any, taken: set[fx.Node]) -> list[list[fx.Node]]:
    """Runs of nodes that XNNPACK takes; one ends at DELEGATE_NODES, or where it would need a result computed from it."""
    stretches: list[list[fx.Node]] = []
    current: set[fx.Node] = set()
    waiting: set[fx.Node] = set()  # not taken, but computed from the current stretch
    for node in nodes:
        needs = node.all_input_nodes
        if node in taken and node.op == "call_function":
            if not current or len(current) >= DELEGATE_NODES or waiting.intersection(needs):
                stretches.append([])
                current, waiting = set(), set()
            stretches[-1].append(node)
            current.add(node)
        elif current.intersection(needs) or waiting.intersection(needs):
            waiting.add(node)
    return stretches


def _sink(module: fx.GraphModule) -> Any:
    """Lowering moves all that needs no activation to the front; back to its first use, so that memory is shared."""
    from torch.fx.passes.infra.pass_base import PassResult

    order = {node: i for i, node in enumerate(module.graph.nodes)}
    for node in reversed(list(module.graph.nodes)):
        if node.op == "call_function" and node.users and all(n.op == "placeholder" for n in node.all_input_nodes):
            min(node.users, key=order.__getitem__).prepend(node)
    module.recompile()
    return PassResult(module, True)


# ---- the check -------------------------------------------------------------------------------------------------------


def _example(model: TextClassifier, batch: int, length: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random theta near the initial one, ids, mask (the last row is shorter) and labels."""
    generator = torch.Generator().manual_seed(seed)
    theta = torch.from_numpy(get_theta(model))
    theta = theta + 0.01 * torch.randn(theta.shape, generator=generator)  # LoRA's zeros would hide half of its gradient
    ids = torch.randint(model.config.vocab_size, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, (length + 1) // 2 :] = 0
    labels = torch.randint(model.classifier.out_features, (batch,), generator=generator)
    return theta, ids, mask, labels


def verify_executorch(model: TextClassifier, path: Path, batch: int, length: int) -> float:
    """Compare the file with autograd on two random batches, in ExecuTorch's own runtime. Returns the largest relative error.

    Raises:
        PlanError: they differ by more than EXECUTORCH_TOLERANCE.
    """
    train = load_method(path, METHOD)
    worst = 0.0
    for seed in (1, 2):
        theta, ids, mask, labels = _example(model, batch, length, seed)
        loss, _, gradient = train.execute((theta, ids, mask, labels))
        wanted_loss, wanted = reference(model, theta, ids, mask, labels)
        errors = (
            ((loss - wanted_loss).abs() / wanted_loss.abs().clamp_min(1.0)).item(),
            ((gradient - wanted).abs().max() / wanted.abs().max().clamp_min(1e-6)).item(),
        )
        worst = max(worst, *(error if error == error else math.inf for error in errors))  # NaN counts as different
    if worst > EXECUTORCH_TOLERANCE:
        raise PlanError(
            f"the ExecuTorch program differs from the model by {worst:.2e} (relative; at most {EXECUTORCH_TOLERANCE} is "
            "accepted); check the weights for huge or non-finite values"
        )
    return worst


def load_method(path: Path, name: str) -> Any:
    """A method of a program, in ExecuTorch's Python runtime."""
    with quietly():
        from executorch.runtime import Runtime

        return Runtime.get().load_program(path).load_method(name)


def reference(model: TextClassifier, theta: Tensor, ids: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and flat gradient at `theta`, by autograd."""
    layout = layout_of(model)
    leaves = {
        p.name: part.view(p.shape).clone().requires_grad_()
        for p, part in zip(layout, theta.split([p.size for p in layout]), strict=True)
    }
    loss = F.cross_entropy(functional_call(model, leaves, (ids, mask)), labels)
    gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return loss.detach(), torch.cat([g.reshape(-1) for g in gradients])
