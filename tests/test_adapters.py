"""Trainable sets: what each trains, how much that is, and that LoRA starts from the model it adapts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pocketfed.model.adapters import (
    TrainableSet,
    TrainableSetError,
    get_theta,
    layout_of,
    parse_set,
    select,
    set_theta,
)
from pocketfed.model.config import STUDENTS, MobileBertConfig
from pocketfed.model.heads import TextClassifier
from pocketfed.model.parameters import total_size

SMALL = MobileBertConfig(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=12,
    intra_bottleneck_size=8,
    embedding_size=6,
    num_feedforward_networks=2,
    max_position_embeddings=16,
)
IDS = torch.tensor([[2, 7, 8, 3, 0], [2, 9, 10, 11, 3]])
MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])


def classifier(config: MobileBertConfig = SMALL, labels: int = 3) -> TextClassifier:
    torch.manual_seed(0)
    return TextClassifier(config, labels, separator=3).eval()


def released(trainable_set: str, labels: int = 2) -> dict[str, int]:
    """Name and size of what a set trains in the released geometry, without allocating it."""
    with torch.device("meta"):
        model = TextClassifier(STUDENTS["mobilebert"], labels, separator=102)
    select(model, trainable_set)
    return {p.name: p.size for p in layout_of(model)}


def test_the_head_of_the_released_student_is_512_weights_and_a_bias_a_label() -> None:
    assert released("head", labels=7) == {"classifier.weight": 7 * 512, "classifier.bias": 7}


def test_the_norms_of_the_released_student_are_68608_gains_and_biases_beside_the_head() -> None:
    sizes = released("norms")
    norms = {n: s for n, s in sizes.items() if not n.startswith("classifier.")}
    # A block: two bottlenecks, attention, 3 stacked FFNs and the last one at 128, the output bottleneck at 512.
    in_a_block = 2 * (7 * 128 + 512)
    assert sum(norms.values()) == 24 * in_a_block + 2 * 512 == 68_608
    assert all(".LayerNorm." in n for n in norms)
    assert len(norms) == 2 * (24 * 8 + 1)
    assert sum(sizes.values()) == 68_608 + 2 * 512 + 2


def test_full_trains_all_24_581_888_parameters_of_the_released_student_and_the_head() -> None:
    assert sum(released("full").values()) == 24_581_888 + 2 * 512 + 2


def test_last_trains_the_upper_blocks_and_the_head_and_nothing_below() -> None:
    sizes = released("last:2")
    blocks = {n.split(".")[3] for n in sizes if not n.startswith("classifier.")}
    assert blocks == {"22", "23"}
    assert not any("embeddings" in n for n in sizes)
    everything = released("full")
    assert sum(sizes.values()) == sum(s for n, s in everything.items() if ".22." in n or ".23." in n) + 2 * 512 + 2


def test_lora_trains_two_thin_matrices_for_each_of_four_projections_a_block() -> None:
    model = select(classifier(), "lora:4")
    sizes = {p.name: p.size for p in layout_of(model)}
    # Queries and keys are read from 8, values from 16, the attention's output from 8; all write 8.
    in_a_block = 4 * ((8 + 8) + (8 + 8) + (16 + 8) + (8 + 8))
    assert sum(s for n, s in sizes.items() if "lora" in n) == 2 * in_a_block == 576
    assert sum(sizes.values()) == 576 + 3 * 16 + 3
    assert sum("lora_A" in n for n in sizes) == sum("lora_B" in n for n in sizes) == 8


def test_lora_starts_equal_to_the_model_it_adapts_to_the_last_bit() -> None:
    with torch.no_grad():
        before = classifier()(IDS, MASK)
        after = select(classifier(), "lora:4", seed=5)(IDS, MASK)
    assert torch.equal(before, after)


def test_a_lora_update_is_sixteen_over_the_rank_times_b_a() -> None:
    model = select(classifier(), "lora:2")
    projection = model.mobilebert.encoder.layer[0].attention.self.query  # type: ignore[union-attr]
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        projection.lora_B.copy_(torch.randn(8, 2, generator=torch.Generator().manual_seed(1)))
        merged = projection.weight + 16 / 2 * projection.lora_B @ projection.lora_A
        assert torch.allclose(projection(x), x @ merged.T + projection.bias, atol=1e-6)


def test_lora_is_the_same_for_the_same_seed_and_another_for_another() -> None:
    first, again, other = (get_theta(select(classifier(), "lora:4", seed)) for seed in (1, 1, 2))
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()


def test_lora_draws_from_its_own_generator_and_leaves_the_global_one_alone() -> None:
    model = classifier()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    select(model, "lora:4", seed=9)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize(
    "name", ["head", "norms", "norms@1", "bias", "lora:4", "lora:4:qv@1", "last:1", "last:2", "ladder:6", "full"]
)
def test_only_what_is_laid_out_gets_a_gradient_and_the_head_always_does(name: str) -> None:
    model = select(classifier(), name)
    model(IDS, MASK).sum().backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None}
    assert moved == {p.name for p in layout_of(model)}
    assert {"classifier.weight", "classifier.bias"} <= moved


@pytest.mark.parametrize(
    "name", ["head", "norms", "norms@1", "bias", "lora:4", "lora:4:qv@1", "last:1", "last:2", "ladder:6", "full"]
)
def test_what_is_set_is_what_is_read_back_and_the_frozen_rest_stays(name: str) -> None:
    model = select(classifier(), name)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    theta = np.random.default_rng(0).normal(size=total_size(layout_of(model))).astype(np.float32)
    set_theta(model, theta)
    assert get_theta(model).tobytes() == theta.tobytes()
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if not p.requires_grad)


def test_selecting_again_replaces_the_earlier_set() -> None:
    model = select(select(classifier(), "full"), "head")
    assert [p.name for p in layout_of(model)] == ["classifier.weight", "classifier.bias"]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "everything",
        "Full",
        "full:1",
        "head:2",
        "norms:",
        "lora",
        "lora:",
        "lora:0",
        "lora:-1",
        "lora:1.5",
        "lora:²",
        "lora:4:4",
        "last:0",
        "last:two",
        " head",
        "head@1",
        "full@2",
        "last:1@1",
        "ladder@1",
        "norms@",
        "norms@0",
        "norms@x",
        "norms:1@1",
        "bias@1@1",
        "lora@1",
        "lora:4:",
        "lora:4:x",
        "lora:4:qq",
        "lora:4:qv:o",
        "lora:4@",
        "ladder:",
        "ladder:0",
        "ladder:8:2",
    ],
)
def test_a_set_that_does_not_exist_is_refused_with_those_that_do(name: str) -> None:
    with pytest.raises(
        TrainableSetError, match=r"there is no trainable set .*; choose one of head, norms\[@BLOCKS\], bias"
    ):
        parse_set(name)


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("head", TrainableSet("head")),
        ("norms@3", TrainableSet("norms", blocks=3)),
        ("bias", TrainableSet("bias")),
        ("lora:8", TrainableSet("lora", 8, "qkvo")),
        ("lora:8:qv@6", TrainableSet("lora", 8, "qv", 6)),
        ("last:2", TrainableSet("last", 2)),
        ("ladder", TrainableSet("ladder", 24)),
        ("ladder:96", TrainableSet("ladder", 96)),
        ("full", TrainableSet("full")),
    ],
)
def test_a_name_is_taken_apart_into_what_it_says(name: str, parsed: TrainableSet) -> None:
    assert parse_set(name) == parsed


def test_biases_are_every_bias_of_a_block_and_those_of_norms_and_no_matrix() -> None:
    sizes = released("bias")
    assert all(n.endswith(".bias") or n == "classifier.weight" for n in sizes)
    # A block: q, k, v, 2 bottlenecks, attention's output, 4 FFNs twice (512 and 128), the widening: and as many in norms.
    linear = 3 * 128 + 2 * 128 + 128 + 4 * (512 + 128) + 512
    norms = 7 * 128 + 512
    below = 512 + 512  # of the embeddings' transformation and norm
    assert sum(s for n, s in sizes.items() if not n.startswith("classifier.")) == 24 * (linear + norms) + below


@pytest.mark.parametrize("kind", ["norms", "bias", "lora:4"])
def test_a_scope_keeps_a_set_to_the_last_blocks_and_out_of_the_embeddings(kind: str) -> None:
    whole, scoped = released(kind), released(f"{kind}@2")
    assert {n.split(".")[3] for n in scoped if not n.startswith("classifier.")} == {"22", "23"}
    upper = {n: s for n, s in whole.items() if ".layer.22." in n or ".layer.23." in n or n.startswith("classifier.")}
    assert scoped == upper


def test_lora_on_some_projections_adds_matrices_to_those_only() -> None:
    names = {p.name for p in layout_of(select(classifier(), "lora:2:qo"))}
    adapted = {n.rsplit(".", 2)[1] for n in names if "lora_A" in n}
    assert adapted == {"query", "dense"}
    assert sum("lora_" in n for n in names) == 2 * 2 * 2  # blocks, projections, matrices


def test_a_ladder_is_four_rungs_of_the_asked_width_and_starts_from_the_student_as_it_is() -> None:
    sizes = released("ladder:96", labels=7)
    rung = (512 * 96 + 96) + (96 * 192 + 192) + (192 * 96 + 96)
    assert sum(sizes.values()) == 4 * rung + 7 * 96 + 7 * 512 + 7
    with torch.device("meta"):
        model = TextClassifier(STUDENTS["mobilebert"], 7, separator=102)
    ladder = select(model, "ladder:96").ladder
    assert ladder is not None
    assert ladder.blocks == (6, 12, 18, 24)
    with torch.no_grad():
        assert torch.equal(classifier()(IDS, MASK), select(classifier(), "ladder:6")(IDS, MASK))


@pytest.mark.parametrize(
    ("name", "depth", "keeps_tokens"),
    [
        ("head", 2, False),
        ("ladder:6", 2, True),
        ("norms@1", 1, True),
        ("lora:4:qv@1", 1, True),
        ("last:1", 1, True),
        ("last:2", 0, True),
        ("norms", 0, True),
        ("lora:4", 0, True),
        ("full", 0, True),
    ],
)
def test_the_prefix_reaches_up_to_the_lowest_trainable_block(name: str, depth: int, keeps_tokens: bool) -> None:
    model = select(classifier(), name)
    assert (model.depth, model.keeps_tokens) == (depth, keeps_tokens)


def test_a_head_on_tokens_keeps_a_row_a_token() -> None:
    model = select(TextClassifier(SMALL, 3, separator=3, task="tokens"), "head")
    assert (model.depth, model.keeps_tokens) == (2, True)


def test_more_blocks_or_a_higher_rank_than_the_model_has_are_refused() -> None:
    with pytest.raises(TrainableSetError, match="'last:3' asks for 3 blocks; the model has 2"):
        select(classifier(), "last:3")
    with pytest.raises(TrainableSetError, match="rank 9 of 'lora:9' exceeds the width 8"):
        select(classifier(), "lora:9")
    for name in ("norms@3", "bias@3", "lora:4:qv@3"):
        with pytest.raises(TrainableSetError, match=f"'{name}' asks for 3 blocks; the model has 2"):
            select(classifier(), name)
