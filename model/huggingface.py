"""Hugging Face's names and `config.json` for a MobileBERT, and ours: both ways, without reading or writing a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pocketfed.model.config import ConfigError, MobileBertConfig

PREFIX = "mobilebert."
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# google/mobilebert-uncased and most of its descendants say gelu for erf's; BERT's own tanh form goes by two names.
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
SPAN_LABELS = ("start", "end")
HEADS = {  # by what sits on the encoder; "words" and "pairs" are those of pre-training, the others `heads.TASKS`
    "": "MobileBertModel",
    "words": "MobileBertForMaskedLM",
    "words and pairs": "MobileBertForPreTraining",
    "classification": "MobileBertForSequenceClassification",
    "regression": "MobileBertForSequenceClassification",
    "tokens": "MobileBertForTokenClassification",
    "spans": "MobileBertForQuestionAnswering",
}


# ---- reading -------------------------------------------------------------------------------------------------------


def read_config(content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> MobileBertConfig:
    """The configuration of a `config.json` and what of it only the weights beside it tell.

    Raises:
        ConfigError: sizes or choices that no model can be built from.
    """
    act = content.get("hidden_act", "relu")
    stated = {**content, "hidden_act": ACTIVATIONS.get(act, act) if isinstance(act, str) else act}
    return MobileBertConfig.from_dict({**stated, "classifier_activation": _has_pooler(content, tensors)})


def _has_pooler(content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    stated = content.get("classifier_activation")
    # Hugging Face's default is a pooler, ours is none, and its files may leave defaults out: the weights tell.
    stored = any(name.removeprefix(PREFIX) == "pooler.dense.weight" for name in tensors)
    return stored if stated is None or stated is True else stated


def read_tensors(config: MobileBertConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without the prefix, float32, and without what a student does not have.

    A span head (`qa_outputs`) is our classifier of two outputs a token.
    """
    state: dict[str, Tensor] = {}
    for name, value in tensors.items():
        short = name.removeprefix(PREFIX).replace("qa_outputs.", "classifier.")
        unused = short.startswith("cls.") or short == "embeddings.position_ids"
        unused = unused or (short.startswith("pooler.") and not config.classifier_activation)
        # Hugging Face allocates a second bottleneck that a model with use_bottleneck_attention never reads.
        unused = unused or (config.use_bottleneck_attention and ".bottleneck.attention." in short)
        if not unused:
            state[short] = value.to(torch.float32) if value.dtype in FLOATS else value
    return state


def read_labels(content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[str, ...] | None:
    """What the classifier's rows mean, ours or Hugging Face's `id2label`.

    Raises:
        ConfigError: labels that are no texts.
    """
    labels = content.get("labels")
    if labels is None and "qa_outputs.weight" in tensors:
        return SPAN_LABELS
    if labels is None and "classifier.weight" in tensors and isinstance(content.get("id2label"), dict):
        named = content["id2label"]
        labels = [named.get(str(i)) for i in range(len(named))]
    if labels is None:
        return None
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ConfigError(f"labels are {labels!r}; they must be a list of texts")
    return tuple(labels)


# ---- writing -------------------------------------------------------------------------------------------------------


def check_expressible(config: MobileBertConfig, head: str) -> None:
    """Raises ConfigError if Hugging Face's classes would compute something else from the same weights."""
    there_is = "Hugging Face's MobileBERT"
    if not config.use_bottleneck:
        raise ConfigError(f"use_bottleneck is false; {there_is} always has bottlenecks, so save plain BERT as BERT")
    if config.query_key_size != config.intra_bottleneck_size:
        raise ConfigError(
            f"queries and keys read {config.query_key_size} numbers and {there_is} gives them "
            f"{config.intra_bottleneck_size}; only models with key_query_shared_bottleneck or use_bottleneck_attention fit"
        )
    if not config.widens_embeddings:
        raise ConfigError(f"embeddings are {config.embedding_size} wide, as hidden states; {there_is} widens them")
    if head in ("classification", "regression"):
        for name, ours, theirs in (("pooling", config.pooling, "cls"), ("head_norm", config.head_norm, False)):
            if ours != theirs:
                raise ConfigError(
                    f"the classifier was trained with {name} {ours!r}; {there_is} has none but {theirs!r}, so export the "
                    "student it was fine-tuned from, or fine-tune one with that setting"
                )


def differences(config: MobileBertConfig, head: str) -> list[str]:
    """What holds only under a condition once Hugging Face's classes run the model: a sentence each."""
    said = []
    if head in ("words", "words and pairs") and config.isolate_padding:
        said.append(
            "isolate_padding is not known there: in a padded batch a text's last token sees [PAD]'s embedding, so pad with "
            "care or run texts of one length together"
        )
    elif config.isolate_padding:
        said.append(
            "[PAD]'s embedding, which this model never reads, is written as zeros: padding changes nothing there too"
        )
    if config.mask_style == "soft":
        said.append("mask_style 'soft' is not known there: padded batches are masked hard, others compute the same")
    if head == "" and (config.pooling != "cls" or config.head_norm):
        said.append(
            "a classifier put on it there reads [CLS], not this model's pooling and head_norm: hidden states agree"
        )
    if head == "words" and config.pooling != "cls":
        said.append(f"the next-sentence head is left out: it reads pooling {config.pooling!r}, and [CLS] there")
    return said


def write_config(config: MobileBertConfig, head: str, labels: Sequence[str] = ()) -> dict[str, Any]:
    """A `config.json` that both sides read: keys of ours that Hugging Face does not know are of no consequence to it."""
    content: dict[str, Any] = {
        "architectures": [HEADS[head]],
        "model_type": "mobilebert",
        **config.to_dict(),
        "classifier_dropout": 0.0,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }
    if config.hidden_act == "gelu_tanh":
        content["hidden_act"] = "gelu_pytorch_tanh"
    if head in ("classification", "regression", "tokens"):
        content["id2label"] = {str(i): label for i, label in enumerate(labels)}
        content["label2id"] = {label: i for i, label in enumerate(labels)}
    if head == "regression":
        content["problem_type"] = "regression"
    return content


def write_tensors(config: MobileBertConfig, state: Mapping[str, Tensor], head: str) -> dict[str, Tensor]:
    """A state dict of ours, with or without the prefix, in Hugging Face's names."""
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.startswith("cls."):
            if head == "words and pairs" or not name.startswith("cls.seq_relationship."):
                tensors[name] = value
        elif name.startswith("classifier."):
            tensors[name.replace("classifier.", "qa_outputs.") if head == "spans" else name] = value
        else:
            tensors[PREFIX + name.removeprefix(PREFIX)] = value
    words = PREFIX + "embeddings.word_embeddings.weight"
    if config.isolate_padding and not head.startswith("words"):  # tied to the words' head, the row is not free
        tensors[words] = tensors[words].clone()
        tensors[words][config.pad_token_id] = 0.0
    return tensors
