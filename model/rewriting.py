"""A predict plan with fewer operations: the same values from the same stored weights, which other plans of the artifact share.

What is joined here is joined again from the stored pieces whenever a plan is opened: it costs a device no byte to download. Training plans
are left as they are: there a step's time is in the backward pass, and their order of operations is part of a run's history.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from onnx import NodeProto, helper

CONTRIB = "com.microsoft"  # ONNX Runtime's own operators; it makes the same ones of larger patterns by itself


def rewritten(nodes: Sequence[NodeProto], frozen: Collection[str], one: str) -> list[NodeProto]:
    """frozen: names of stored tensors. one: of a constant, float32 1."""
    return _stacked(_integers_to_float(_once(nodes), one), frozen)


def uses_contrib(nodes: Sequence[NodeProto]) -> bool:
    return any(node.domain == CONTRIB for node in nodes)


def _once(nodes: Sequence[NodeProto]) -> list[NodeProto]:
    """What is computed twice from the same values is computed once: none of a plan's operators draws or remembers anything."""
    stands_for: dict[str, str] = {}
    first: dict[tuple[object, ...], NodeProto] = {}
    result: list[NodeProto] = []
    for node in nodes:
        copied = NodeProto()
        copied.CopyFrom(node)
        del copied.input[:]
        copied.input.extend(stands_for.get(name, name) for name in node.input)
        attributes = tuple(sorted(a.SerializeToString(deterministic=True) for a in node.attribute))
        key = (node.op_type, node.domain, len(node.output), tuple(copied.input), attributes)
        kept = first.setdefault(key, copied)
        if kept is copied or node.op_type == "Identity":  # an output keeps its name
            result.append(copied)
        else:
            stands_for |= dict(zip(node.output, kept.output, strict=True))
    return result


def _readers(nodes: Sequence[NodeProto]) -> dict[str, list[NodeProto]]:
    readers: dict[str, list[NodeProto]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return readers


def _integers_to_float(nodes: Sequence[NodeProto], one: str) -> list[NodeProto]:
    """A product of integers, its cast and the weight's scales in one pass over the result; to the bit the same."""
    readers = _readers(nodes)
    replaced: dict[str, NodeProto] = {}  # by the output of a node that goes, or that a new one stands for
    for node in nodes:
        if node.op_type != "MatMulInteger" or len(node.input) != 3:
            continue
        casts = readers.get(node.output[0], [])
        scalings = readers.get(casts[0].output[0], []) if len(casts) == 1 and casts[0].op_type == "Cast" else []
        if len(scalings) != 1 or scalings[0].op_type != "Mul" or scalings[0].input[0] != casts[0].output[0]:
            continue
        q, weight, zero = node.input
        inputs = [q, weight, one, scalings[0].input[1], zero]
        name = scalings[0].output[0]
        replaced[name] = helper.make_node("MatMulIntegerToFloat", inputs, [name], name=name, domain=CONTRIB)
        replaced[node.output[0]] = replaced[casts[0].output[0]] = NodeProto()
    rewritten = (replaced.get(node.output[0], node) for node in nodes)
    return [node for node in rewritten if node.op_type]


def _stacked(nodes: Sequence[NodeProto], frozen: Collection[str]) -> list[NodeProto]:
    """Products of the same values with stored weights become one product and a split."""
    made = {node.output[0]: node for node in nodes}
    groups: dict[tuple[str, ...], list[NodeProto]] = {}
    for node in nodes:
        pieces = _pieces(node, made, frozen)
        if pieces:
            groups.setdefault((node.op_type, node.input[0], *(str(bool(p)) for p in pieces)), []).append(node)
    stacks = {id(group[0]): group for group in groups.values() if len(group) > 1}
    gone = {id(node) for group in stacks.values() for node in group}
    result: list[NodeProto] = []
    for node in nodes:
        if id(node) in stacks:
            result += _stack(stacks[id(node)], made, frozen)
        elif id(node) not in gone:
            result.append(node)
    return result


def _pieces(node: NodeProto, made: dict[str, NodeProto], frozen: Collection[str]) -> list[str]:
    """The stored tensors of a product: weight (out, in), its scales and the bias, "" for what it has not; [] if it is no such."""
    if node.op_type == "Gemm" and len(node.input) == 3:
        flips = {a.name: a.i for a in node.attribute}
        weight, bias = made.get(node.input[1]), node.input[2]
        if flips.get("transA", 0) or not flips.get("transB", 0) or bias not in frozen:
            return []
        if weight is None:
            return [node.input[1], "", bias] if node.input[1] in frozen else []
        if weight.op_type == "DequantizeLinear" and set(weight.input) <= set(frozen):
            return [*weight.input, bias]
    if node.op_type == "MatMulIntegerToFloat":
        weight = made.get(node.input[1])
        if weight is not None and weight.op_type == "Transpose" and {weight.input[0], node.input[3]} <= set(frozen):
            return [weight.input[0], node.input[3], ""]
    return []


def _stack(group: Sequence[NodeProto], made: dict[str, NodeProto], frozen: Collection[str]) -> list[NodeProto]:
    stem = f"{group[0].output[0]}.stacked"
    columns = list(zip(*(_pieces(node, made, frozen) for node in group), strict=True))
    nodes: list[NodeProto] = []
    joined = []
    for part, names in zip(("weight", "scale", "bias"), columns, strict=True):
        joined.append(f"{stem}.{part}" if names[0] else "")
        if names[0]:
            nodes.append(helper.make_node("Concat", list(names), [joined[-1]], name=joined[-1], axis=0))
    weight, scale, bias = joined
    if group[0].op_type == "Gemm":
        if scale:
            wide = f"{stem}.wide"
            nodes.append(helper.make_node("DequantizeLinear", [weight, scale], [wide], name=wide, axis=0))
            weight = wide
        nodes.append(helper.make_node("Gemm", [group[0].input[0], weight, bias], [stem], name=stem, transB=1))
    else:
        flipped = f"{stem}.flipped"
        nodes.append(helper.make_node("Transpose", [weight], [flipped], name=flipped, perm=[1, 0]))
        q, _, one, _, zero = group[0].input
        inputs = [q, flipped, one, scale, zero]
        nodes.append(helper.make_node("MatMulIntegerToFloat", inputs, [stem], name=stem, domain=CONTRIB))
    sizes = [f"{node.output[0]}.size" for node in group]  # of each piece: how many rows it has
    for name, weights in zip(sizes, columns[0], strict=True):
        nodes.append(helper.make_node("Shape", [weights], [name], name=name, start=0, end=1))
    whole = f"{stem}.sizes"
    nodes.append(helper.make_node("Concat", sizes, [whole], name=whole, axis=0))
    outputs = [node.output[0] for node in group]
    nodes.append(helper.make_node("Split", [stem, whole], outputs, name=f"{stem}.split", axis=1))
    return nodes
