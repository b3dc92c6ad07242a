"""What a student is asked to have in common with its teacher (Sun et al. 2020, section 3.5)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pocketfed.model.pretraining import NO_PAIR

# google-research/mobilebert: the feature-map loss taken apart, so that norm-free features can follow normed ones. Its TF1
# code compares each student layer's statistics with those of all teacher layers; this is its TF2 port, which compares
# them with the layer's own.
FEATURE_WEIGHT, MEAN_WEIGHT, VARIANCE_WEIGHT = 100.0, 5000.0, 5.0
GROUND_TRUTH_SHARE = 0.5
# Logits of a part of the vocabulary's loss: what a CPU's cache holds; elsewhere only a bound on memory.
CACHED_LOGITS, MOST_LOGITS = 1 << 17, 1 << 26


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _over_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of (B, T) values over real tokens."""
    weights = mask.to(values.dtype)
    return (values * weights).sum() / weights.sum()


def feature_map_loss(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Feature map transfer (Sun et al. 2020, eq. 3), as Google's code takes it apart.

    100 * MSE of the features after a LayerNorm without gain, 5000 * squared difference of their means, 5 * absolute
    difference of their variances; means over real tokens.

    Args:
        student, teacher: (B, T, D) block outputs. mask: (B, T), 1 on real tokens.
    """
    s, t = _wide(student), _wide(teacher)
    width = (s.shape[-1],)
    shape = (F.layer_norm(s, width) - F.layer_norm(t, width)).square().mean(-1)  # (B, T)
    s_mean, t_mean = s.mean(-1, keepdim=True), t.mean(-1, keepdim=True)
    means = (s_mean - t_mean).square().squeeze(-1)
    # Tensor.var takes five times as long on a CPU.
    variances = ((s - s_mean).square().mean(-1) - (t - t_mean).square().mean(-1)).abs()
    return _over_tokens(FEATURE_WEIGHT * shape + MEAN_WEIGHT * means + VARIANCE_WEIGHT * variances, mask)


def attention_loss(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Attention map transfer (Sun et al. 2020, eq. 4): cross-entropy of student and teacher maps, head by head.

    Same gradient as their KL divergence. Mean over examples, heads and real query positions.

    Args:
        student, teacher: (B, N, T, T) masked scores before the softmax. mask: (B, T), 1 on real tokens.
    """
    s, t = _wide(student), _wide(teacher)
    cross = -(t.softmax(-1) * s.log_softmax(-1)).sum(-1)  # (B, N, T): one a query
    return _over_tokens(cross.mean(1), mask)


def sentence_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine of what student and teacher make of a whole text, mean over texts.

    What a head reads is the mean over tokens: errors that tokens share weigh more in it than in the features one by one
    (Reimers and Gurevych 2020, eq. 1, compare such vectors by their distance; the teacher's are compared by cosine).

    Args:
        student, teacher: (B, D) pooled.
    """
    return (1.0 - F.cosine_similarity(_wide(student), _wide(teacher), dim=-1)).mean()


def pretraining_distillation_loss(
    student: Tensor, teacher: Tensor, targets: Tensor, ground_truth: float = GROUND_TRUTH_SHARE
) -> Tensor:
    """Pre-training distillation (Sun et al. 2020, eq. 5; next sentences are apart).

    Cross-entropy against `ground_truth` of the hidden token and 1 - `ground_truth` of the teacher's prediction.

    Args:
        student, teacher: (M, V) logits of the hidden positions. targets: (M,) token ids.
    """
    return _WordLoss.apply(student, teacher, targets, ground_truth)  # type: ignore[no-any-return, no-untyped-call]


def masked_language_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats, mean over the (M, V) hidden positions."""
    return _WordLoss.apply(logits, None, targets, 1.0)  # type: ignore[no-any-return, no-untyped-call]


class _WordLoss(torch.autograd.Function):
    """Cross-entropy of (M, V) logits against `share` of the target and 1 - `share` of the teacher's prediction.

    The gradient, softmax(student) - wanted, is made along with the loss, some rows at a time: no matrix of M x V in float32
    is ever held, of which autograd would keep five.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor | None, targets: Tensor, share: float) -> Tensor:
        rows = max(1, (CACHED_LOGITS if student.device.type == "cpu" else MOST_LOGITS) // student.shape[1])
        gradient = torch.empty_like(student)
        loss = _wide(student.new_zeros(()))
        for start in range(0, len(student), rows):
            part = slice(start, start + rows)
            target = targets[part].unsqueeze(1)  # (R, 1)
            log_probabilities = _wide(student[part]).log_softmax(-1)  # (R, V)
            loss -= share * log_probabilities.gather(1, target).sum()
            if teacher is None:
                difference = log_probabilities.exp_()
            else:
                wanted = _wide(teacher[part]).softmax(-1)
                loss -= (1.0 - share) * torch.dot(wanted.view(-1), log_probabilities.view(-1))
                difference = log_probabilities.exp_().sub_(wanted, alpha=1.0 - share)
            difference.scatter_add_(1, target, torch.full_like(target, -share, dtype=difference.dtype))
            gradient[part] = difference.div_(len(student))
        ctx.save_for_backward(gradient)
        return loss / len(student)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (
            gradient.mul_(outer.to(gradient.dtype)),
            None,
            None,
            None,
        )  # in place: a second pass is refused by autograd


def next_sentence_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in nats of (B, 2) against (B,) labels, mean over texts that are pairs; 0 where none is."""
    loss = F.cross_entropy(_wide(logits), labels, ignore_index=NO_PAIR, reduction="sum")
    return loss / (labels != NO_PAIR).sum().clamp_min(1)
