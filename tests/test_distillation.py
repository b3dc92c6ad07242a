"""Losses by hand, stages one at a time, and a whole distillation that must beat what it is compared with."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from pocketfed.coordinator import distilling, pipeline
from pocketfed.model import objectives
from pocketfed.model.checkpoints import CheckpointError, load, load_student
from pocketfed.model.config import STUDENTS, TEACHERS, ConfigError, MobileBertConfig
from pocketfed.model.corpus import CorpusError
from pocketfed.model.distillation import CHECKPOINT, Distillation, Result, Tick
from pocketfed.model.lamb import Lamb, parameter_groups
from pocketfed.model.objectives import (
    attention_loss,
    feature_map_loss,
    masked_language_loss,
    next_sentence_loss,
    pretraining_distillation_loss,
)
from pocketfed.model.places import Place
from pocketfed.model.planning import plan
from pocketfed.model.pretraining import NO_PAIR, Batches, MaskedBatch, score_masked
from pocketfed.model.quantization import QuantizationError
from pocketfed.model.schedules import (
    DistillationError,
    Schedule,
    layer_rates,
    linear_decay,
    phase_decay,
    phase_steps,
    schedule_for,
)
from pocketfed.model.stages import (
    MaskedWords,
    Predictions,
    Representations,
    Stage,
    Transfer,
    check_pair,
    make_optimizer,
    student_stages,
)
from pocketfed.model.teacher import FeatureTeacher, PreTrainingModel, copy_from_teacher, load_pretrained
from pocketfed.model.token_store import TokenCorpus, store_corpus
from pocketfed.model.tokenization import Tokenizer, Vocabulary, train_vocabulary


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def sentences(count: int, seed: int = 0) -> list[str]:
    """Sentences in which each noun fixes its verb and its place, so that a hidden word can be inferred from afar."""
    rng = np.random.default_rng(seed)
    nouns = ["cat", "dog", "bird", "fish", "horse", "cow", "bee", "fox", "owl", "crab"]
    verbs = ["purrs", "barks", "sings", "swims", "runs", "chews", "hums", "hides", "stares", "digs"]
    places = ["house", "garden", "tree", "river", "field", "barn", "flower", "forest", "tower", "beach"]
    fillers = ["today", "very often", "again and again", "for hours", "without a pause", "as it likes"]
    lines = []
    for i in rng.integers(0, 10, count):
        adjective = rng.choice(["old", "young", "small", "large", "quiet", "happy", "brown", "white"])
        action = f"{verbs[i]} {rng.choice(fillers)} in the {places[i]}"
        lines.append(f"the {adjective} {nouns[i]} {action} near {rng.integers(99)}")
    return lines


SMALL = STUDENTS["nano"].with_changes(
    hidden_size=32,
    embedding_size=16,
    intra_bottleneck_size=16,
    intermediate_size=32,
    max_position_embeddings=24,
)
SMALL_TEACHER = TEACHERS["nano"].with_changes(
    hidden_size=32,
    embedding_size=16,
    intra_bottleneck_size=64,
    intermediate_size=64,
    max_position_embeddings=24,
)
QUICK = dataclasses.replace(schedule_for("nano"), teacher_steps=400, transfer_steps=200, distillation_steps=200)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[TokenCorpus, Vocabulary]:
    lines = sentences(1500)
    vocabulary = train_vocabulary(lines, 400)
    folder = tmp_path_factory.mktemp("material") / "corpus"
    return store_corpus([(line,) for line in lines], Tokenizer(vocabulary), folder, 24), vocabulary


def distilled(
    material: tuple[TokenCorpus, Vocabulary],
    schedule: Schedule,
    seed: int = 0,
    norm: str = SMALL.normalization_type,
    **more: Any,
) -> tuple[Distillation, Result]:
    corpus, vocabulary = material
    student = fitted(SMALL, vocabulary).with_changes(normalization_type=norm)
    teacher = fitted(SMALL_TEACHER, vocabulary)
    run = Distillation(student, teacher, corpus, vocabulary, schedule, seed, **more)
    return run, run.run()


def fitted(config: MobileBertConfig, vocabulary: Vocabulary) -> MobileBertConfig:
    return config.with_changes(vocab_size=len(vocabulary))


# ---- losses, by hand -----------------------------------------------------------------------------------------------


def test_feature_loss_is_its_three_terms_over_real_tokens() -> None:
    student = torch.tensor([[[1.0, 3.0], [0.0, 0.0]]])  # mean 2, variance 1, normed (-1, 1)
    teacher = torch.tensor([[[5.0, 1.0], [9.0, -9.0]]])  # mean 3, variance 4, normed (1, -1)
    mask = torch.tensor([[1, 0]])  # the second token is padding
    expected = 100 * 4 + 5000 * 1 + 5 * 3
    assert float(feature_map_loss(student, teacher, mask)) == pytest.approx(expected, rel=1e-4)
    assert float(feature_map_loss(teacher, teacher, mask)) == 0.0


def test_attention_loss_is_the_cross_entropy_of_the_maps() -> None:
    student = torch.tensor([[[[0.0, 0.0], [5.0, 1.0]]]])  # attends evenly; the second query is padding
    teacher = torch.tensor([[[[math.log(3.0), 0.0], [0.0, 0.0]]]])  # 3/4 and 1/4
    mask = torch.tensor([[1, 0]])
    assert float(attention_loss(student, teacher, mask)) == pytest.approx(math.log(2))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert float(attention_loss(teacher, teacher, mask)) == pytest.approx(entropy)  # its least value


def test_every_head_and_every_real_query_weighs_the_same_in_the_attention_loss() -> None:
    even, sharp = [0.0, 0.0], [math.log(3.0), 0.0]  # 1/2 and 1/2; 3/4 and 1/4
    teacher = torch.tensor([[[sharp, even], [even, sharp]], [[even, sharp], [sharp, sharp]]])  # (2, 2 heads, 2, 2)
    student = torch.tensor([[[even, sharp], [even, even]], [[sharp, even], [even, even]]])
    mask = torch.tensor([[1, 1], [1, 0]])
    # Cross-entropy of a query's two maps: against an even student log 2 whatever the teacher; of an even teacher against a sharp one:
    apart = -(math.log(0.75) + math.log(0.25)) / 2
    heads = [[math.log(2), apart], [math.log(2), math.log(2)]], [[apart, 0.0], [math.log(2), 0.0]]
    queries = [(heads[0][0][q] + heads[0][1][q]) / 2 for q in (0, 1)] + [(heads[1][0][0] + heads[1][1][0]) / 2]
    assert float(attention_loss(student, teacher, mask)) == pytest.approx(sum(queries) / 3)


@pytest.mark.parametrize(
    ("teacher", "expected"),
    [  # of a student whose token has features (-1, 1): mean 0, variance 1, normed (-1, 1)
        ([-1.0, 1.0], 0.0),
        ([1.0, -1.0], 100 * 4.0),  # turned round: only the normed features differ, by 2 each
        ([1.0, 3.0], 5000 * 4.0),  # moved by 2: only the mean differs
        ([-2.0, 2.0], 5 * 3.0),  # twice as wide: only the variance differs, 4 from 1
    ],
)
def test_each_term_of_the_feature_loss_has_its_weight(teacher: list[float], expected: float) -> None:
    student, mask = torch.tensor([[[-1.0, 1.0]]]), torch.ones(1, 1)
    assert float(feature_map_loss(student, torch.tensor([[teacher]]), mask)) == pytest.approx(expected, abs=1e-2)


def test_attention_loss_stays_finite_where_a_hard_mask_hides_keys() -> None:
    lowest = torch.finfo(torch.float32).min
    scores = torch.tensor([[[[1.0, lowest], [2.0, lowest]]]], requires_grad=True)
    loss = attention_loss(scores, scores.detach(), torch.tensor([[1, 0]]))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert scores.grad is not None
    assert torch.isfinite(scores.grad).all()


def test_distillation_loss_mixes_truth_and_teacher_half_and_half() -> None:
    student = torch.tensor([[math.log(0.5), math.log(0.25), math.log(0.25)]])
    teacher = torch.tensor([[math.log(0.2), math.log(0.8), -1e9]])
    expected = -(0.5 + 0.5 * 0.2) * math.log(0.5) - 0.5 * 0.8 * math.log(0.25)
    assert float(pretraining_distillation_loss(student, teacher, torch.tensor([0]))) == pytest.approx(expected)


@pytest.mark.parametrize("share", [0.5, 1.0, 0.0, 0.3])
def test_word_losses_and_their_gradient_are_those_of_autograd_in_however_many_parts(
    monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(7, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    targets = torch.tensor([0, 4, 2, 2, 1, 3, 0])
    student.requires_grad_()
    log_probabilities = student.log_softmax(-1)
    soft = -(teacher.softmax(-1) * log_probabilities).sum(-1).mean()
    expected = share * F.nll_loss(log_probabilities, targets) + (1 - share) * soft
    (slope,) = torch.autograd.grad(2.5 * expected, student)
    for most in (1, 10, 1000):  # one row at a time, two (the last part is short), all
        monkeypatch.setattr(objectives, "CACHED_LOGITS", most)
        losses = [pretraining_distillation_loss(student, teacher, targets, share)]
        losses += [masked_language_loss(student, targets)] if share == 1.0 else []
        for loss in losses:
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(torch.autograd.grad(2.5 * loss, student)[0], slope)


def test_losses_are_computed_in_float32_whatever_the_model_has() -> None:
    x, mask = torch.randn(2, 3, 4).bfloat16(), torch.ones(2, 3)
    assert feature_map_loss(x, x + 1, mask).dtype == torch.float32
    assert feature_map_loss(x.double(), x.double(), mask).dtype == torch.float64
    assert pretraining_distillation_loss(x[0], x[0], torch.tensor([0, 1, 2])).dtype == torch.float32


def test_next_sentence_loss_counts_pairs_only() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [5.0, 5.0], [0.0, 0.0]])
    labels = torch.tensor([1, NO_PAIR, 0])
    assert float(next_sentence_loss(logits, labels)) == pytest.approx((-math.log(0.75) + math.log(2)) / 2)
    assert float(next_sentence_loss(logits, torch.full((3,), NO_PAIR))) == 0.0


# ---- LAMB ----------------------------------------------------------------------------------------------------------


def test_lamb_steps_by_a_share_of_the_weights_length() -> None:
    weight, bias = torch.nn.Parameter(torch.tensor([[3.0, 4.0]])), torch.nn.Parameter(torch.tensor([1.0]))
    weight.grad, bias.grad = torch.tensor([[0.1, -0.1]]), torch.tensor([0.1])
    Lamb(parameter_groups([("a.weight", weight), ("a.bias", bias)], lr=0.01), lr=0.01).step()
    # m = 0.1 g, v = 0.001 g^2, no bias correction: a direction of 0.01 / (sqrt(1e-5) + 1e-6) = 3.1613 a number.
    size = 0.01 / (math.sqrt(1e-5) + 1e-6)
    update = torch.tensor([[size + 0.01 * 3, -size + 0.01 * 4]])
    expected = torch.tensor([[3.0, 4.0]]) - 0.01 * 5.0 * update / update.norm()
    torch.testing.assert_close(weight.detach(), expected)
    assert float(bias.detach()) == pytest.approx(1.0 - 0.01 * size)  # no decay, no trust ratio


def test_lamb_moves_a_weight_of_zeros_and_skips_what_has_no_gradient() -> None:
    zero, still = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.ones(2, 2))
    zero.grad = torch.ones(2, 2)
    Lamb(parameter_groups([("a.weight", zero), ("b.weight", still)], lr=0.1), lr=0.1).step()
    assert float(zero.detach().abs().min()) > 0.1
    assert torch.equal(still.detach(), torch.ones(2, 2))


def test_norms_and_biases_are_neither_decayed_nor_adapted() -> None:
    model = PreTrainingModel(SMALL)
    adapted, plain = parameter_groups(model.named_parameters(), 0.1)
    assert {p.dim() for p in adapted["params"]} == {2}
    assert {p.dim() for p in plain["params"]} == {1}
    assert (plain["weight_decay"], plain["adapt"]) == (0.0, False)


def test_rates_warm_up_and_come_down() -> None:
    assert [linear_decay(s, 100, 0.1) for s in (0, 4, 9, 50, 99)] == pytest.approx([0.1, 0.5, 0.91, 0.5, 0.01])
    assert [phase_decay(s, 100, 0.1) for s in (0, 9, 64)] == pytest.approx([0.1, 0.9 + 0.1 * math.sqrt(0.91), 0.96])


def test_progressive_rates_are_full_for_the_phases_layer_a_tenth_below_and_nothing_above() -> None:
    rates = [layer_rates(step, [4, 4, 2], 1.0, 0.5) for step in range(10)]
    decayed = [0.9 + 0.1 * math.sqrt(0.75), 0.9 + 0.1 * math.sqrt(0.5), 0.9 + 0.1 * math.sqrt(0.25)]
    expected = [
        [0.5, 0.0, 0.0],
        [decayed[0], 0.0, 0.0],
        [decayed[1], 0.0, 0.0],
        [decayed[2], 0.0, 0.0],
        [0.05, 0.5, 0.0],
        [0.1 * decayed[0], decayed[0], 0.0],
        [0.1 * decayed[1], decayed[1], 0.0],
        [0.1 * decayed[2], decayed[2], 0.0],
        [0.1, 0.1, 1.0],
        [0.1 * decayed[1], 0.1 * decayed[1], decayed[1]],
    ]
    assert [pytest.approx(row) for row in expected] == rates


def test_the_reference_is_the_papers_recipe_of_740_000_steps() -> None:
    student, teacher, schedule = STUDENTS["reference"], TEACHERS["reference"], schedule_for("reference")
    assert schedule.student_steps == 740_000
    assert (schedule.teacher_steps, schedule.batch_size, schedule.teacher_batch_size) == (500_000, 2048, 4096)
    assert (schedule.optimizer, schedule.strategy, schedule.max_length) == ("lamb", "progressive", 0)
    assert schedule.most_hidden == 20
    assert student.max_position_embeddings == 512
    assert {(c.mask_style, c.isolate_padding) for c in (student, teacher)} == {("soft", False)}
    assert (student.hidden_act, student.hidden_dropout_prob, student.attention_probs_dropout_prob) == ("relu", 0.0, 0.1)
    assert (teacher.hidden_act, teacher.hidden_dropout_prob, teacher.attention_probs_dropout_prob) == (
        "gelu_tanh",
        0.1,
        0.1,
    )
    assert (student.hidden_size, student.intra_bottleneck_size, teacher.intra_bottleneck_size) == (512, 128, 1024)
    phases = phase_steps(schedule.transfer_steps, student.num_hidden_layers)
    assert phases == [10_000] * 24
    with torch.device("meta"):
        transfer = Transfer(PreTrainingModel(student), PreTrainingModel(teacher), schedule)
    assert len(transfer.groups()) == 48  # of each layer what LAMB adapts, and its norms and biases
    # Step within the run of 240,000: layer 1's warm-up ends after 1,000 steps; layer 3 begins anew at 20,000.
    for step, layer, rate in (
        (0, 0, 4.5e-3 / 1000),
        (499, 0, 4.5e-3 / 2),
        (7_500, 0, 4.5e-3 * 0.95),
        (20_000, 2, 4.5e-3 / 1000),
        (29_999, 2, 4.5e-3 * (0.9 + 0.1 * 1e-2)),
        (239_999, 23, 4.5e-3 * (0.9 + 0.1 * 1e-2)),
    ):
        expected = [rate / 10] * (2 * layer) + [rate] * 2 + [0.0] * (46 - 2 * layer)
        assert transfer.rates(step) == pytest.approx(expected), step
    steps = {s: 1.5e-3 * linear_decay(s, schedule.distillation_steps, schedule.warm_up) for s in (0, 4_999, 499_999)}
    assert steps == pytest.approx({0: 1.5e-7, 4_999: 7.5e-4, 499_999: 1.5e-7})  # up in 10,000 steps, down to 1.5e-7


def test_the_teacher_has_batches_of_its_own_size(material: tuple[TokenCorpus, Vocabulary]) -> None:
    corpus, vocabulary = material
    schedule = dataclasses.replace(QUICK, teacher_batch_size=64)
    run = Distillation(fitted(SMALL, vocabulary), fitted(SMALL_TEACHER, vocabulary), corpus, vocabulary, schedule, 0)
    sizes = {stage.name: len(run.batches_of(stage).batch(1, stage.number).input_ids) for stage in run.stages}
    assert sizes == {"teacher": 64, "transfer": 32, "distillation": 32}
    teacher, *_ = plan(run)
    assert teacher.tokens == round(400 * 64 * (run.batches.corpus.lengths.mean() + 3))


# ---- the head ------------------------------------------------------------------------------------------------------


def test_logits_of_words_and_pairs_are_those_of_hugging_face() -> None:
    import transformers

    config = MobileBertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        intermediate_size=12,
        intra_bottleneck_size=8,
        embedding_size=4,
        isolate_padding=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        values = {k: v for k, v in config.to_dict().items() if k not in ("pooling", "head_norm", "mask_style")}
        theirs = transformers.MobileBertForPreTraining(transformers.MobileBertConfig(**values))
        for parameter in theirs.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    theirs = theirs.double().eval()
    ours = PreTrainingModel(config).double().eval()
    state = {k: v for k, v in theirs.state_dict().items() if "predictions.decoder" not in k}
    ours.load_state_dict(state, strict=True)
    ids = torch.tensor([[3, 4, 5, 6]])
    chosen = torch.tensor([[False, True, False, True]])
    with torch.no_grad():
        words, related = ours(ids, torch.ones_like(ids), chosen)
        expected = theirs(input_ids=ids)
        torch.testing.assert_close(words, expected.prediction_logits[chosen], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(related, expected.seq_relationship_logits, rtol=1e-6, atol=1e-9)


def test_a_student_starts_with_its_teachers_embeddings_and_head_and_an_encoder_of_its_own() -> None:
    student, teacher = PreTrainingModel(SMALL), PreTrainingModel(SMALL_TEACHER)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    torch.nn.init.constant_(teacher.mobilebert.embeddings.LayerNorm.weight, 3.0)
    copy_from_teacher(student, teacher)
    after = student.state_dict()
    for name, value in teacher.state_dict().items():
        if name.startswith("mobilebert.embeddings.LayerNorm."):
            assert torch.equal(after[name], before[name])  # LayerNorm's gain is not NoNorm's
        elif not name.startswith("mobilebert.encoder."):
            assert torch.equal(after[name], value)
    assert all(torch.equal(after[k], v) for k, v in before.items() if k.startswith("mobilebert.encoder."))


def test_embeddings_wider_than_the_hidden_state_are_refused() -> None:
    with pytest.raises(ConfigError, match="embedding_size 64 is larger than hidden_size 32"):
        PreTrainingModel(SMALL.with_changes(embedding_size=64))


# ---- the stages ----------------------------------------------------------------------------------------------------


def test_transfer_moves_only_the_layers_up_to_the_current_one(material: tuple[TokenCorpus, Vocabulary]) -> None:
    corpus, vocabulary = material
    deep = fitted(SMALL, vocabulary).with_changes(num_hidden_layers=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = PreTrainingModel(deep).eval()
        teacher = PreTrainingModel(fitted(SMALL_TEACHER, vocabulary).with_changes(num_hidden_layers=3)).eval()
    before = {k: v.clone() for k, v in student.state_dict().items()}
    stage = Transfer(student, teacher, dataclasses.replace(QUICK, optimizer="lamb", transfer_steps=15))
    optimizer = make_optimizer("lamb", stage.groups())
    batches = Batches(corpus, vocabulary, 16, 0)
    for step in range(5, 10):  # the second layer's phase
        for group, rate in zip(optimizer.param_groups, stage.rates(step), strict=True):
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        stage.loss(batches.batch(step, stage.number), step).backward()
        optimizer.step()
        assert stage.label(step) == "transfer/2"
    moved = {k for k, v in student.state_dict().items() if not torch.equal(v, before[k])}
    assert {k.split(".")[3] for k in moved} == {"0", "1"}
    assert all(k.startswith("mobilebert.encoder.layer.") for k in moved)

    def change(layer: int) -> float:
        name = f"mobilebert.encoder.layer.{layer}.attention.self.value.weight"
        return float((student.state_dict()[name] - before[name]).norm() / before[name].norm())

    assert change(0) == pytest.approx(0.1 * change(1), rel=0.35)  # a tenth of the rate


def test_a_deeper_teacher_is_followed_at_every_second_layer() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher = PreTrainingModel(SMALL_TEACHER.with_changes(num_hidden_layers=4)).eval()
        student = PreTrainingModel(SMALL).eval()
    schedule = dataclasses.replace(QUICK, strategy="joint", attention=False)
    ids = torch.tensor([[5, 6, 7, 8]])
    nothing = torch.empty(0, dtype=torch.int64)
    mask = torch.ones_like(ids)
    batch = MaskedBatch(ids, mask, torch.zeros_like(ids), ids < 0, nothing, torch.tensor([NO_PAIR]))
    stage = Transfer(student, teacher, schedule)
    with torch.no_grad():
        ours, theirs = student.mobilebert(ids, mask), teacher.mobilebert(ids, mask)
        expected = sum(float(feature_map_loss(ours.hidden[i], theirs.hidden[2 * i + 1], mask)) for i in (0, 1)) / 2
        assert float(stage.loss(batch, 0)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        ({}, [("transfer", 200), ("distillation", 200)]),
        ({"strategy": "joint"}, [("transfer", 200), ("distillation", 200)]),
        ({"strategy": "auxiliary"}, [("distillation", 400)]),
        ({"feature_maps": False, "attention": False}, [("distillation", 400)]),
        ({"strategy": "none"}, [("masked words", 400)]),
    ],
)
def test_every_strategy_gives_the_student_the_same_number_of_steps(
    changes: dict[str, Any], stages: list[tuple[str, int]]
) -> None:
    schedule = dataclasses.replace(QUICK, **changes)
    made = student_stages(PreTrainingModel(SMALL), PreTrainingModel(SMALL_TEACHER), schedule)
    assert [(stage.name, stage.steps) for stage in made] == stages


@pytest.mark.parametrize("strategy", ["joint", "auxiliary", "none"])
def test_other_strategies_train_too(material: tuple[TokenCorpus, Vocabulary], strategy: str) -> None:
    schedule = dataclasses.replace(QUICK.scaled(60, layers=2), strategy=strategy)
    _, result = distilled(material, schedule)
    assert result.scores["student"].loss < result.scores["student before"].loss
    assert ("teacher" in result.scores) == (strategy != "none")


def stages_of(material: tuple[TokenCorpus, Vocabulary]) -> dict[str, Stage]:
    """One of each kind, in float64, on untrained models."""
    torch.manual_seed(0)
    student = PreTrainingModel(fitted(SMALL, material[1])).double().eval()
    teacher = PreTrainingModel(fitted(SMALL_TEACHER, material[1])).double().eval()
    encoder = FeatureTeacher(teacher.config).double().eval()
    return {
        "masked words": MaskedWords(student, "teacher", 1, 10, 1e-3, 0.1),
        "progressive": Transfer(student, teacher, dataclasses.replace(QUICK, transfer_steps=10)),
        "joint": Transfer(student, teacher, dataclasses.replace(QUICK, strategy="joint")),
        "predictions": Predictions(student, teacher, QUICK, 10, transfer=True),
        "representations": Representations(student, encoder, QUICK, 10),
    }


def uneven(material: tuple[TokenCorpus, Vocabulary]) -> MaskedBatch:
    """Of 13 texts: few are of two segments, the first ones are the shorter ones, and the last has nothing hidden."""
    corpus, vocabulary = material
    batch = Batches(corpus, vocabulary, 13, 0).batch(0)
    mask, chosen, targets = batch.attention_mask.clone(), batch.chosen.clone(), batch.input_ids.clone()
    targets[chosen] = batch.targets
    mask[:5, 7:] = 0
    chosen &= mask == 1
    chosen[5:9, 1:6] = True
    chosen[12] = False
    follows = torch.full((13,), NO_PAIR)
    follows[[1, 7, 8]] = torch.tensor([1, 0, 1])
    return MaskedBatch(batch.input_ids, mask, batch.token_type_ids, chosen, targets[chosen], follows)


@pytest.mark.parametrize("kind", ["masked words", "progressive", "joint", "predictions", "representations"])
def test_unequal_parts_of_a_batch_and_processes_that_share_it_add_up_to_its_loss_and_gradient(
    material: tuple[TokenCorpus, Vocabulary], kind: str
) -> None:
    with torch.random.fork_rng(devices=[]):
        stage, whole = stages_of(material)[kind], uneven(material)
    parameters = [p for group in stage.groups() for p in group["params"]]
    assert len({tuple(part.counts.values()) for part in whole.split(4)}) == 4  # no two weigh the same

    def gradient(parts: list[MaskedBatch]) -> tuple[float, torch.Tensor]:
        stage.trained.zero_grad()
        losses = [stage.loss(part, 7, part.shares_of(whole)) for part in parts]
        for loss in losses:
            if loss.requires_grad:
                loss.backward()
        flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        return float(sum(losses).detach()), flat

    loss, expected = gradient([whole])
    assert loss == float(stage.loss(whole, 7).detach())
    shared = [whole.rows(slice(rank, None, 3)) for rank in range(3)]
    for parts in (whole.split(2), whole.split(4), whole.split(13), shared, [p for s in shared for p in s.split(2)]):
        total, flat = gradient(parts)
        assert total == pytest.approx(loss, rel=1e-12)
        torch.testing.assert_close(flat, expected, rtol=1e-9, atol=1e-12)


def test_a_tail_too_short_for_all_processes_and_parts_joins_the_batch_before(
    material: tuple[TokenCorpus, Vocabulary],
) -> None:
    corpus, vocabulary = material
    for texts, sizes in ((13, [4, 4, 5]), (15, [4, 4, 7]), (16, [4] * 4), (3, [3])):
        few = corpus.select(np.arange(texts))
        batches = Batches(few, vocabulary, 4, 0, least=4)
        assert batches.an_epoch == len(sizes)
        epoch = [batches.batch(number) for number in range(batches.an_epoch)]
        assert sorted(len(batch.input_ids) for batch in epoch) == sizes
        for batch in epoch if texts > 3 else ():
            parts = [part for rank in (0, 1) for part in batch.rows(slice(rank, None, 2)).split(2)]
            assert len(parts) == 4
            assert all(len(part.targets) for part in parts)
    with pytest.raises(
        DistillationError, match="32 texts cannot be shared by 40 processes in 1 parts each; give a larger"
    ):
        Distillation(
            fitted(SMALL, vocabulary),
            fitted(SMALL_TEACHER, vocabulary),
            corpus,
            vocabulary,
            QUICK,
            0,
            place=Place(ranks=40),
        )


def test_what_a_stage_does_not_train_gets_no_gradient_while_it_trains_and_can_have_one_after(
    material: tuple[TokenCorpus, Vocabulary],
) -> None:
    resting: dict[str, set[str]] = {}

    def watch(tick: Tick) -> None:
        model = run.teacher if tick.stage == "teacher" else run.student
        named = dict(model.named_parameters())
        resting[tick.stage] = {name.split(".")[1] for name, p in named.items() if not p.requires_grad}
        assert not any(p.grad is not None for p in named.values() if not p.requires_grad)

    schedule = QUICK.scaled(8, layers=2)
    run = Distillation(
        fitted(SMALL, material[1]), fitted(SMALL_TEACHER, material[1]), *material, schedule, 0, progress=watch
    )
    run.run()
    heads = {"embeddings", "predictions", "seq_relationship"}
    assert resting == {"teacher": set(), "transfer/1": heads, "transfer/2": heads, "distillation": set()}
    assert all(p.requires_grad for model in (run.student, run.teacher) for p in model.parameters())


@pytest.mark.parametrize(
    ("rate", "said"),
    [
        (1e30, r"distillation: the loss is (nan|inf) and the gradient's norm nan at step 2 of \d+; "),
        (3000.0, r"distillation: the loss is \S+ at step \d of \d+, far above the \d\S+ that it began with; "),
    ],
    ids=["no number", "too high"],
)
def test_weights_that_run_away_stop_the_run_with_the_remedy_and_a_lower_rate_goes_on_from_the_last_good_ones(
    material: tuple[TokenCorpus, Vocabulary],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    rate: float,
    said: str,
) -> None:
    # In the student's last stage: what was reached before must not be lost.
    hopeless = dataclasses.replace(QUICK.scaled(24, layers=2), distillation_rate=rate, warm_up=0.0)
    named = re.escape(f"(schedule.distillation_rate is {rate:g})")
    remedy = rf"{said}use a lower rate {named}.* goes on from the last good checkpoint"
    for _ in range(2):  # the second run goes on from the checkpoint, to the same end
        with pytest.raises(DistillationError, match=remedy):
            distilled(material, hopeless, norm="layer_norm", folder=tmp_path, save_every_s=0.0)
        assert place_in(tmp_path / CHECKPOINT) == (2, 0)  # before the step that spoilt the weights
        with safe_open(tmp_path / CHECKPOINT, framework="pt") as file:
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        assert max(float(v.abs().max()) for n, v in held.items() if n.startswith("student.")) < 100
        assert {n for n in held if n.startswith("losses.")} == {
            f"losses.{n}" for n in ("teacher", "transfer/1", "transfer/2")
        }
    assert not caplog.messages
    lower = dataclasses.replace(hopeless, distillation_rate=1e-3)
    _, result = distilled(material, lower, norm="layer_norm", folder=tmp_path)
    assert (
        result.losses == distilled(material, lower, norm="layer_norm")[1].losses
    )  # nothing of the hopeless rate is left
    assert result.changes == (
        f"schedule.distillation_rate was {rate:g} until step 0 of distillation and is 0.001 from there",
    )
    assert [m.partition(": ")[2] for m in caplog.messages] == list(result.changes)


@pytest.mark.parametrize(
    ("changes", "stage"),
    [
        ({"distillation_rate": 1e30}, "distillation"),
        ({"teacher_rate": 1e30}, "teacher"),
        ({"transfer_rate": 1e30}, "transfer/1"),  # of the first of two phases: the second begins with other losses
        ({"distillation_rate": 3000.0, "optimizer": "lamb"}, "distillation"),
    ],
)
def test_the_last_update_of_a_stage_or_a_phase_is_looked_at_too(
    material: tuple[TokenCorpus, Vocabulary], tmp_path: Path, changes: dict[str, Any], stage: str
) -> None:
    schedule = dataclasses.replace(QUICK.scaled(4, layers=2), warm_up=0.0, phase_warm_up=0.0, **changes)
    with pytest.raises(DistillationError, match=rf"{stage}: the loss is .* at step 1 of [12].*; use a lower rate"):
        distilled(material, schedule, folder=tmp_path, save_every_s=0.0)
    where = 0 if stage == "teacher" else 1 if stage == "transfer/1" else 2
    assert place_in(tmp_path / CHECKPOINT) == (where, 0)


def test_weights_are_not_kept_where_the_loss_is_higher_than_it_was(
    material: tuple[TokenCorpus, Vocabulary], tmp_path: Path
) -> None:
    kept: list[tuple[int, int]] = []

    def watch(tick: Tick) -> None:
        kept.append(place_in(tmp_path / CHECKPOINT))

    # Some tens of times higher, for long: each step alone might be a bad batch.
    rising = dataclasses.replace(QUICK.scaled(60, layers=2), strategy="none", distillation_rate=3.0, warm_up=0.0)
    with pytest.raises(DistillationError, match=r"the loss is \d+\.\d+ at step 25 of 30, far above the 6\.\d+"):
        distilled(material, rising, norm="layer_norm", folder=tmp_path, save_every_s=0.0, progress=watch)
    assert set(kept) == {(0, 0)}
    assert len(kept) == 24


class KilledError(Exception):
    pass


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({}, [("teacher", 3), ("transfer/1", 2), ("transfer/2", 3), ("distillation", 1)]),
        (
            {"accumulate": 4, "precision": "bfloat16", "optimizer": "lamb", "teacher_batch_size": 64},
            [("teacher", 2), ("transfer/2", 4), ("distillation", 3)],
        ),
        ({"strategy": "auxiliary", "whole_words": True}, [("distillation", 2)]),
        ({"strategy": "none", "accumulate": 2}, [("masked words", 5)]),
    ],
)
def test_a_run_goes_on_from_its_checkpoint_to_the_same_bits(
    material: tuple[TokenCorpus, Vocabulary], tmp_path: Path, changes: dict[str, Any], steps: list[tuple[str, int]]
) -> None:
    # With dropout, so that its draws have to be the same too.
    teacher = fitted(SMALL_TEACHER, material[1]).with_changes(hidden_dropout_prob=0.1)
    student = fitted(SMALL, material[1]).with_changes(hidden_dropout_prob=0.1)
    schedule = dataclasses.replace(QUICK, **changes).scaled(16, layers=2)

    def run(folder: Path | None, stop: tuple[str, int] | None) -> Result:
        def watch(tick: Tick) -> None:
            if (tick.stage, tick.step) == stop:
                raise KilledError

        return Distillation(
            student, teacher, *material, schedule, 5, folder=folder, progress=watch, save_every_s=0.0
        ).run()

    whole = run(None, None)
    for number, stop in enumerate(steps):
        folder = tmp_path / str(number)
        with pytest.raises(KilledError):
            run(folder, stop)
        again = run(folder, None)
        assert all(torch.equal(again.student[k], v) for k, v in whole.student.items()), stop
        assert again.losses == whole.losses
        assert again.scores == whole.scores


def test_a_checkpoint_of_another_run_or_a_damaged_one_is_refused(
    material: tuple[TokenCorpus, Vocabulary], tmp_path: Path
) -> None:
    def stop(tick: Tick) -> None:
        if tick.step == 2:
            raise KilledError

    schedule = QUICK.scaled(10, layers=2)
    more: dict[str, Any] = {"folder": tmp_path, "save_every_s": 0.0}
    with pytest.raises(KilledError):
        distilled(material, schedule, 1, progress=stop, **more)
    with pytest.raises(DistillationError, match="is of a run with another corpus, seed, schedule, geometry or teacher"):
        distilled(material, schedule, 2, **more)
    path = tmp_path / CHECKPOINT
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(DistillationError, match=r"is damaged .*; delete it"):
        distilled(material, schedule, 1, **more)


def test_a_checkpoint_that_another_given_teacher_left_is_refused(
    material: tuple[TokenCorpus, Vocabulary], tmp_path: Path
) -> None:
    def stop(tick: Tick) -> None:
        if tick.step == 2:
            raise KilledError

    schedule = QUICK.scaled(10, layers=2)
    one = PreTrainingModel(fitted(SMALL_TEACHER, material[1])).state_dict()
    other = {name: value + 0.01 for name, value in one.items()}
    with pytest.raises(KilledError):
        distilled(material, schedule, 1, folder=tmp_path, save_every_s=0.0, teacher=one, progress=stop)
    with pytest.raises(DistillationError, match="is of a run with another corpus, seed, schedule, geometry or teacher"):
        distilled(material, schedule, 1, folder=tmp_path, teacher=other)
    _, result = distilled(material, schedule, 1, folder=tmp_path, teacher=one)
    assert torch.equal(result.teacher["cls.predictions.bias"], one["cls.predictions.bias"])


def test_a_disk_that_is_full_leaves_the_checkpoint_before(
    material: tuple[TokenCorpus, Vocabulary], tmp_path: Path
) -> None:
    kept: list[bytes] = []

    def fill(tick: Tick) -> None:
        if tick.step == 3:
            kept.append((tmp_path / CHECKPOINT).read_bytes())
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # no file may grow beyond that

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that the write fails, as on a full disk
    try:
        with pytest.raises(DistillationError, match=r"cannot be written .* the one before is still there"):
            distilled(material, QUICK.scaled(10, layers=2), 1, folder=tmp_path, save_every_s=0.0, progress=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [p.name for p in tmp_path.iterdir()] == [CHECKPOINT]
    assert (tmp_path / CHECKPOINT).read_bytes() == kept[0]


def test_a_plan_counts_steps_and_tokens_and_changes_nothing(material: tuple[TokenCorpus, Vocabulary]) -> None:
    corpus, vocabulary = material
    student, teacher = fitted(SMALL, vocabulary), fitted(SMALL_TEACHER, vocabulary)
    run = Distillation(student, teacher, corpus, vocabulary, QUICK, 0)
    before = {k: v.clone() for k, v in run.student.state_dict().items()}
    costs = plan(run)
    assert [(c.name, c.steps) for c in costs] == [("teacher", 400), ("transfer", 200), ("distillation", 200)]
    per_text = run.batches.corpus.lengths.mean() + 3
    assert costs[0].tokens == round(400 * 32 * per_text)
    assert all(c.hours > 0 and c.flops > 0 for c in costs)
    assert all(torch.equal(v, before[k]) for k, v in run.student.state_dict().items())


@pytest.mark.parametrize(
    ("change", "said"),
    [({"num_hidden_layers": 3}, "the student has 2 layers and the teacher 3"), ({"hidden_size": 48}, "hidden_size")],
)
def test_a_pair_that_does_not_fit_is_refused(change: dict[str, int], said: str) -> None:
    with pytest.raises(DistillationError, match=said):
        check_pair(SMALL, SMALL_TEACHER.with_changes(**change))


def test_a_schedule_scales_in_proportion_and_refuses_too_few_steps() -> None:
    schedule = Schedule(400, 300, 300, 32, 1e-3, 1e-3, 1e-3)
    scaled = schedule.scaled(100, layers=2)
    assert (scaled.teacher_steps, scaled.transfer_steps, scaled.distillation_steps) == (40, 30, 30)
    least = schedule.scaled(26, layers=24)
    assert (least.teacher_steps, least.transfer_steps, least.distillation_steps) == (1, 24, 1)
    bare = dataclasses.replace(schedule, transfer_steps=0).scaled(70, layers=24)
    assert (bare.teacher_steps, bare.transfer_steps, bare.distillation_steps) == (40, 0, 30)
    with pytest.raises(DistillationError, match="25 steps are too few; 24 layers need at least 26"):
        schedule.scaled(25, layers=24)
    with pytest.raises(DistillationError, match="batch_size is 0"):
        dataclasses.replace(schedule, batch_size=0)


@pytest.mark.slow
def test_a_distilled_student_follows_its_teacher_and_beats_one_that_never_had_a_teacher(
    material: tuple[TokenCorpus, Vocabulary],
) -> None:
    seen: list[tuple[str, int, int]] = []
    state = torch.get_rng_state()
    run, result = distilled(material, QUICK, progress=lambda tick: seen.append((tick.stage, tick.step, tick.steps)))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(seen) == QUICK.steps
    assert seen[-1] == ("distillation", 200, 200)
    assert list(result.losses) == ["teacher", "transfer/1", "transfer/2", "distillation"]
    for stage in ("transfer/1", "transfer/2"):
        assert np.mean(result.losses[stage][-10:]) < 0.75 * result.losses[stage][0]
    # The steps of the distillation on the same text, without a teacher.
    _, alone = distilled(material, dataclasses.replace(QUICK, strategy="none", transfer_steps=0))
    scores = result.scores
    assert scores["student"].loss < scores["student before"].loss
    assert scores["student"].loss < alone.scores["student"].loss
    assert scores["student"].loss < scores["teacher"].loss + 0.1
    assert scores["student"] == score_masked(run.student, run.held_out)


def test_the_same_seed_gives_the_same_student_to_the_last_bit(material: tuple[TokenCorpus, Vocabulary]) -> None:
    short = QUICK.scaled(20, layers=2)
    first, second, other = (distilled(material, short, seed)[1] for seed in (3, 3, 4))
    assert all(torch.equal(first.student[k], second.student[k]) for k in first.student)
    assert first.losses == second.losses
    assert any(not torch.equal(first.student[k], other.student[k]) for k in first.student)


# ---- the pipeline --------------------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(sentences(200)))
    return path


def test_pipeline_distills_quantizes_and_inspects_a_model_folder(text: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": "32", "embedding_size": "16", "teacher.intermediate_size": "64"}
    overrides = {**sizes, "schedule.batch_size": 8}
    report = distilling.distill([text], "nano", tmp_path / "student", steps=20, seed=1, overrides=overrides)
    checkpoint = load(tmp_path / "student")
    assert checkpoint.config.hidden_size == 32
    assert checkpoint.config.vocab_size == len(checkpoint.vocabulary)
    assert report["schedule"]["batch_size"] == 8
    assert sum(report["schedule"][f"{stage}_steps"] for stage in ("teacher", "transfer", "distillation")) == 20
    assert set(report["scores"]) == {"teacher", "student before", "student transferred", "student"}
    card = (tmp_path / "student" / "README.md").read_text()
    assert report["corpus"]["sha256"] in card
    assert "seed 1" in card
    assert card.startswith("---\nlicense: unknown\n")
    (read,) = report["corpus"]["files"]
    assert read["sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    assert (read["name"], read["bytes"]) == ("corpus.txt", len(text.read_bytes()))
    assert f"\n{read['sha256']}  corpus.txt\n" in card
    assert f"Made by pocketfed {importlib.metadata.version('pocketfed')}:" in card
    (command,) = [line for line in card.splitlines() if line.startswith("pocketfed distill ")]
    assert command == (
        "pocketfed distill --corpus corpus.txt --preset nano --out student --seed 1 --steps 20 --set hidden_size=32 "
        "--set embedding_size=16 --set teacher.intermediate_size=64 --set schedule.batch_size=8"
    )

    stored = pipeline.quantize(tmp_path / "student", tmp_path / "small")
    assert stored["bytes_after"] < stored["bytes_before"] / 2
    assert stored["bytes_after"] == (tmp_path / "small" / "model.safetensors").stat().st_size
    assert 0 < stored["mean_error"] < stored["largest_error"] < 0.05
    assert (tmp_path / "small" / "README.md").read_text().startswith(card)

    seen = pipeline.inspect(tmp_path / "small")
    assert seen["quantization"] == "int8"
    assert seen["parameters"] == sum(p.numel() for p in load_student(checkpoint).parameters())
    assert stored["bytes_after"] < seen["bytes"]["int8"] + 5_000  # names and shapes, packed as the weights are
    ids = torch.tensor([[2, 10, 11, 3]])
    exact, rounded = (
        load_student(load(tmp_path / name))(ids, torch.ones_like(ids)).last.detach() for name in ("student", "small")
    )
    assert float(F.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0)) > 0.999


@pytest.mark.parametrize("preset", ["bert-base", "ib-bert-large"])
def test_what_mobilebert_is_compared_with_is_pre_trained_by_itself(text: Path, tmp_path: Path, preset: str) -> None:
    inside = 48 if preset == "ib-bert-large" else 32
    sizes = {"hidden_size": 32, "intra_bottleneck_size": inside, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "vocab_size": 200, "max_position_embeddings": 32}
    sizes |= {"embedding_size": 16 if preset == "ib-bert-large" else 32}
    report = distilling.distill([text], preset, tmp_path / "out", 12, overrides={**sizes, "schedule.batch_size": 8})
    assert list(report["losses"]) == ["masked words"]
    assert report["schedule"]["distillation_steps"] == 12
    assert set(report["scores"]) == {"student before", "student"}
    made = load(tmp_path / "out").config
    assert (made.use_bottleneck, made.num_feedforward_networks) == (preset == "ib-bert-large", 1)
    assert f"\n# `{preset}`\n" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(ConfigError, match=f"{preset} is pre-trained without a teacher"):
        distilling.distill([text], preset, tmp_path / "no", 12, overrides={**sizes, "schedule.strategy": "joint"})


def test_a_teacher_that_is_kept_teaches_again(text: Path, tmp_path: Path) -> None:
    kept = distilling.DistillOptions(
        keep_teacher=tmp_path / "teacher", keep_heads=tmp_path / "heads", licence="CC0-1.0"
    )
    first = distilling.distill([text], "nano", tmp_path / "one", steps=16, options=kept)
    student, vocabulary = load_pretrained(tmp_path / "heads")
    published = load(tmp_path / "one")
    assert vocabulary.tokens == published.vocabulary
    assert all(torch.equal(value, published.state[name]) for name, value in student.mobilebert.state_dict().items())
    assert not any(name.startswith("cls.") for name in published.state)
    again = distilling.DistillOptions(teacher=tmp_path / "teacher")
    second = distilling.distill([text], "nano", tmp_path / "two", steps=16, seed=1, options=again)
    assert second["scores"]["teacher"]["tokens"] > 0
    assert set(first["losses"]) - set(second["losses"]) == {"teacher"}
    assert load(tmp_path / "two").vocabulary == load(tmp_path / "teacher").vocabulary
    card = (tmp_path / "one" / "README.md").read_text()
    assert "Licence: CC0-1.0." in card
    assert card.startswith("---\nlicense: cc0-1.0\n")
    with pytest.raises(CheckpointError, match="one has no pre-training heads, as a student has none; a teacher needs"):
        distilling.distill(
            [text], "nano", tmp_path / "three", steps=16, options=distilling.DistillOptions(teacher=tmp_path / "one")
        )


def test_bfloat16_trains_and_repeats_itself(material: tuple[TokenCorpus, Vocabulary]) -> None:
    short = dataclasses.replace(QUICK.scaled(40, layers=2), precision="bfloat16")
    (_, first), (_, second) = distilled(material, short), distilled(material, short)
    _, exact = distilled(material, dataclasses.replace(short, precision="float32"))
    assert first.losses == second.losses
    assert first.losses["teacher"] != exact.losses["teacher"]
    assert first.scores["student"].loss == pytest.approx(exact.scores["student"].loss, rel=0.05)


def test_tensorboard_files_hold_every_steps_loss(text: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = distilling.DistillOptions(tensorboard=tmp_path / "events")
    distilling.distill([text], "nano", tmp_path / "student", steps=10, options=options)
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert {"loss/teacher", "loss/transfer/1", "loss/transfer/2", "loss/distillation"} <= set(events.Tags()["scalars"])
    assert sum(len(events.Scalars(tag)) for tag in events.Tags()["scalars"] if tag.startswith("loss/")) == 10


def command(text: Path, out: Path, *more: str) -> list[str]:
    sizes = ["hidden_size=32", "embedding_size=16", "teacher.intermediate_size=64", "schedule.batch_size=8"]
    settings = [part for size in sizes for part in ("--set", size)]
    arguments = ["distill", "--corpus", str(text), "--out", str(out), "--preset", "nano", *settings, *more]
    return ["-m", "pocketfed.cli", *arguments]


# Dies as by `kill -9` the moment that a checkpoint of this stage and step is written. A kill from outside would have to
# watch the file, and on a busy machine would come too late.
KILLED_AT = """
import os, signal, sys
from pocketfed.cli.main import main
from pocketfed.model.distillation import Distillation
stage, step, save = int(sys.argv.pop(1)), int(sys.argv.pop(1)), Distillation.save
def save_and_die(self, optimizer):
    save(self, optimizer)
    if (self._stage, self._step) == (stage, step):
        os.kill(os.getpid(), signal.SIGKILL)
Distillation.save = save_and_die
main()
"""


@pytest.mark.slow
def test_a_distillation_that_is_killed_in_every_stage_goes_on_to_the_same_student(text: Path, tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    more = (
        "--set",
        "schedule.accumulate=2",
        "--set",
        "schedule.precision=bfloat16",
        "--set",
        "teacher.hidden_dropout_prob=0.1",
    )
    steps = ("--steps", "45", "--save-every", "0", *more)
    subprocess.run([sys.executable, *command(text, tmp_path / "whole", *steps)], env=environment, check=True)
    cut = command(text, tmp_path / "cut", *steps)
    checkpoint = tmp_path / "cut.work" / CHECKPOINT
    for stage in range(3):
        killed = [sys.executable, "-c", KILLED_AT, str(stage), "2", *cut[2:]]
        assert subprocess.run(killed, env=environment, check=False).returncode == -signal.SIGKILL
        assert place_in(checkpoint) == (stage, 2)
        assert not (tmp_path / "cut").exists()
    subprocess.run([sys.executable, *cut], env=environment, check=True)
    assert not checkpoint.exists()
    name = "model.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def place_in(checkpoint: Path) -> tuple[int, int]:
    """Stage and step."""
    with checkpoint.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    where = json.loads(header["__metadata__"]["where"])
    return where["stage"], where["step"]


@pytest.mark.slow
def test_two_processes_of_torchrun_train_one_student(text: Path, tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    more = ("--steps", "40", "--json")
    two = subprocess.run(
        [*run, *command(text, tmp_path / "two", *more)], env=environment, check=True, capture_output=True, text=True
    )
    one = subprocess.run(
        [sys.executable, *command(text, tmp_path / "one", *more)],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    together, alone = json.loads(two.stdout), json.loads(one.stdout)
    # The same texts a step, each process's weighed by what it holds.
    assert together["scores"]["student"]["loss"] == pytest.approx(alone["scores"]["student"]["loss"], rel=0.01)
    assert load(tmp_path / "two").config == load(tmp_path / "one").config


def test_inspect_knows_a_preset_without_building_it() -> None:
    seen = pipeline.inspect("mobilebert")
    assert seen["parameters"] == 24_581_888
    assert seen["bytes"]["fp32"] == 98_327_552
    assert seen["bytes"]["fp16"] == 49_163_776
    assert seen["flops"] == pytest.approx(5.385e9, rel=1e-3)
    with pytest.raises(ConfigError, match="no preset 'nanoo'; did you mean 'nano'"):
        pipeline.inspect("nanoo")


def test_nothing_is_written_where_something_is_wrong(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    cases: list[tuple[dict[str, object], type[Exception], str]] = [
        ({"preset": "pico"}, ConfigError, "no preset 'pico'"),
        ({"overrides": {"hiden_size": 3}}, ConfigError, "no setting 'hiden_size'"),
        ({"overrides": {"schedule.rate": 3}}, ConfigError, r"no setting 'schedule\.rate'"),
        ({"overrides": {"hidden_size": "wide"}}, ConfigError, "hidden_size is 'wide'"),
        ({"steps": 3}, DistillationError, "3 steps are too few"),
        (
            {
                "overrides": {"schedule.strategy": "none"},
                "options": distilling.DistillOptions(keep_teacher=tmp_path / "teacher"),
            },
            ConfigError,
            "trains no teacher, so there is none to keep",
        ),
        ({"corpus": [tmp_path / "none.txt"]}, CorpusError, "does not exist"),
        ({"overrides": {"schedule.teacher_rate": 1e30}, "steps": 60}, DistillationError, "teacher: the loss is"),
    ]
    for changes, error, said in cases:
        arguments = {"corpus": [text], "preset": "nano", "out": out, "steps": 10, **changes}
        with pytest.raises(error, match=said):
            distilling.distill(**arguments)  # type: ignore[arg-type]
        assert [p.name for p in tmp_path.iterdir()] == ["corpus.txt"]  # nor a work folder without a checkpoint
    with pytest.raises(QuantizationError, match="no quantization scheme 'int3'"):
        pipeline.quantize(out, out, "int3")
