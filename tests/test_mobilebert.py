"""The student's arithmetic against two independent references, and by hand."""

from __future__ import annotations

import importlib.util
import math
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pocketfed.model.config import BASELINES, STUDENTS, TEACHERS, MobileBertConfig, preset
from pocketfed.model.google_names import tensors_to_google
from pocketfed.model.heads import TextClassifier, segment_ids
from pocketfed.model.mobilebert import (
    Embeddings,
    MobileBert,
    NoNorm,
    SelfAttention,
    count_flops,
    count_parameters,
)
from pocketfed.model.published import NOTES, PUBLISHED, Published, count_other_operations
from pocketfed.model.teacher import PreTrainingModel

ORACLE = Path(__file__).resolve().parents[2] / "shared" / "reference" / "stablehlo_oracle.py"
TINY_SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "intra_bottleneck_size": 8,
    "embedding_size": 4,
    "num_feedforward_networks": 2,
    "max_position_embeddings": 16,
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randomise(state: dict[str, Tensor], generator: torch.Generator, gain: float) -> dict[str, Tensor]:
    """Weights at which 24 blocks without a norm neither die out nor explode."""
    drawn = {}
    for name, value in state.items():
        x = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        if name.endswith("embeddings.weight"):
            x = 0.02 * x
        elif value.dim() == 2:
            x = x / math.sqrt(value.shape[1])
        elif name.endswith("LayerNorm.weight"):
            x = gain * (1 + 0.1 * x)
        else:
            x = 0.1 * x
        drawn[name] = x
    return drawn


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("name", ["mobilebert", "mobilebert-tiny", "mobilebert-layernorm"])
def test_hidden_states_are_those_of_hugging_face_with_its_own_weights_unrenamed(name: str) -> None:
    from transformers import MobileBertConfig as TheirConfig
    from transformers import MobileBertModel as TheirModel

    config = preset(name).with_changes(vocab_size=64, isolate_padding=False)
    values = {k: v for k, v in config.to_dict().items() if k not in ("pooling", "head_norm", "mask_style")}
    theirs = TheirModel(TheirConfig(**values, attn_implementation="eager"), add_pooling_layer=False).double().eval()
    generator = torch.Generator().manual_seed(0)
    theirs.load_state_dict(randomise(theirs.state_dict(), generator, gain=0.9))
    ours = MobileBert(config).double().eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)

    ids = torch.randint(1, 64, (2, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    ids[1, 9:] = 0
    types = torch.zeros_like(ids)
    types[:, 5:] = 1
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask, token_type_ids=types, output_hidden_states=True)
        got = ours(ids, mask, types)
    assert len(got.hidden) == 24
    assert expected.last_hidden_state.std() > 1e-3
    assert relative_difference(got.last[0], expected.last_hidden_state[0]) <= 1e-6
    assert relative_difference(got.last[1, :9], expected.last_hidden_state[1, :9]) <= 1e-6
    assert relative_difference(got.hidden[11], expected.hidden_states[12]) <= 1e-6


def test_without_bottlenecks_it_is_hugging_faces_bert_with_its_weights_unrenamed() -> None:
    from transformers import BertConfig, BertModel

    config = BASELINES["bert-base"].with_changes(
        vocab_size=64,
        num_hidden_layers=3,
        hidden_size=24,
        intra_bottleneck_size=24,
        embedding_size=24,
        intermediate_size=40,
        isolate_padding=False,
    )
    names = ("vocab_size", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    theirs = (
        BertModel(BertConfig(**{n: getattr(config, n) for n in names}, attn_implementation="eager")).double().eval()
    )
    generator = torch.Generator().manual_seed(0)
    theirs.load_state_dict(randomise(theirs.state_dict(), generator, gain=0.9))
    ours = MobileBert(config).double().eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    ids = torch.randint(1, 64, (2, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    types = torch.zeros_like(ids)
    types[:, 4:] = 1
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask, token_type_ids=types)
        got = ours(ids, mask, types)
        pooled = ours.pool(got.last, mask)
    assert relative_difference(got.last[0], expected.last_hidden_state[0]) <= 1e-6
    assert relative_difference(got.last[1, :7], expected.last_hidden_state[1, :7]) <= 1e-6
    assert relative_difference(pooled, expected.pooler_output) <= 1e-6


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    if not ORACLE.is_file():
        pytest.skip(f"the StableHLO reference is not there ({ORACLE.name})")
    monkeypatch.setattr(sys, "argv", ["oracle"])  # the script reads its arguments when it is imported
    spec = importlib.util.spec_from_file_location("stablehlo_oracle", ORACLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the script leaves closing its file to the interpreter
        spec.loader.exec_module(module)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield module
    torch.set_default_dtype(default)


@pytest.mark.slow
def test_span_logits_are_those_of_googles_own_graph_with_our_weights_under_its_1113_names(oracle: ModuleType) -> None:
    padding, separator = 150, 102
    generator = torch.Generator().manual_seed(1)
    config = preset("mobilebert").with_changes(isolate_padding=False)
    ours = TextClassifier(config, 2, separator, "spans").double().eval()
    ours.load_state_dict(randomise(ours.state_dict(), generator, gain=0.85))
    state = {name.replace("classifier.", "qa_outputs."): value for name, value in ours.state_dict().items()}
    weights = tensors_to_google(state, config)
    assert len(weights) == 1113
    assert {name: tuple(value.shape) for name, value in weights.items()} == oracle.SHAPES

    tokens = 384  # the graph's own length
    ids = torch.randint(1000, 30000, (1, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[:, tokens - padding :] = 0
    ids[mask == 0] = 0
    ids[0, 19] = ids[0, tokens - padding - 1] = separator
    types = segment_ids(ids, mask, separator)
    assert types.sum() == tokens - padding - 20
    with torch.no_grad():
        logits = ours(ids, mask)  # (1, 384, 2)
        (start, _), (end, _) = oracle.run(weights, ids, mask, types)[:2]
    real = tokens - padding
    assert start[:, :real].std() > 0.1
    assert relative_difference(logits[:, :real, 0], start[:, :real]) <= 1e-6
    assert relative_difference(logits[:, :real, 1], end[:, :real]) <= 1e-6


@pytest.mark.parametrize("norm", ["no_norm", "layer_norm"])
def test_padding_never_changes_an_example(norm: str) -> None:
    torch.manual_seed(0)
    config = MobileBertConfig(**TINY_SIZES, normalization_type=norm, initializer_range=0.3)
    model = MobileBert(config).double().eval()
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[0] = 7.0  # a [PAD] embedding that would be noticed
    ids = torch.randint(1, 50, (1, 5))
    padded = torch.cat([ids, torch.zeros(1, 6, dtype=torch.int64)], dim=1)
    mask = torch.tensor([[1] * 5 + [0] * 6])
    with torch.no_grad():
        alone = model(ids, torch.ones_like(ids)).last
        in_batch = model(padded, mask).last
        exposed = MobileBert(config.with_changes(isolate_padding=False)).double().eval()
        exposed.load_state_dict(model.state_dict())
        leaky = exposed(padded, mask).last
    assert relative_difference(in_batch[:, :5], alone) <= 1e-12
    assert relative_difference(leaky[:, :5], alone) > 1e-3  # the pitfall is real, and the switch is what closes it
    for pooling in ("cls", "mean"):
        pooler = MobileBert(config.with_changes(pooling=pooling))
        torch.testing.assert_close(pooler.pool(in_batch, mask), pooler.pool(alone, torch.ones_like(ids)))


# Sun et al. 2020, table 4, where the counting agrees; the released and the paper's attention differ by 0.78 million.
@pytest.mark.parametrize(
    ("config", "parameters", "gigaflops"),
    [
        (STUDENTS["mobilebert"], 24_581_888, 5.385),
        (STUDENTS["mobilebert-paper"], 25_359_104, 5.59),
        (STUDENTS["mobilebert-tiny"], 15_485_696, 3.07),
        (TEACHERS["mobilebert"], 294_205_184, 75.75),
        (BASELINES["bert-base"], 109_482_240, 22.35),
        (BASELINES["bert-large"], 335_141_888, 78.92),
    ],
)
def test_parameters_and_flops_are_the_published_ones(
    config: MobileBertConfig, parameters: int, gigaflops: float
) -> None:
    assert count_parameters(config) == parameters
    assert count_flops(config, 128) / 1e9 == pytest.approx(gigaflops, rel=2e-3)


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row.name)
def test_counts_are_within_three_percent_of_the_papers(row: Published) -> None:
    if row.millions is not None:
        assert row.parameters / 1e6 == pytest.approx(row.millions, rel=0.03)
    if row.billions is not None:
        assert row.flops / 1e9 == pytest.approx(row.billions, rel=0.03)


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row.name)
def test_flops_are_what_torch_counts_while_the_model_runs(row: Published) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = MobileBert(row.config)
        ids = torch.zeros(1, 128, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            model(ids, torch.ones_like(ids))
    assert counter.get_total_flops() == row.flops


def test_other_operations_are_counted_one_by_one_and_explain_the_papers_flops() -> None:
    # One layer, two tokens, widths 4 and 2, one head, one feed-forward network of 3.
    config = MobileBertConfig(
        vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=3,
        intra_bottleneck_size=2, embedding_size=4, num_feedforward_networks=1,
    )  # fmt: skip
    biases = 2 + 2 + 4 * 2 + 3 + 2 + 4  # two bottlenecks in; query, key, value, output; network; bottleneck out
    norms, residuals, scores = 2 * (2 + 2 + 2 + 2 + 4), 2 + 2 + 4, 2 * 7
    embeddings = 4 * (1 + 2 + 2)
    assert count_other_operations(config, tokens=2) == 2 * (biases + norms + 3 + residuals + scores + embeddings)
    normed = config.with_changes(normalization_type="layer_norm", hidden_act="gelu")
    more = 5 * (12 + 4) + 7 * 3  # seven for two, of each normed number; eight for one, of each activated
    assert count_other_operations(normed, 2) == count_other_operations(config, 2) + 2 * more

    whole = {row.name: (row.flops + count_other_operations(row.config)) / 1e9 for row in PUBLISHED}
    assert round(whole["mobilebert-paper-layernorm"], 1) == 5.7
    assert round(whole["mobilebert-tiny"], 1) == 3.1
    assert whole["bert-base"] == pytest.approx(22.43, abs=0.005)  # the paper's 22.5 is still 0.07 more
    assert "334.09 million without the tanh pooler" in NOTES["bert-large"]
    for name, note in NOTES.items():
        assert "may be" not in note, name


def test_a_student_without_its_pre_training_heads_has_two_thirds_of_the_parameters() -> None:
    with torch.device("meta"):
        whole = sum(p.numel() for p in PreTrainingModel(STUDENTS["mobilebert"]).parameters())
    head = (
        512 * 512 + 512 + 2 * 512 + 384 * 30522 + 30522 + 2 * 512 + 2
    )  # transform, its norm, extra weights, biases, pairs
    assert whole == 24_581_888 + head == 36_597_564
    assert count_parameters(STUDENTS["mobilebert"]) == 24_581_888


def test_layernorm_variant_has_as_many_parameters_as_nonorm() -> None:
    assert count_parameters(STUDENTS["mobilebert-layernorm"]) == count_parameters(STUDENTS["mobilebert"])


@pytest.mark.parametrize("name", ["nano", "micro"])
def test_small_presets_count_what_their_matrices_multiply(name: str) -> None:
    config = preset(name)
    model = MobileBert(config)
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    attention = config.num_hidden_layers * 2 * 10 * config.intra_bottleneck_size
    assert count_flops(config, 10) == 2 * 10 * (linear + attention)
    assert count_parameters(config) == sum(p.numel() for p in model.parameters())


def test_nonorm_scales_and_shifts_each_channel() -> None:
    norm = NoNorm(2)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, -1.0]))
        norm.bias.copy_(torch.tensor([0.5, 3.0]))
    torch.testing.assert_close(norm(torch.tensor([[[1.0, 4.0]]])), torch.tensor([[[2.5, -1.0]]]))


def test_trigram_is_next_token_then_itself_then_the_one_before() -> None:
    config = MobileBertConfig(**{**TINY_SIZES, "hidden_size": 12, "embedding_size": 4})
    embeddings = Embeddings(config)
    with torch.no_grad():
        embeddings.word_embeddings.weight.copy_(torch.arange(50.0)[:, None].expand(50, 4))
        embeddings.embedding_transformation.weight.copy_(torch.eye(12))
        embeddings.embedding_transformation.bias.zero_()
        for table in (embeddings.position_embeddings, embeddings.token_type_embeddings):
            table.weight.zero_()
        out = embeddings(torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.int64), None)
    expected = [[6.0] * 4 + [5.0] * 4 + [0.0] * 4, [7.0] * 4 + [6.0] * 4 + [5.0] * 4, [0.0] * 4 + [7.0] * 4 + [6.0] * 4]
    assert out[0].tolist() == expected


def test_soft_mask_scores_are_minus_six_and_hard_ones_take_no_attention() -> None:
    x = torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[[[1.0, 1.0, 0.0]]]])
    soft = MobileBertConfig(**TINY_SIZES, key_query_shared_bottleneck=False, mask_style="soft")
    attention = SelfAttention(soft).eval()
    _, scores = attention(x, x, x, mask)
    assert scores[..., 2].unique().tolist() == [-6.0]
    hard = SelfAttention(soft.with_changes(mask_style="hard")).eval()
    hard.load_state_dict(attention.state_dict())
    _, scores = hard(x, x, x, mask)
    assert scores.softmax(-1)[..., 2].abs().max() == 0.0


def test_depth_runs_only_the_lower_blocks() -> None:
    model = MobileBert(MobileBertConfig(**TINY_SIZES)).eval()
    ids = torch.tensor([[1, 2, 3]])
    whole, lower = model(ids, torch.ones_like(ids)), model(ids, torch.ones_like(ids), depth=1)
    assert len(lower.hidden) == len(lower.scores) == 1
    assert torch.equal(lower.last, whole.hidden[0])
