"""What sits on the student for a task: a text classifier."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketfed.model.config import MobileBertConfig
from pocketfed.model.mobilebert import MobileBert


def segment_ids(input_ids: Tensor, attention_mask: Tensor, separator: int) -> Tensor:
    """Token types of `[CLS] a [SEP] b [SEP]`, read off the separators: 0 up to the first, 1 after it. (B, T) -> (B, T).

    Derived, so that a plan needs no third input and text pairs work on every device.
    """
    is_separator = (input_ids == separator).to(torch.int64)
    closed = torch.cumsum(is_separator, 1) - is_separator  # separators strictly before each token
    return (closed > 0).to(torch.int64) * attention_mask


class TextClassifier(nn.Module):
    """Logits over labels from the pooled student. State-dict names as in Hugging Face's sequence classifier.

    Args:
        separator: id of `[SEP]`.
    """

    def __init__(self, config: MobileBertConfig, num_labels: int, separator: int) -> None:
        super().__init__()
        self.config = config
        self.separator = separator
        self.mobilebert = MobileBert(config)
        self.classifier = nn.Linear(config.hidden_size, num_labels)
        nn.init.trunc_normal_(self.classifier.weight, std=config.initializer_range)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T) int64 twice -> (B, labels)."""
        types = segment_ids(input_ids, attention_mask, self.separator)
        encoded = self.mobilebert(input_ids, attention_mask, types)
        pooled = self.mobilebert.pool(encoded.last, attention_mask)
        if self.config.head_norm:
            # Parameter-free: NoNorm lets features grow, and a head on raw ones starts saturated.
            pooled = F.layer_norm(pooled, (self.config.hidden_size,))
        return self.classifier(pooled)  # type: ignore[no-any-return]
