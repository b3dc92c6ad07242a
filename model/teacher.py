"""The pre-training model of teacher and student alike: MobileBERT with a masked-language head."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketfed.model.checkpoints import CheckpointError, load_folder, save_folder
from pocketfed.model.config import ConfigError, MobileBertConfig
from pocketfed.model.mobilebert import MobileBert, activate
from pocketfed.model.tokenization import Vocabulary


class Transform(nn.Module):
    """Dense, activation, LayerNorm: the head keeps its LayerNorm even where the encoder has NoNorm."""

    def __init__(self, config: MobileBertConfig) -> None:
        super().__init__()
        self.config = config
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(activate(self.config, self.dense(x)))  # type: ignore[no-any-return]


class MaskedLanguageHead(nn.Module):
    """Logits over the vocabulary: h @ [word embeddings ; extra weights]^T + bias.

    Words are embedded in E numbers but predicted from D, so each has D - E further output weights of its own (the name
    `dense` and its transposed shape (D - E, V) are those of Hugging Face's checkpoint).

    Raises:
        ConfigError: embeddings wider than the hidden state, which no tied output layer fits.
    """

    def __init__(self, config: MobileBertConfig) -> None:
        super().__init__()
        extra = config.hidden_size - config.embedding_size
        if extra < 0:
            raise ConfigError(
                f"embedding_size {config.embedding_size} is larger than hidden_size {config.hidden_size}; "
                "pre-training ties both, so choose at most hidden_size"
            )
        self.transform = Transform(config)
        self.dense = nn.Linear(config.vocab_size, extra, bias=False) if extra else None
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor, word_embeddings: Tensor) -> Tensor:
        """hidden: (M, D), word_embeddings: (V, E) -> (M, V)."""
        table = word_embeddings if self.dense is None else torch.cat([word_embeddings, self.dense.weight.t()], dim=1)
        return F.linear(self.transform(hidden), table, self.bias)


class PreTrainingHeads(nn.Module):
    def __init__(self, config: MobileBertConfig) -> None:
        super().__init__()
        self.predictions = MaskedLanguageHead(config)
        self.seq_relationship = nn.Linear(config.hidden_size, 2)  # next sentence: 0, from elsewhere: 1


class PreTrainingModel(nn.Module):
    """A teacher or a student while it is pre-trained; names as in Hugging Face's `MobileBertForPreTraining`."""

    def __init__(self, config: MobileBertConfig) -> None:
        super().__init__()
        self.config = config
        self.mobilebert = MobileBert(config)
        self.cls = PreTrainingHeads(config)
        self.cls.apply(self.mobilebert._initialise)

    def predict(self, hidden: Tensor) -> Tensor:
        """(M, D) -> (M, V) logits: the head alone, for positions picked from the encoder's output."""
        return self.cls.predictions(hidden, self.mobilebert.embeddings.word_embeddings.weight)  # type: ignore[no-any-return]

    def relate(self, last: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T, D) -> (B, 2): whether the second segment follows the first, from what task heads read too."""
        return self.cls.seq_relationship(self.mobilebert.pool(last, attention_mask))  # type: ignore[no-any-return]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, chosen: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, T) int64, int64, bool, int64 -> logits (M, V) of the M chosen positions in row order, and (B, 2) of pairs."""
        last = self.mobilebert(input_ids, attention_mask, token_type_ids).last
        return self.predict(last[chosen]), self.relate(last, attention_mask)


def copy_from_teacher(student: PreTrainingModel, teacher: PreTrainingModel) -> None:
    """Initialise a student with its teacher's embeddings and masked-language head, as google-research/mobilebert does.

    Everything outside the encoder is copied, save a norm of another kind: a NoNorm's gain is not a LayerNorm's.
    """
    kept = {
        name: value
        for name, value in teacher.state_dict().items()
        if not name.startswith(("mobilebert.encoder.", "mobilebert.pooler."))
    }
    if student.config.normalization_type != teacher.config.normalization_type:
        kept = {name: value for name, value in kept.items() if not name.startswith("mobilebert.embeddings.LayerNorm.")}
    student.load_state_dict(kept, strict=False)


def save_pretrained(model: PreTrainingModel, vocabulary: Vocabulary, folder: Path) -> None:
    """A pre-training model with its heads as a folder, in Hugging Face's names; whole or not at all.

    Raises:
        CheckpointError: the place is taken by something else, or cannot be written to.
    """
    save_folder(folder, model.config, model.state_dict(), vocabulary)


def load_pretrained(folder: Path) -> tuple[PreTrainingModel, Vocabulary]:
    """
    Raises:
        CheckpointError: no folder of a model with its pre-training heads.
    """
    config, tensors, vocabulary = load_folder(folder)
    model = PreTrainingModel(config)
    expected = model.state_dict()
    for name, value in expected.items():
        if name not in tensors or tensors[name].shape != value.shape:
            raise CheckpointError(
                f"{folder} has no tensor {name} of shape {tuple(value.shape)}; a teacher needs its pre-training heads, so "
                "give a folder that `pocketfed distill --keep-teacher` made"
            )
    model.load_state_dict({name: tensors[name].float() for name in expected})
    return model.eval(), vocabulary
