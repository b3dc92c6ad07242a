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


def count_other_operations(config: MobileBertConfig, tokens: int = TOKENS) -> int:
    """FLOPs of all that is no matrix product, for the notes below; `count_flops` has the products.

    One for a bias, a residual, a ReLU; two for a NoNorm, seven for a LayerNorm (mean, difference, square, mean, root and
    quotient as one, gain, bias), eight for a GELU in its tanh form; of each attention score two for scale and mask and five
    for the softmax (maximum, difference, exponential, sum, quotient).
    """
    d, i, f = config.hidden_size, config.intra_bottleneck_size, config.intermediate_size
    norm, act = 2 if config.normalization_type == "no_norm" else 7, 1 if config.hidden_act == "relu" else 8
    shared = config.key_query_shared_bottleneck and not config.use_bottleneck_attention
    narrowed = 1 + shared if config.use_bottleneck else 0  # bottlenecks into the block
    widened = d if config.use_bottleneck else 0
    stack = config.num_feedforward_networks
    biases = narrowed * i + 4 * i + stack * (f + i) + widened
    residuals = i + stack * i + widened
    norms = norm * (narrowed * i + i + stack * i + widened)
    scores = config.num_attention_heads * tokens * 7
    embeddings = d * ((1 if config.widens_embeddings else 0) + 2 + norm)  # bias, position and type, norm
    return tokens * (config.num_hidden_layers * (biases + residuals + norms + act * stack * f + scores) + embeddings)


def _millions(config: MobileBertConfig, less: int = 0) -> str:
    return f"{(count_parameters(config) - less) / 1e6:.2f} million"


def _billions(config: MobileBertConfig) -> str:
    return f"{(count_flops(config, TOKENS) + count_other_operations(config)) / 1e9:.2f} billion"


def _notes() -> dict[str, str]:
    """Where a figure of the paper is not the count beside it, what counting finds."""
    base, teacher = BASELINES["bert-base"], BASELINES["ib-bert-large"]
    bare = {name: BASELINES[name].with_changes(classifier_activation=False) for name in ("bert-base", "bert-large")}
    paper, normed = STUDENTS["mobilebert-paper"], STUDENTS["mobilebert-paper-layernorm"]
    tiny = STUDENTS["mobilebert-tiny"]
    projections = tiny.num_hidden_layers * tiny.intra_bottleneck_size**2
    return {
        "bert-base": f"{_millions(bare['bert-base'])} without the tanh pooler, which is counted here; FLOPs are matrix products, "
        f"with every other operation {_billions(base)}",
        "bert-large": f"{_millions(bare['bert-large'])} without the tanh pooler, which is the paper's figure",
        "ib-bert-large": f"the teacher; {_millions(teacher.with_changes(classifier_activation=True))} with a tanh pooler; no one "
        "kind of its tensors weighs what it has more than in the paper",
        "mobilebert-paper": "queries and keys read the 512-wide input; FLOPs are matrix products, with every other operation "
        f"{_billions(paper)}; the paper gives one figure for this row and the next",
        "mobilebert-paper-layernorm": f"the paper's w/o OPT; with every other operation {_billions(normed)} FLOPs, most of them "
        "LayerNorm's and GELU's",
        "mobilebert": "as released: queries and keys share a 128-wide bottleneck; the paper does not list it",
        "mobilebert-layernorm": "as released, w/o OPT",
        "mobilebert-tiny": f"as released; {_millions(tiny, projections)} without one of the 128 x 128 projections of each layer; with "
        f"every other operation {_billions(tiny)} FLOPs",
    }


NOTES = _notes()
PUBLISHED: tuple[Published, ...] = tuple(
    Published(name, (STUDENTS | BASELINES)[name], millions, billions, NOTES[name])
    for name, millions, billions in (
        ("bert-base", 109.0, 22.5),
        ("bert-large", 334.0, None),
        ("ib-bert-large", 293.0, None),
        ("mobilebert-paper", 25.3, 5.7),
        ("mobilebert-paper-layernorm", 25.3, 5.7),
        ("mobilebert", None, None),
        ("mobilebert-layernorm", None, None),
        ("mobilebert-tiny", 15.1, 3.1),
    )
)
