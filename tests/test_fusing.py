"""Each step from the reference student to the fused one leaves what it computes as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pocketfed.model.adapters import select
from pocketfed.model.config import MobileBertConfig
from pocketfed.model.fusing import (
    FusedStudent,
    FusingError,
    Residual,
    Stacked,
    carry_gains,
    fold_embeddings,
    fuse,
)
from pocketfed.model.heads import TextClassifier
from pocketfed.model.lean import lean
from pocketfed.model.mobilebert import NoNorm

SMALL = MobileBertConfig(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=24,
    intra_bottleneck_size=8,
    embedding_size=6,
    num_feedforward_networks=2,
    max_position_embeddings=16,
    initializer_range=0.2,
)
PLAIN = {
    "use_bottleneck": False,
    "key_query_shared_bottleneck": False,
    "intra_bottleneck_size": 16,
    "embedding_size": 16,
    "num_feedforward_networks": 1,
    "trigram_input": False,
    "normalization_type": "layer_norm",
    "hidden_act": "gelu",
    "classifier_activation": True,
}
WIRINGS: dict[str, dict[str, Any]] = {
    "released": {},
    "paper": {"key_query_shared_bottleneck": False},
    "tiny": {"key_query_shared_bottleneck": False, "use_bottleneck_attention": True},
    "layer norm": {"normalization_type": "layer_norm", "hidden_act": "gelu"},
    "plain BERT": PLAIN,
    "soft mask, mean pooling, head norm": {"mask_style": "soft", "pooling": "mean", "head_norm": True},
    "relu6, padding not isolated": {"hidden_act": "relu6", "isolate_padding": False},
    "no trigram, no widening": {"trigram_input": False, "embedding_size": 16},
    "one head, one network": {"num_attention_heads": 1, "num_feedforward_networks": 1},
}
TOLERANCE = 1e-5


def random_model(task: str = "classification", gains: str = "near one", **changes: Any) -> TextClassifier:
    torch.manual_seed(0)
    model = TextClassifier(SMALL.with_changes(**changes), {"regression": 1, "spans": 2}.get(task, 5), 3, task)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
        for module in model.modules():
            if isinstance(module, NoNorm) and gains != "near one":
                module.weight.copy_(torch.randn(module.weight.shape))
                if gains == "with zeros":
                    module.weight[::2] = 0.0
    return model.eval()


def batch(length: int = 9) -> tuple[Tensor, Tensor]:
    """Three texts, the second shorter, the third a pair."""
    ids = torch.randint(5, 50, (3, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    ids[2, 4] = 3
    return ids * mask, mask


def error(model: nn.Module, other: nn.Module) -> float:
    with torch.no_grad():
        wanted, got = model(*batch()), other(*batch())
    assert wanted.shape == got.shape
    return float((got - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("gains", ["near one", "of random sign", "with zeros"])
@pytest.mark.parametrize("changes", WIRINGS.values(), ids=WIRINGS)
def test_the_fused_student_is_the_student(changes: dict[str, Any], gains: str) -> None:
    model = random_model(gains=gains, **changes)
    for carry, first_only in ((False, False), (True, False), (True, True)):
        assert error(model, fuse(model, carry, first_only)) <= TOLERANCE


@pytest.mark.parametrize("task", ["classification", "regression", "tokens", "spans"])
def test_every_head_reads_what_it_did(task: str) -> None:
    model = random_model(task)
    fused = fuse(model)
    assert fused.first_only == (task in ("classification", "regression")), "the others read all tokens"
    assert error(model, fused) <= TOLERANCE


def test_the_reference_is_not_touched() -> None:
    model = random_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fuse(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_embeddings_norm_is_gone_and_what_they_give_is_as_before() -> None:
    for changes in ({}, {"trigram_input": False, "embedding_size": 16}):
        model = random_model(gains="of random sign", **changes)
        ids, mask = batch()
        types = (ids > 20).to(torch.int64)
        wanted = model.mobilebert.embeddings(ids, mask, types)
        fold_embeddings(model.mobilebert.embeddings)
        assert isinstance(model.mobilebert.embeddings.LayerNorm, nn.Identity)
        assert torch.allclose(model.mobilebert.embeddings(ids, mask, types), wanted, rtol=1e-5, atol=1e-6)


def test_stacked_products_are_the_products() -> None:
    first, second = nn.Linear(3, 2), nn.Linear(3, 4)
    x = torch.randn(5, 3)
    for got, linear in zip(Stacked([first, second])(x), (first, second), strict=True):
        assert torch.allclose(got, linear(x), atol=1e-6)


def test_a_block_of_the_released_wiring_has_two_products_before_attention_and_the_tiny_one_too() -> None:
    """x to narrow, shared and value (8 each); shared to query and key. TINY: x to narrow; narrow to query, key, value."""
    blocks = {name: fuse(random_model(**WIRINGS[name])).blocks[0] for name in ("released", "tiny", "paper")}
    shapes = {
        n: [tuple(m.linear.weight.shape) for m in b.modules() if isinstance(m, Stacked)] for n, b in blocks.items()
    }
    assert shapes == {"released": [(24, 16), (16, 8)], "tiny": [(8, 16), (24, 8)], "paper": [(32, 16)]}


def test_carried_gains_leave_sums_and_no_bias_behind_and_a_gain_of_zero_stays_where_it_is() -> None:
    def residuals(gains: str) -> list[Residual]:
        return [m for m in fuse(random_model(gains=gains)).modules() if isinstance(m, Residual)]

    assert all(r.gain is None and r.dense.bias is None for r in residuals("near one"))
    assert all(r.gain is not None for r in residuals("with zeros"))


def test_a_carried_gain_is_divided_out_of_the_product_before_it_and_multiplied_into_the_one_after() -> None:
    """With gamma 2 and beta 1 alone, 2 (x + W y) + 1 is kept as x' = x + W y: what reads it reads 2 W' and W' 1 more."""
    model = random_model().requires_grad_(False)
    norm = model.mobilebert.encoder.layer[0].attention.output.LayerNorm
    norm.weight.fill_(2.0)
    norm.bias.fill_(1.0)
    dense, reader = model.mobilebert.encoder.layer[0].attention.output.dense, model.mobilebert.encoder.layer[0].ffn[0]
    dense.bias.zero_()
    student = FusedStudent(lean(model), first_only=False)
    carry_gains(student)
    block = student.blocks[0]
    assert torch.allclose(block.attended.dense.weight, dense.weight)
    wanted = reader.intermediate.dense
    assert torch.allclose(block.widen[0].weight, 2 * wanted.weight)
    assert torch.allclose(block.widen[0].bias, wanted.bias + wanted.weight.sum(1), atol=1e-6)


def test_a_model_with_parts_that_are_not_the_students_is_refused() -> None:
    for name, part in (("lora:2", "LoraLinear"), ("ladder:4", "Ladder")):
        with pytest.raises(FusingError, match=f"the model has a {part}, which is no part of a student"):
            fuse(select(random_model(), name))
