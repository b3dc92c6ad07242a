"""The paper's size table (Sun et al. 2020, table 1 and 4), beside what the configurations here count."""

from __future__ import annotations

from dataclasses import dataclass

from pocketfed.model.config import STUDENTS, TEACHERS, MobileBertConfig
from pocketfed.model.mobilebert import count_flops, count_parameters

TOKENS = 128  # the paper's sequence length


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


BASELINES: dict[str, MobileBertConfig] = {"bert-base": _bert(12, 768, 12), "bert-large": _bert(24, 1024, 16)}


@dataclass(frozen=True)
class Published:
    """A model of the paper: its figures in millions of parameters and billions of FLOPs, None where it states none."""

    name: str
    config: MobileBertConfig
    millions: float | None
    billions: float | None
    note: str = ""

    @property
    def parameters(self) -> int:
        return count_parameters(self.config)

    @property
    def flops(self) -> int:
        return count_flops(self.config, TOKENS)


PUBLISHED: tuple[Published, ...] = (
    Published("bert-base", BASELINES["bert-base"], 109.0, 22.5),
    Published("bert-large", BASELINES["bert-large"], 334.0, None),
    Published(
        "ib-bert-large",
        TEACHERS["mobilebert"],
        293.0,
        None,
        "the teacher; 0.26 million more with a tanh pooler",
    ),
    Published("mobilebert-paper", STUDENTS["mobilebert-paper"], 25.3, 5.7, "queries and keys read the 512-wide input"),
    Published("mobilebert-paper-layernorm", STUDENTS["mobilebert-paper-layernorm"], 25.3, 5.7, "the paper's w/o OPT"),
    Published(
        "mobilebert",
        STUDENTS["mobilebert"],
        None,
        None,
        "as released: queries and keys share a 128-wide bottleneck; the paper does not list it",
    ),
    Published("mobilebert-layernorm", STUDENTS["mobilebert-layernorm"], None, None, "as released, w/o OPT"),
    Published(
        "mobilebert-tiny",
        STUDENTS["mobilebert-tiny"],
        15.1,
        3.1,
        "released configuration; 15.09 million without one 128 x 128 projection a layer, which may be the gap",
    ),
)
