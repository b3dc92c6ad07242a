"""The variables of Google's TF1 checkpoints and our state dict: both ways, names and arrays alike.

    bert/encoder/layer_3/ffn_layer_1/output/FakeLayerNorm/gamma   mobilebert.encoder.layer.3.ffn.1.output.LayerNorm.weight
    cls/predictions/extra_output_weights                          cls.predictions.dense.weight, transposed

A kernel there is (in, out), a weight here (out, in). NoNorm is called FakeLayerNorm there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from pocketfed.model.config import MobileBertConfig

# Whole names that follow no rule. The value: ours, and whether the matrix lies the other way round.
ALONE = {
    "cls/predictions/output_bias": ("cls.predictions.bias", False),
    "cls/predictions/extra_output_weights": ("cls.predictions.dense.weight", True),
    "cls/seq_relationship/output_weights": ("cls.seq_relationship.weight", False),
    "cls/seq_relationship/output_bias": ("cls.seq_relationship.bias", False),
    "cls/squad/output_weights": ("qa_outputs.weight", False),
    "cls/squad/output_bias": ("qa_outputs.bias", False),
    "output_weights": ("classifier.weight", False),
    "output_bias": ("classifier.bias", False),
}
TO_ALONE = {ours: (google, turned) for google, (ours, turned) in ALONE.items()}
TABLES = ("word_embeddings", "position_embeddings", "token_type_embeddings")
LAST = {"kernel": "weight", "gamma": "weight", "beta": "bias", "bias": "bias"}
OPTIMIZER = (
    "adam_m",
    "adam_v",
    "AdamWeightDecayOptimizer",
    "AdamWeightDecayOptimizer_1",
    "LAMBOptimizer",
    "LAMBOptimizer_1",
)


def is_google(names: Iterable[str]) -> bool:
    """Whether tensors are named as in a TF1 checkpoint."""
    return any(name.startswith("bert/") for name in names)


def from_google(name: str) -> tuple[str, bool] | None:
    """Our name of a variable, and whether it is transposed; None for what belongs to the optimizer.

    >>> from_google("bert/encoder/layer_3/ffn_layer_1/output/FakeLayerNorm/gamma")
    ('mobilebert.encoder.layer.3.ffn.1.output.LayerNorm.weight', False)
    >>> from_google("bert/pooler/dense/kernel")
    ('mobilebert.pooler.dense.weight', True)

    Raises:
        ValueError: no variable of a MobileBERT.
    """
    name = name.removesuffix(":0")
    if name in ALONE:
        return ALONE[name]
    parts = name.split("/")
    if parts[-1] in OPTIMIZER or name == "global_step":
        return None
    if parts[0] not in ("bert", "cls") or (parts[-1] not in LAST and parts[-1] not in TABLES):
        raise ValueError(f"{name} is no variable of a MobileBERT; take out what belongs to something else")
    kernel = parts[-1] == "kernel"
    parts[0] = "mobilebert" if parts[0] == "bert" else "cls"
    parts[-1:] = [parts[-1], "weight"] if parts[-1] in TABLES else [LAST[parts[-1]]]
    path = ".".join("LayerNorm" if part == "FakeLayerNorm" else part for part in parts)
    return re.sub(r"\b(layer|ffn)(?:_layer)?_(\d+)\b", r"\1.\2", path), kernel


def to_google(name: str, config: MobileBertConfig) -> tuple[str, bool]:
    """The variable of one of our tensors, and whether it is transposed.

    >>> to_google("mobilebert.encoder.layer.3.ffn.1.output.LayerNorm.weight", MobileBertConfig())
    ('bert/encoder/layer_3/ffn_layer_1/output/FakeLayerNorm/gamma', False)
    """
    if name in TO_ALONE:
        return TO_ALONE[name]
    parts = name.split(".")
    last = parts.pop()
    if parts[-1] in TABLES:
        tail: list[str] = []
    elif parts[-1] == "LayerNorm":
        tail = ["gamma" if last == "weight" else "beta"]
        # The head of pre-training keeps its LayerNorm where the encoder has none.
        if config.normalization_type == "no_norm" and parts[0] == "mobilebert":
            parts[-1] = "FakeLayerNorm"
    else:
        tail = ["kernel" if last == "weight" else "bias"]
    parts[0] = "bert" if parts[0] == "mobilebert" else parts[0]
    path = re.sub(r"\blayer/(\d+)\b", r"layer_\1", "/".join([*parts, *tail]))
    return re.sub(r"\bffn/(\d+)\b", r"ffn_layer_\1", path), tail == ["kernel"]


def tensors_from_google(variables: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Raises ValueError for a variable that is none of a MobileBERT's."""
    tensors = {}
    for google, value in variables.items():
        found = from_google(google)
        if found is not None:
            name, transposed = found
            tensors[name] = value.t().contiguous() if transposed else value
    return tensors


def tensors_to_google(state: Mapping[str, Tensor], config: MobileBertConfig) -> dict[str, Tensor]:
    """A state dict of ours, with or without the prefix `mobilebert.`, as TF1's variables."""
    variables = {}
    for name, value in state.items():
        whole = name if name.startswith(("mobilebert.", "cls.", "qa_outputs.", "classifier.")) else "mobilebert." + name
        google, transposed = to_google(whole, config)
        variables[google] = value.t().contiguous() if transposed else value
    return variables


def config_of_google(content: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json` for weights of Google's: its gelu is the tanh form."""
    return {**content, "hidden_act": "gelu_tanh"} if content.get("hidden_act") == "gelu" else dict(content)
