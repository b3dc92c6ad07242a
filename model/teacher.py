"""What is pre-trained, teacher and student alike: an encoder with a masked-language head; and teachers without one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketfed.model.checkpoints import CheckpointError, load_folder, save_folder
from pocketfed.model.config import ConfigError, MobileBertConfig
from pocketfed.model.mobilebert import MobileBert, activate
from pocketfed.model.tokenization import Vocabulary

WORD_SIGMA = 0.5  # of a factorised table
NEIGHBOURS = 0.2  # of a trigram, beside the word itself, at first


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


class FeatureTeacher(nn.Module):
    """A teacher without pre-training heads, such as a sentence encoder: it is followed by its features alone."""

    def __init__(self, config: MobileBertConfig) -> None:
        super().__init__()
        self.config = config
        self.mobilebert = MobileBert(config)


Teacher = PreTrainingModel | FeatureTeacher


def make_teacher(config: MobileBertConfig, tensors: Iterable[str]) -> Teacher:
    """The kind of teacher that has tensors of these names."""
    has_heads = any(name.startswith("cls.predictions.") for name in tensors)
    return PreTrainingModel(config) if has_heads else FeatureTeacher(config)


def copy_from_teacher(student: PreTrainingModel, teacher: Teacher) -> None:
    """Initialise a student with its teacher's embeddings and masked-language head, as google-research/mobilebert does.

    Everything outside the encoder is copied, save a norm of another kind: a NoNorm's gain is not a LayerNorm's. Of a plain
    BERT the embeddings are factorised instead, and what else of it fits is copied.
    """
    if not teacher.config.use_bottleneck:
        factorise_embeddings(student.mobilebert, teacher.mobilebert)
        shapes = {name: value.shape for name, value in student.state_dict().items()}
        heads = {k: v for k, v in teacher.state_dict().items() if k.startswith("cls.") and shapes.get(k) == v.shape}
        student.load_state_dict(heads, strict=False)
        return
    kept = {
        name: value
        for name, value in teacher.state_dict().items()
        if not name.startswith(("mobilebert.encoder.", "mobilebert.pooler."))
    }
    if student.config.normalization_type != teacher.config.normalization_type:
        kept = {name: value for name, value in kept.items() if not name.startswith("mobilebert.embeddings.LayerNorm.")}
    student.load_state_dict(kept, strict=False)


@torch.no_grad()
def factorise_embeddings(student: MobileBert, teacher: MobileBert) -> None:
    """Put the best approximation of a plain BERT's embeddings into a student's narrower table.

    The teacher's table W (V, D) is cut to its E largest singular values (Eckart and Young 1936; the two factors are those
    that Lan et al. 2020, section 3.1, learn): the student's words get U S^1/2, the transformation's part for the word itself
    V S^1/2; the neighbours' parts start at a fifth of their initial size. A NoNorm gets what the teacher's LayerNorm does on
    average.
    """
    ours, theirs = student.embeddings, teacher.embeddings
    width = student.config.embedding_size
    words = theirs.word_embeddings.weight
    places = min(len(ours.position_embeddings.weight), len(theirs.position_embeddings.weight))
    types = min(len(ours.token_type_embeddings.weight), len(theirs.token_type_embeddings.weight))
    if ours.embedding_transformation is None:
        ours.word_embeddings.weight.copy_(words)
    else:
        u, s, vt = torch.linalg.svd(words.double(), full_matrices=False)
        table, wide = u[:, :width] * s[:width].sqrt(), vt[:width].t() * s[:width].sqrt()
        scale = WORD_SIGMA / table.std()  # a table as large as the other weights learns at their rate
        ours.word_embeddings.weight.copy_(table * scale)
        own = slice(width, 2 * width) if student.config.trigram_input else slice(None)
        ours.embedding_transformation.weight.mul_(NEIGHBOURS)
        ours.embedding_transformation.weight[:, own] = (wide / scale).to(words.dtype)
        ours.embedding_transformation.bias.zero_()
    ours.position_embeddings.weight[:places] = theirs.position_embeddings.weight[:places]
    ours.token_type_embeddings.weight[:types] = theirs.token_type_embeddings.weight[:types]
    norm = theirs.LayerNorm.state_dict()
    if student.config.normalization_type == "layer_norm":
        ours.LayerNorm.load_state_dict(norm)
        return
    x = words + theirs.position_embeddings.weight[:places].mean(0) + theirs.token_type_embeddings.weight[0]
    deviation = x.std(-1, unbiased=False).mean()
    gain = norm["weight"] / deviation
    ours.LayerNorm.load_state_dict({"weight": gain, "bias": norm["bias"] - gain * x.mean()})


def save_pretrained(model: Teacher, vocabulary: Vocabulary, folder: Path) -> None:
    """A pre-training model with its heads as a folder, in Hugging Face's names; whole or not at all.

    Raises:
        CheckpointError: the place is taken by something else, or cannot be written to.
    """
    save_folder(folder, model.config, model.state_dict(), vocabulary)


def load_teacher(folder: Path) -> tuple[Teacher, Vocabulary]:
    """A teacher that `save_pretrained` wrote, or any plain BERT in Hugging Face's format; one without heads has features.

    Raises:
        CheckpointError: no folder of such a model.
    """
    config, tensors, vocabulary = load_folder(folder)
    if config.use_bottleneck:
        return _with_heads(folder, config, tensors), vocabulary
    model = make_teacher(config, tensors)
    return _filled(model, tensors, f"{folder} is not a whole BERT: it has", "fetch it again"), vocabulary


def load_pretrained(folder: Path) -> tuple[PreTrainingModel, Vocabulary]:
    """
    Raises:
        CheckpointError: no folder of a model with its pre-training heads.
    """
    config, tensors, vocabulary = load_folder(folder)
    return _with_heads(folder, config, tensors), vocabulary


def _with_heads(folder: Path, config: MobileBertConfig, tensors: Mapping[str, Tensor]) -> PreTrainingModel:
    remedy = "a teacher needs its pre-training heads, so give a folder that `pocketfed distill --keep-teacher` made, or a plain BERT's"
    if not any(name.startswith("cls.") for name in tensors):
        raise CheckpointError(f"{folder} has no pre-training heads, as a student has none; {remedy}")
    return _filled(PreTrainingModel(config), tensors, f"{folder} has", remedy)


M = TypeVar("M", bound=nn.Module)


def _filled(model: M, tensors: Mapping[str, Tensor], whose: str, remedy: str) -> M:
    expected = model.state_dict()
    for name, value in expected.items():
        if name not in tensors or tensors[name].shape != value.shape:
            raise CheckpointError(f"{whose} no tensor {name} of shape {tuple(value.shape)}; {remedy}")
        if not torch.isfinite(tensors[name]).all():
            raise CheckpointError(f"the tensor {name} holds a value that is NaN or infinite; {remedy}")
    model.load_state_dict({name: tensors[name].float() for name in expected})
    return model.eval()
