"""The inverted-bottleneck teacher against a forward pass written down in numpy from its description, on small sizes.

Sun et al. 2020, section 3 and figure 1: queries, keys and values are projected from the block's input, the residual inside a
block is the widened input, and a LayerNorm ends every part. eps is 1e-5 after the embeddings and after the last feed-forward
network and 1e-12 elsewhere, as in the checkpoints that there are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pocketfed.model.config import TEACHERS
from pocketfed.model.teacher import PreTrainingModel

Array = NDArray[np.float64]
LAYERS, HEADS, VOCABULARY = 3, 2, 13


def dense(w: Mapping[str, Array], name: str, x: Array) -> Array:
    return x @ w[name + ".weight"].T + w[name + ".bias"]


def layer_norm(w: Mapping[str, Array], name: str, x: Array, eps: float = 1e-12) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    return w[name + ".weight"] * normed + w[name + ".bias"]


def gelu(x: Array) -> Array:
    """In the tanh form, which is Google's (Hendrycks and Gimpel 2016, section 2)."""
    return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


def embed(w: Mapping[str, Array], ids: list[int], types: list[int], real: list[int], isolate: bool) -> Array:
    """One text's embeddings (T, D): of each token those of the next, itself and the one before, then widened."""
    words = [
        w["mobilebert.embeddings.word_embeddings.weight"][i] * (r if isolate else 1)
        for i, r in zip(ids, real, strict=True)
    ]
    nothing = np.zeros_like(words[0])
    rows = []
    for t in range(len(ids)):
        after = words[t + 1] if t + 1 < len(ids) else nothing
        before = words[t - 1] if t else nothing
        wide = dense(w, "mobilebert.embeddings.embedding_transformation", np.concatenate([after, words[t], before]))
        place = w["mobilebert.embeddings.position_embeddings.weight"][t]
        rows.append(wide + place + w["mobilebert.embeddings.token_type_embeddings.weight"][types[t]])
    return layer_norm(w, "mobilebert.embeddings.LayerNorm", np.stack(rows), 1e-5)


def attend(w: Mapping[str, Array], at: str, x: Array, real: list[int], soft: bool) -> Array:
    """One text's attention (T, D) -> (T, I), query by query and head by head."""
    q, k, v = (dense(w, f"{at}.attention.self.{kind}", x) for kind in ("query", "key", "value"))
    size = q.shape[1] // HEADS
    out = np.zeros_like(q)
    for head in range(HEADS):
        mine = slice(head * size, (head + 1) * size)
        for t in range(len(x)):
            scores = [float(q[t, mine] @ k[s, mine]) / math.sqrt(size) for s in range(len(x))]
            hidden = -6.0 if soft else -math.inf
            weights = [math.exp(score if r else hidden) for score, r in zip(scores, real, strict=True)]
            out[t, mine] = sum(weight * v[s, mine] for s, weight in enumerate(weights)) / sum(weights)
    return out


def block(w: Mapping[str, Array], layer: int, x: Array, real: list[int], soft: bool) -> Array:
    at = f"mobilebert.encoder.layer.{layer}"
    wide = layer_norm(w, f"{at}.bottleneck.input.LayerNorm", dense(w, f"{at}.bottleneck.input.dense", x))
    h = dense(w, f"{at}.attention.output.dense", attend(w, at, x, real, soft)) + wide
    h = layer_norm(w, f"{at}.attention.output.LayerNorm", h)
    inner = gelu(dense(w, f"{at}.intermediate.dense", h))
    h = layer_norm(w, f"{at}.output.LayerNorm", dense(w, f"{at}.output.dense", inner) + h, 1e-5)
    narrow = dense(w, f"{at}.output.bottleneck.dense", h)
    return layer_norm(w, f"{at}.output.bottleneck.LayerNorm", narrow + x)


def predict(w: Mapping[str, Array], hidden: Array) -> Array:
    h = gelu(dense(w, "cls.predictions.transform.dense", hidden))
    h = layer_norm(w, "cls.predictions.transform.LayerNorm", h)
    narrow = w["mobilebert.embeddings.word_embeddings.weight"].shape[1]
    logits = h[:, :narrow] @ w["mobilebert.embeddings.word_embeddings.weight"].T
    return np.asarray(logits + h[:, narrow:] @ w["cls.predictions.dense.weight"] + w["cls.predictions.bias"])


@pytest.mark.parametrize(("mask_style", "isolate"), [("hard", True), ("soft", False)])
def test_hidden_states_words_and_pairs_of_the_teacher_are_those_computed_by_hand(
    mask_style: str, isolate: bool
) -> None:
    config = TEACHERS["mobilebert"].with_changes(
        vocab_size=VOCABULARY,
        hidden_size=6,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intra_bottleneck_size=8,
        intermediate_size=10,
        embedding_size=4,
        max_position_embeddings=7,
        mask_style=mask_style,
        isolate_padding=isolate,
    )
    kind = (config.normalization_type, config.hidden_act, config.num_feedforward_networks)
    assert kind == ("layer_norm", "gelu_tanh", 1)
    model = PreTrainingModel(config).double().eval()
    rng = np.random.default_rng(0)
    w: dict[str, Array] = {name: 0.5 * rng.standard_normal(value.shape) for name, value in model.state_dict().items()}
    for name in w:
        if name.endswith("LayerNorm.weight"):
            w[name] = 1 + 0.3 * w[name]
    model.load_state_dict({name: torch.from_numpy(value) for name, value in w.items()}, strict=True)

    ids, types = [[2, 7, 9, 3, 12, 5, 3], [2, 11, 3, 8, 3, 0, 0]], [[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0, 0]]
    real = [[1] * 7, [1] * 5 + [0] * 2]
    tensors = [torch.tensor(x) for x in (ids, real, types)]
    with torch.no_grad():
        encoded = model.mobilebert(*tensors)
        words, pairs = model(tensors[0], tensors[1], torch.tensor(real).bool(), tensors[2])
    soft = mask_style == "soft"
    logits = []
    for row in range(2):
        x = embed(w, ids[row], types[row], real[row], isolate)
        for layer in range(LAYERS):
            x = block(w, layer, x, real[row], soft)
            np.testing.assert_allclose(encoded.hidden[layer][row].numpy(), x, rtol=1e-9, atol=1e-9)
        logits.append(predict(w, x[np.array(real[row], bool)]))
        np.testing.assert_allclose(pairs[row].numpy(), dense(w, "cls.seq_relationship", x[0]), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(words.numpy(), np.concatenate(logits), rtol=1e-9, atol=1e-9)
