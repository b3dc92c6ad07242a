"""What a task's plan minimises: weighted means in float32, and how many answers were right."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_WEIGHT = 1e-30  # where nothing counts, as in a part of a batch without a labelled token, the loss is 0


def task_loss(
    task: str, logits: Tensor, attention_mask: Tensor | None, labels: Tensor, weights: Tensor, label_smoothing: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """loss (), correct () int64, and weight (): the sum that the loss was divided by, so that batches can be put together.

    Args:
        logits: (B, labels); (B, T, labels) for "tokens"; (B, T, 2) for "spans".
        labels: int64 (B,); float32 (B,) for "regression"; (B, T) for "tokens", negative where there is none; (B, 2), the
            first and the last token, for "spans".
        weights: (B,) float32, 0 for an example that only fills the batch.
        label_smoothing: (), the share of the target spread over all labels (Szegedy et al. 2016, section 7).
    """
    if task == "regression":
        difference = logits.squeeze(-1) - labels
        weight = weights.sum()
        loss = (weights * difference * difference).sum() / weight.clamp_min(LEAST_WEIGHT)
        return loss, torch.zeros((), dtype=torch.int64), weight
    if task == "classification":
        return _weighted(_cross_entropy(logits, labels, label_smoothing), logits.argmax(-1) == labels, weights)
    assert attention_mask is not None
    if task == "tokens":
        counted = (labels >= 0).to(logits.dtype) * attention_mask.to(logits.dtype) * weights.unsqueeze(-1)
        return _weighted(_cross_entropy(logits, labels, label_smoothing), logits.argmax(-1) == labels, counted)
    outside = (1.0 - attention_mask.to(logits.dtype)) * -1e9  # an answer lies on real tokens
    ends = logits.transpose(1, 2) + outside.unsqueeze(1)  # (B, 2, T)
    losses = _cross_entropy(ends, labels, label_smoothing * 0.0).sum(-1) / 2  # no smoothing over positions
    hits = (ends.argmax(-1) == labels).to(torch.int64).sum(-1) == 2
    return _weighted(losses, hits, weights)


def _cross_entropy(logits: Tensor, labels: Tensor, smoothing: Tensor) -> Tensor:
    """(..., C) and (...) -> (...). By comparison with every class: an ONNX graph has no cheap gradient of a gather."""
    log_probabilities = F.log_softmax(logits, dim=-1)
    chosen = (labels.unsqueeze(-1) == torch.arange(logits.shape[-1])).to(logits.dtype)
    picked = -(chosen * log_probabilities).sum(-1)
    return picked * (1.0 - smoothing) - log_probabilities.mean(-1) * smoothing


def _weighted(losses: Tensor, hits: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    weight = weights.sum()
    correct = (hits.to(torch.int64) * (weights > 0).to(torch.int64)).sum()
    return (weights * losses).sum() / weight.clamp_min(LEAST_WEIGHT), correct, weight
