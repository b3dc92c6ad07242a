"""The paper's size table (Sun et al. 2020, table 1 and 4), beside what the configurations here count."""

from __future__ import annotations

from dataclasses import dataclass

from pocketfed.model.config import BASELINES, STUDENTS, MobileBertConfig
from pocketfed.model.mobilebert import count_flops, count_parameters

TOKENS = 128  # the paper's sequence length


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
        BASELINES["ib-bert-large"],
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
