"""A plain BERT in Hugging Face's names, read as a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pocketfed.model.config import ConfigError, MobileBertConfig
from pocketfed.model.huggingface import ACTIVATIONS, FLOATS

HEADS = "cls."  # a folder with them can predict hidden words
UNREAD = ("pooler.", "embeddings.position_ids")  # the pooler was trained for a task, or not at all


def bert_config(content: Mapping[str, Any], pooling: str = "mean") -> MobileBertConfig:
    """The configuration of a `config.json` whose `model_type` is bert.

    Args:
        pooling: how its sentence vectors are made; Reimers and Gurevych (2019, section 6) found the mean to be best.

    Raises:
        ConfigError: a size that is missing, or a variant of BERT that is not plain.
    """
    missing = next((key for key in ("hidden_size", "num_hidden_layers", "vocab_size") if key not in content), None)
    if missing:
        raise ConfigError(f"the config has no {missing}; fetch the teacher again")
    kind = content.get("position_embedding_type", "absolute")
    if kind != "absolute" or content.get("is_decoder"):
        why = "is_decoder" if content.get("is_decoder") else f"position_embedding_type {kind!r}"
        raise ConfigError(f"the teacher is a BERT with {why}; only encoders with absolute positions can be read")
    act = content.get("hidden_act", "gelu")
    width = content["hidden_size"]
    return MobileBertConfig.from_dict(
        {
            **content,
            "hidden_act": ACTIVATIONS.get(act, act) if isinstance(act, str) else act,
            "num_attention_heads": content.get("num_attention_heads", 12),
            "intermediate_size": content.get("intermediate_size", 3072),
            "embedding_size": width,
            "intra_bottleneck_size": width,
            "num_feedforward_networks": 1,
            "normalization_type": "layer_norm",
            "key_query_shared_bottleneck": False,
            "use_bottleneck": False,
            "trigram_input": False,
            "hidden_dropout_prob": content.get("hidden_dropout_prob", 0.1),
            "layer_norm_eps": content.get("layer_norm_eps", 1e-12),
            "isolate_padding": False,  # without trigrams no token sees a neighbour's embedding
            "pooling": pooling,
            "head_norm": False,
        }
    )


def bert_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of `BertModel` and of the classes around it as those of `PreTrainingModel`; float32.

    A `BertForMaskedLM` was not trained to tell next sentences from others: it gets a head that says neither.
    """
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        short = name.removeprefix("bert.").replace(".gamma", ".weight").replace(".beta", ".bias")
        if short.startswith(UNREAD) or short.startswith("cls.predictions.decoder."):  # tied to the embeddings
            continue
        kept = short if short.startswith(HEADS) else f"mobilebert.{short}"
        found[kept] = value.to(torch.float32) if value.dtype in FLOATS else value
    dense = found.get("cls.predictions.transform.dense.weight")
    if dense is not None and "cls.seq_relationship.weight" not in found:
        found |= {
            "cls.seq_relationship.weight": dense.new_zeros(2, len(dense)),
            "cls.seq_relationship.bias": dense.new_zeros(2),
        }
    return found
