"""Model configurations: the published MobileBERT family and presets small enough for a CPU."""

from __future__ import annotations

import dataclasses
import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

MOST_BLOCKS = 1024  # a config from elsewhere must not ask for more memory than there is


class ConfigError(ValueError):
    """A configuration that no model can be built from."""


@dataclass(frozen=True)
class MobileBertConfig:
    """Geometry of one bottleneck BERT; keys and defaults are those of Hugging Face's `config.json` for MobileBERT.

    The same class describes the inverted-bottleneck teacher (`intra_bottleneck_size` larger than `hidden_size`) and plain
    BERT (no `use_bottleneck`, no trigram, embeddings as wide as the blocks), for comparison.

    Raises:
        ConfigError: sizes that do not fit together, or an unknown choice.
    """

    vocab_size: int = 30522
    hidden_size: int = 512  # width between blocks
    num_hidden_layers: int = 24
    num_attention_heads: int = 4
    intermediate_size: int = 512
    intra_bottleneck_size: int = 128  # width inside a block
    embedding_size: int = 128
    num_feedforward_networks: int = 4
    hidden_act: Literal["relu", "relu6", "gelu", "gelu_tanh"] = "relu"
    normalization_type: Literal["no_norm", "layer_norm"] = "no_norm"
    key_query_shared_bottleneck: bool = True
    use_bottleneck_attention: bool = False
    use_bottleneck: bool = True
    trigram_input: bool = True
    classifier_activation: bool = False  # a tanh pooler on [CLS]; the released models have none
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.1
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    # ours
    # soft: masked scores become -6, as in Google's code (quantization friendly, but padding leaks)
    mask_style: Literal["hard", "soft"] = "hard"
    # zero [PAD] embeddings before the trigram, so that padding never changes an example's output
    isolate_padding: bool = True
    pooling: Literal["cls", "mean"] = "cls"  # what a classification head reads
    head_norm: bool = False  # parameter-free LayerNorm before a classification head

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "intra_bottleneck_size",
            "embedding_size",
            "num_feedforward_networks",
            "max_position_embeddings",
            "type_vocab_size",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least 1")
        for name in ("num_hidden_layers", "num_feedforward_networks"):
            if getattr(self, name) > MOST_BLOCKS:
                raise ConfigError(f"{name} is {getattr(self, name)}; at most {MOST_BLOCKS} are built")
        for name in (
            "key_query_shared_bottleneck",
            "use_bottleneck_attention",
            "use_bottleneck",
            "trigram_input",
            "classifier_activation",
            "isolate_padding",
            "head_norm",
        ):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be true or false")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
                raise ConfigError(f"{name} is {value!r}; it must be a share of at least 0 and less than 1")
        for name in ("initializer_range", "layer_norm_eps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
                raise ConfigError(f"{name} is {value!r}; it must be a number between 0 and 1")
        if self.intra_bottleneck_size % self.num_attention_heads:
            raise ConfigError(
                f"intra_bottleneck_size {self.intra_bottleneck_size} is not divisible by num_attention_heads "
                f"{self.num_attention_heads}; choose a multiple"
            )
        if not self.use_bottleneck:
            self._check_plain()
        choices = {
            "hidden_act": ("relu", "relu6", "gelu", "gelu_tanh"),
            "normalization_type": ("no_norm", "layer_norm"),
            "mask_style": ("hard", "soft"),
            "pooling": ("cls", "mean"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}")

    def _check_plain(self) -> None:
        if self.intra_bottleneck_size != self.hidden_size:
            raise ConfigError(
                f"intra_bottleneck_size is {self.intra_bottleneck_size} and hidden_size {self.hidden_size}; without "
                "use_bottleneck they are one width, so set both alike"
            )
        for name in ("key_query_shared_bottleneck", "use_bottleneck_attention"):
            if getattr(self, name):
                raise ConfigError(
                    f"{name} is true without use_bottleneck; there is no bottleneck to read, so set it to false"
                )

    @property
    def widens_embeddings(self) -> bool:
        """Whether token embeddings go through a linear layer before positions are added."""
        return self.trigram_input or self.embedding_size != self.hidden_size

    @property
    def query_key_size(self) -> int:
        """Width of what queries and keys are projected from."""
        narrow = self.key_query_shared_bottleneck or self.use_bottleneck_attention
        return self.intra_bottleneck_size if narrow else self.hidden_size

    @property
    def value_size(self) -> int:
        """Width of what values are projected from."""
        return self.intra_bottleneck_size if self.use_bottleneck_attention else self.hidden_size

    def with_changes(self, **changes: Any) -> MobileBertConfig:
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MobileBertConfig:
        """From a `config.json`; keys that belong to other tools are ignored."""
        known = {f.name for f in dataclasses.fields(cls)}
        return cls(**{k: v for k, v in values.items() if k in known})

    @classmethod
    def load(cls, path: Path) -> MobileBertConfig:
        return cls.from_dict(json.loads(Path(path).read_text()))


_MICRO = MobileBertConfig(
    vocab_size=4096,
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=128,
    intra_bottleneck_size=64,
    embedding_size=64,
    num_feedforward_networks=2,
    max_position_embeddings=128,
    attention_probs_dropout_prob=0.0,
    pooling="mean",
    head_norm=True,
    # BERT's 0.02 suits a width of 512; at 64 to 128 without a norm it leaves the paths behind ReLU dead (docs/results.md).
    initializer_range=0.05,
)
_NANO = _MICRO.with_changes(
    vocab_size=2048,
    hidden_size=64,
    num_hidden_layers=2,
    intermediate_size=64,
    intra_bottleneck_size=32,
    embedding_size=32,
    max_position_embeddings=64,
    initializer_range=0.1,
)


# As deep as fits 8 MB in eight bits at MobileBERT's proportions: half its width between blocks, its 32 numbers a head, a
# vocabulary of half the size, and three feed-forward networks, so that attention has 0.4 of their parameters (the paper's table 2
# is best at 0.4 to 0.6).
_MINI = _MICRO.with_changes(
    vocab_size=16384,
    hidden_size=256,
    num_hidden_layers=12,
    intermediate_size=256,
    intra_bottleneck_size=128,
    embedding_size=128,
    num_feedforward_networks=3,
    max_position_embeddings=256,
    initializer_range=0.03,
)

# As wide between blocks as the small BERTs that sentence encoders are made of (384, 12 heads), which can be its teachers
# just as they are, with their vocabulary; MobileBERT's quarter of that inside, and its stack of four. 7.0 M parameters, of which
# 3.9 M are the vocabulary's.
_POCKET = _MICRO.with_changes(
    vocab_size=30522,
    hidden_size=384,
    num_hidden_layers=6,
    num_attention_heads=12,
    intermediate_size=384,
    intra_bottleneck_size=96,
    embedding_size=128,
    num_feedforward_networks=4,
    max_position_embeddings=256,
    initializer_range=0.03,
)


# What student and teacher must have alike: their features and attention maps are compared, embeddings and heads copied.
SHARED_WITH_TEACHER = (
    "hidden_size",
    "num_attention_heads",
    "vocab_size",
    "embedding_size",
    "trigram_input",
    "max_position_embeddings",
    "type_vocab_size",
)


# Of a plain BERT's features only the width must fit, and the heads where attention is followed: embeddings are factorised.
SHARED_WITH_BERT = ("hidden_size", "num_attention_heads", "vocab_size")


def _teacher_of(student: MobileBertConfig, intra: int, intermediate: int) -> MobileBertConfig:
    """The inverted-bottleneck teacher of a student: as wide between blocks, wider inside (Sun et al. 2020, table 1).

    At the published width it is IB-BERT_LARGE as Google configures it: GELU in its tanh form, dropout of a tenth.
    """
    published = student.hidden_size >= 512
    return student.with_changes(
        intra_bottleneck_size=intra,
        intermediate_size=intermediate,
        num_feedforward_networks=1,
        key_query_shared_bottleneck=False,
        use_bottleneck_attention=False,
        normalization_type="layer_norm",
        hidden_act="gelu_tanh" if published else "gelu",
        hidden_dropout_prob=0.1 if published else student.hidden_dropout_prob,
        attention_probs_dropout_prob=0.1 if published else 0.0,
        initializer_range=0.02,
    )


STUDENTS: dict[str, MobileBertConfig] = {
    "mobilebert": MobileBertConfig(),
    "mobilebert-paper": MobileBertConfig(key_query_shared_bottleneck=False),
    "mobilebert-tiny": MobileBertConfig(
        num_feedforward_networks=2, use_bottleneck_attention=True, key_query_shared_bottleneck=False
    ),
    "mobilebert-layernorm": MobileBertConfig(normalization_type="layer_norm", hidden_act="gelu"),
    "mobilebert-paper-layernorm": MobileBertConfig(
        normalization_type="layer_norm", hidden_act="gelu", key_query_shared_bottleneck=False
    ),
    "mini": _MINI,
    "pocket": _POCKET,
    "micro": _MICRO,
    "nano": _NANO,
}
# The paper's recipe, for which Google's code has a soft mask, and a trigram that sees the padding.
STUDENTS["reference"] = STUDENTS["mobilebert"].with_changes(mask_style="soft", isolate_padding=False)

TEACHERS: dict[str, MobileBertConfig] = {
    "mobilebert": _teacher_of(STUDENTS["mobilebert"], intra=1024, intermediate=4096),
    "mobilebert-paper": _teacher_of(STUDENTS["mobilebert-paper"], intra=1024, intermediate=4096),
    "mobilebert-tiny": _teacher_of(STUDENTS["mobilebert-tiny"], intra=1024, intermediate=4096),
    "mobilebert-layernorm": _teacher_of(STUDENTS["mobilebert-layernorm"], intra=1024, intermediate=4096),
    "mobilebert-paper-layernorm": _teacher_of(STUDENTS["mobilebert-paper-layernorm"], intra=1024, intermediate=4096),
    "mini": _teacher_of(
        _MINI, intra=512, intermediate=2048
    ),  # twice as wide inside as between, four times that in between
    "pocket": _teacher_of(_POCKET, intra=768, intermediate=1536),
    "micro": _teacher_of(_MICRO, intra=256, intermediate=512),
    "nano": _teacher_of(_NANO, intra=128, intermediate=256),
    "reference": _teacher_of(STUDENTS["reference"], intra=1024, intermediate=4096),
}


def _bert(layers: int, width: int, heads: int) -> MobileBertConfig:
    """Plain BERT (Devlin et al. 2019), with its tanh pooler."""
    return MobileBertConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        intra_bottleneck_size=width,
        embedding_size=width,
        num_feedforward_networks=1,
        hidden_act="gelu",
        normalization_type="layer_norm",
        key_query_shared_bottleneck=False,
        use_bottleneck=False,
        trigram_input=False,
        classifier_activation=True,
        hidden_dropout_prob=0.1,
    )


# What MobileBERT is compared with, and its teacher: to count, and to pre-train; nothing is distilled into them.
BASELINES: dict[str, MobileBertConfig] = {
    "bert-base": _bert(12, 768, 12),
    "bert-large": _bert(24, 1024, 16),
    "ib-bert-large": TEACHERS["mobilebert"],
}


def preset(name: str) -> MobileBertConfig:
    """The student configuration of that name.

    Raises:
        ConfigError: no such preset; the message lists those there are.
    """
    return _named(name, STUDENTS)


def any_preset(name: str) -> MobileBertConfig:
    """The configuration of that name, a student's or one of BASELINES.

    Raises:
        ConfigError: no such preset; the message lists those there are.
    """
    return _named(name, STUDENTS | BASELINES)


def _named(name: str, known: dict[str, MobileBertConfig]) -> MobileBertConfig:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"there is no preset {name!r}; {hint}the presets are {', '.join(known)}")
    return known[name]
