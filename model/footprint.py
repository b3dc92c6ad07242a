"""How much memory a traced step holds at its worst moment, as a function of batch and length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Bytes = tuple[int, int, int, int]  # c0 + c1 * batch + c2 * batch * tokens + c3 * batch * tokens^2


@dataclass(frozen=True)
class Footprint:
    """Bytes. weights: of what is frozen, were it all widened to float32; activations: see `Bytes`."""

    weights: int
    activations: Bytes


_TERMS = {(0, 0): 0, (1, 0): 1, (1, 1): 2, (1, 2): 3, (0, 1): 2, (0, 2): 3}
_REFERENCE = (8, 128)  # the batch and length at which the worst moment is looked for
_TURNS = {torch.ops.aten.permute.default, torch.ops.aten.transpose.int}
_VIEWS = {
    torch.ops.aten.view.default,
    torch.ops.aten.reshape.default,
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten.unsqueeze.default,
    torch.ops.aten.squeeze.dim,
    torch.ops.aten.squeeze.dims,
    torch.ops.aten.expand.default,
    torch.ops.aten.alias.default,
    torch.ops.aten.detach.default,
    torch.ops.aten.clone.default,
    torch.ops.aten.t.default,
}


def evaluate(activations: Bytes, batch: int, tokens: int) -> int:
    """Bytes at that batch and length.

    >>> evaluate((1000, 10, 2, 1), 3, 4)
    1102
    """
    c0, c1, c2, c3 = activations
    return c0 + batch * (c1 + tokens * (c2 + tokens * c3))


def activation_bytes(graph: torch.fx.Graph, shape: Callable[[Sequence[int]], Any], inputs: int) -> Bytes:
    """Of the values alive at the worst moment, run in the graph's order; views cost nothing, frozen weights do not count.

    Args:
        shape: sizes of the trace -> sizes as k * batch^b * length^t.
        inputs: the first so many placeholders are theta's parts and the batch; the others are frozen.
    """
    order = _as_lowered(list(graph.nodes))
    frozen = set([n for n in order if n.op == "placeholder"][inputs:])
    root: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in order:
        source: Any = node.args[0] if node.args else None
        turned = node.target in _TURNS and root[source] in frozen  # a product reads a weight either way round
        root[node] = root[source] if turned or node.target in _VIEWS else node
    last_use: dict[torch.fx.Node, int] = {}
    for index, node in enumerate(order):
        if root[node] is node:  # a view alone keeps nothing alive
            for used in node.all_input_nodes:
                last_use[root[used]] = index
    ends: dict[int, list[torch.fx.Node]] = {}
    for node, index in last_use.items():
        ends.setdefault(index, []).append(node)
    live, worst, most = [0, 0, 0, 0], (0, 0, 0, 0), -1
    sizes: dict[torch.fx.Node, Bytes] = {}
    for index, node in enumerate(order):
        if root[node] is node and node not in frozen and node in last_use:
            sizes[node] = _bytes(node, shape)
            live = [a + b for a, b in zip(live, sizes[node], strict=True)]
        now = evaluate((live[0], live[1], live[2], live[3]), *_REFERENCE)
        if now > most:
            most, worst = now, (live[0], live[1], live[2], live[3])
        for dead in ends.get(index, []):
            if dead in sizes:
                live = [a - b for a, b in zip(live, sizes.pop(dead), strict=True)]
    return worst


def _as_lowered(order: list[torch.fx.Node]) -> list[torch.fx.Node]:
    """`lowering` asks where a ReLU's result is above zero at once, so that one byte is kept of each four."""
    moved: dict[torch.fx.Node, list[torch.fx.Node]] = {}
    for node in order:
        source = node.args[0] if node.target is torch.ops.aten.le.Scalar else None
        while isinstance(source, torch.fx.Node) and source.target in _VIEWS:
            source = source.args[0]
        if isinstance(source, torch.fx.Node) and source.target is torch.ops.aten.relu.default:
            moved.setdefault(source, []).append(node)
    late = {n for nodes in moved.values() for n in nodes}
    return [n for node in order if node not in late for n in (node, *moved.get(node, ()))]


def _bytes(node: torch.fx.Node, shape: Callable[[Sequence[int]], Any]) -> Bytes:
    total = [0, 0, 0, 0]
    values = node.meta.get("val")
    for value in values if isinstance(values, (tuple, list)) else [values]:
        if isinstance(value, torch.Tensor):
            count, b, t = value.element_size(), 0, 0
            for size in shape(value.shape):
                count, b, t = count * size.k, b + size.b, t + size.t
            total[_TERMS.get((b, t), 3)] += count
    return total[0], total[1], total[2], total[3]
