"""A plain BERT as the teacher: read as Hugging Face computes it, factorised, followed by its features."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from pocketfed.coordinator import distilling
from pocketfed.model.checkpoints import CheckpointError, load
from pocketfed.model.config import STUDENTS
from pocketfed.model.distillation import Distillation
from pocketfed.model.mobilebert import MobileBert
from pocketfed.model.objectives import sentence_loss
from pocketfed.model.pretraining import Batches, FeatureScore, MaskedScore, score_features
from pocketfed.model.schedules import DistillationError, Schedule
from pocketfed.model.stages import Representations, Transfer, student_stages
from pocketfed.model.teacher import (
    FeatureTeacher,
    PreTrainingModel,
    Teacher,
    copy_from_teacher,
    factorise_embeddings,
    load_teacher,
    save_pretrained,
)
from pocketfed.model.token_store import store_corpus
from pocketfed.model.tokenization import Tokenizer, Vocabulary, train_vocabulary

WORDS = [
    "the",
    "cat",
    "dog",
    "bird",
    "sings",
    "barks",
    "sleeps",
    "in",
    "near",
    "house",
    "garden",
    "tree",
    "old",
    "young",
]
SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 20,
}
STUDENT = STUDENTS["nano"].with_changes(
    hidden_size=24, embedding_size=8, intra_bottleneck_size=16, intermediate_size=32, max_position_embeddings=16
)
SCHEDULE = Schedule(1, 20, 60, 16, 3e-3, 3e-3, 3e-3, optimizer="adamw", strategy="auxiliary", pairs=False)


def lines(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, 7)) for _ in range(count)]


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return train_vocabulary(lines(300), 60)


def write_bert(folder: Path, vocabulary: Vocabulary, kind: Any = transformers.BertModel, **changes: Any) -> Any:
    """A BERT with weights large enough to matter, in Hugging Face's own files. Returns Hugging Face's model."""
    config = transformers.BertConfig(vocab_size=len(vocabulary), **{**SIZES, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config).eval()
        for parameter in model.parameters():
            parameter.data += torch.randn_like(parameter) * 0.3
    model.save_pretrained(folder)
    vocabulary.save(folder / "vocab.txt")
    return model


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory, vocabulary: Vocabulary) -> Path:
    folder = tmp_path_factory.mktemp("bert") / "encoder"
    write_bert(folder, vocabulary)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(line + "." for line in lines(300)))
    return path


# ---- reading -------------------------------------------------------------------------------------------------------


def test_a_bert_without_heads_is_read_as_hugging_face_computes_it(tmp_path: Path, vocabulary: Vocabulary) -> None:
    theirs = write_bert(tmp_path, vocabulary, hidden_act="gelu_new").double()
    ours, words = load_teacher(tmp_path)
    assert isinstance(ours, FeatureTeacher)
    assert words == vocabulary
    ids = torch.randint(5, len(vocabulary), (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    types = (torch.arange(9) > 4).long().expand(3, 9)
    with torch.no_grad():
        expected = theirs(ids, mask, types, output_hidden_states=True).hidden_states[1:]
        hidden = ours.double().mobilebert(ids, mask, types).hidden
    for got, wanted in zip(hidden, expected, strict=True):
        torch.testing.assert_close(got[mask == 1], wanted[mask == 1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", [transformers.BertForPreTraining, transformers.BertForMaskedLM])
def test_a_bert_with_its_heads_predicts_hidden_words_as_hugging_face_does(
    tmp_path: Path, vocabulary: Vocabulary, kind: Any
) -> None:
    theirs = write_bert(tmp_path, vocabulary, kind).double()
    ours, _ = load_teacher(tmp_path)
    assert isinstance(ours, PreTrainingModel)
    ids = torch.randint(5, len(vocabulary), (2, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(ids)[0]
        got = ours.double().predict(ours.mobilebert(ids, torch.ones_like(ids)).last.flatten(0, 1))
    torch.testing.assert_close(got, expected.flatten(0, 1), rtol=1e-6, atol=1e-9)


def test_a_bert_kept_as_a_teacher_is_read_again(bert: Path, vocabulary: Vocabulary, tmp_path: Path) -> None:
    teacher, _ = load_teacher(bert)
    save_pretrained(teacher, vocabulary, tmp_path / "kept")
    again, words = load_teacher(tmp_path / "kept")
    assert isinstance(again, FeatureTeacher)
    assert (again.config, words) == (teacher.config, vocabulary)
    assert all(torch.equal(again.state_dict()[name], value) for name, value in teacher.state_dict().items())


def test_a_sentence_encoder_says_how_its_vectors_are_made(tmp_path: Path, vocabulary: Vocabulary) -> None:
    write_bert(tmp_path, vocabulary)
    assert load_teacher(tmp_path)[0].config.pooling == "mean"
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    assert load_teacher(tmp_path)[0].config.pooling == "cls"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"position_embedding_type": "relative_key"},
            "position_embedding_type 'relative_key'; only encoders with absolute",
        ),
        ({"is_decoder": True}, "a BERT with is_decoder"),
        ({"hidden_size": None}, "the config has no hidden_size"),
        ({"num_hidden_layers": 3}, r"has no tensor mobilebert.encoder.layer.2.*; fetch it again"),
        ({"hidden_act": "swish"}, "swish"),
        ({"vocab_size": 77}, "77"),
    ],
)
def test_a_bert_that_cannot_teach_is_refused_in_a_sentence(
    tmp_path: Path, vocabulary: Vocabulary, change: dict[str, Any], said: str
) -> None:
    write_bert(tmp_path, vocabulary)
    content = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    with pytest.raises(CheckpointError, match=said):
        load_teacher(tmp_path)


def test_a_bert_is_no_student_and_the_message_says_what_it_can_be(bert: Path) -> None:
    with pytest.raises(CheckpointError, match="a bert can only be a teacher, of `pocketfed distill --teacher`"):
        load(bert)


# ---- embeddings ----------------------------------------------------------------------------------------------------


def test_embeddings_are_cut_to_their_largest_singular_values(bert: Path) -> None:
    teacher = load_teacher(bert)[0].mobilebert
    student = MobileBert(STUDENT.with_changes(vocab_size=teacher.config.vocab_size))
    factorise_embeddings(student, teacher)
    words = teacher.embeddings.word_embeddings.weight.double()
    transformation = student.embeddings.embedding_transformation
    assert transformation is not None
    own = transformation.weight.double()[:, 8:16]  # of the trigram, the part of the word itself
    missed = (words - student.embeddings.word_embeddings.weight.double() @ own.t()).square().sum()
    beyond = torch.linalg.svdvals(words)[8:].square().sum()  # Eckart and Young: no table of rank 8 is nearer
    assert float(missed.detach()) == pytest.approx(float(beyond.detach()), rel=1e-5)


def test_a_table_wide_enough_loses_nothing_and_a_layer_norm_is_copied(bert: Path) -> None:
    teacher = load_teacher(bert)[0].mobilebert
    config = STUDENT.with_changes(
        vocab_size=teacher.config.vocab_size,
        embedding_size=24,
        normalization_type="layer_norm",
        initializer_range=1e-9,  # neighbours count for nothing
        layer_norm_eps=1e-12,
    )
    student = MobileBert(config)
    factorise_embeddings(student, teacher)
    ids = torch.tensor([[5, 9, 7, 11]])
    with torch.no_grad():
        ours = student.embeddings(ids, torch.ones_like(ids), None)
        theirs = teacher.embeddings(ids, torch.ones_like(ids), None)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_student_of_a_bert_with_heads_takes_those_that_fit(tmp_path: Path, vocabulary: Vocabulary) -> None:
    write_bert(tmp_path, vocabulary, transformers.BertForPreTraining)
    teacher, _ = load_teacher(tmp_path)
    assert isinstance(teacher, PreTrainingModel)
    student = PreTrainingModel(STUDENT.with_changes(vocab_size=len(vocabulary)))
    copy_from_teacher(student, teacher)
    assert torch.equal(student.cls.predictions.transform.dense.weight, teacher.cls.predictions.transform.dense.weight)
    assert torch.equal(student.cls.predictions.bias, teacher.cls.predictions.bias)
    assert torch.equal(student.cls.seq_relationship.weight, teacher.cls.seq_relationship.weight)


# ---- stages --------------------------------------------------------------------------------------------------------


def test_the_sentence_loss_is_one_minus_the_cosine() -> None:
    student = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]])
    teacher = torch.tensor([[6.0, 8.0], [0.0, 5.0], [0.0, -1.0]])  # the same direction, a right angle, the opposite one
    assert float(sentence_loss(student, teacher)) == pytest.approx((0 + 1 + 2) / 3)


def pair(bert: Path, vocabulary: Vocabulary) -> tuple[PreTrainingModel, Teacher]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return PreTrainingModel(STUDENT.with_changes(vocab_size=len(vocabulary))), load_teacher(bert)[0]


def test_strategies_under_a_teacher_without_heads(bert: Path, vocabulary: Vocabulary) -> None:
    student, teacher = pair(bert, vocabulary)

    def stages(**changes: Any) -> list[tuple[str, int]]:
        schedule = dataclasses.replace(SCHEDULE, **changes)
        return [(stage.name, stage.steps) for stage in student_stages(student, teacher, schedule)]

    assert stages() == [("representations", 80)]
    assert stages(strategy="joint") == [("transfer", 20), ("representations", 60)]
    assert stages(strategy="progressive") == [("transfer", 20), ("representations", 60)]
    assert stages(strategy="progressive", feature_maps=False, attention=False) == [("representations", 80)]
    with pytest.raises(DistillationError, match="nothing is left to learn from it"):
        stages(feature_maps=False, attention=False, sentence_weight=0.0)


def test_in_progressive_transfer_the_first_layer_learns_with_the_embeddings_which_were_only_approximated(
    bert: Path, vocabulary: Vocabulary
) -> None:
    student, teacher = pair(bert, vocabulary)
    stage = Transfer(student, teacher, dataclasses.replace(SCHEDULE, strategy="progressive"))
    held = [{id(p) for p in group["params"]} for group in stage.groups()]
    embeddings = {id(p) for p in student.mobilebert.embeddings.parameters()}
    assert embeddings <= held[0] | held[1]  # matrices, and norms and biases, of layer 1
    assert stage.rates(0)[2:] == [0.0, 0.0]


def test_nothing_is_hidden_from_a_teacher_that_never_saw_a_mask(
    bert: Path, vocabulary: Vocabulary, text: Path, tmp_path: Path
) -> None:
    documents = [(line,) for line in lines(40)]
    corpus = store_corpus(documents, Tokenizer(vocabulary), tmp_path / "corpus", 16)
    batch = Batches(corpus, vocabulary, 8, 0, pairs=False).batch(0)
    assert (batch.input_ids == vocabulary.mask_id).any()
    whole = batch.whole()
    assert not (whole.input_ids == vocabulary.mask_id).any()
    assert torch.equal(whole.input_ids[batch.chosen], batch.targets)
    student, teacher = pair(bert, vocabulary)
    assert isinstance(teacher, FeatureTeacher)
    stage = Representations(student, teacher, SCHEDULE, 10)
    assert float(stage.loss(batch, 0).detach()) == float(stage.loss(whole, 0).detach())


def test_a_student_that_is_its_teacher_scores_one(bert: Path, vocabulary: Vocabulary, tmp_path: Path) -> None:
    _, teacher = pair(bert, vocabulary)
    assert isinstance(teacher, FeatureTeacher)
    twin = PreTrainingModel(teacher.config)
    twin.mobilebert.load_state_dict(teacher.mobilebert.state_dict())
    corpus = store_corpus([(line,) for line in lines(50)], Tokenizer(vocabulary), tmp_path / "corpus", 16)
    score = score_features(twin, teacher, Batches(corpus, vocabulary, 8, 0, pairs=False))
    assert (score.cosine, score.explained, score.texts) == (pytest.approx(1.0), pytest.approx(1.0), 50)


# ---- the whole run -------------------------------------------------------------------------------------------------


def settings(schedule: Schedule = SCHEDULE, **changes: Any) -> dict[str, Any]:
    sizes = {k: v for k, v in STUDENT.to_dict().items() if v != STUDENTS["nano"].to_dict()[k]}
    return {**sizes, **{f"schedule.{k}": v for k, v in dataclasses.asdict(schedule).items()}, **changes}


@pytest.mark.parametrize("strategy", ["auxiliary", "progressive"])
def test_a_student_comes_nearer_to_a_bert_and_its_card_says_by_how_much(
    bert: Path, text: Path, tmp_path: Path, strategy: str
) -> None:
    options = distilling.DistillOptions(teacher=bert, licence="CC0")
    changes = settings(dataclasses.replace(SCHEDULE, strategy=strategy))
    report = distilling.distill([text], "nano", tmp_path / "out", overrides=changes, options=options)
    before, after = report["scores"]["student before"], report["scores"]["student"]
    assert after["cosine"] > before["cosine"] + 0.1
    assert after["explained"] > before["explained"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "from a BERT, encoder (" in card
    assert f"| student | {after['cosine']:.3f} | {after['explained']:.3f} | {after['texts']} |" in card
    assert load(tmp_path / "out").config.hidden_size == 24


@pytest.mark.parametrize(
    ("strategy", "stops", "score"),
    [
        ("joint", [("transfer", 3), ("representations", 4)], FeatureScore),
        ("none", [("masked words", 4)], MaskedScore),  # the teacher gives its vocabulary alone
    ],
)
def test_a_distillation_from_a_bert_stopped_anywhere_goes_on_to_the_same_bits(
    bert: Path, vocabulary: Vocabulary, tmp_path: Path, strategy: str, stops: list[tuple[str, int]], score: type
) -> None:
    corpus = store_corpus([(line,) for line in lines(120)], Tokenizer(vocabulary), tmp_path / "corpus", 16)
    teacher, _ = load_teacher(bert)
    student = STUDENT.with_changes(vocab_size=len(vocabulary))
    schedule = dataclasses.replace(SCHEDULE, strategy=strategy, transfer_steps=6, distillation_steps=6)

    def run(folder: Path, stop_at: tuple[str, int] | None = None) -> dict[str, torch.Tensor]:
        def progress(tick: Any) -> None:
            if (tick.stage, tick.step) == stop_at:
                raise KeyboardInterrupt

        made = Distillation(
            student,
            teacher.config,
            corpus,
            vocabulary,
            schedule,
            0,
            teacher.state_dict(),
            folder,
            progress=progress,
            save_every_s=0.0,
        )
        result = made.run()
        assert {type(held) for held in result.scores.values()} == {score}
        return result.student

    whole = run(tmp_path / "whole")
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts", stop)
    parts = run(tmp_path / "parts")
    assert all(torch.equal(parts[name], value) for name, value in whole.items())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 32}, "the student's hidden_size is 32 and the teacher's is 24"),
        (
            {"num_attention_heads": 2},
            "the student's num_attention_heads is 2 and the teacher's is 4; .*schedule.attention=false",
        ),
    ],
)
def test_what_a_student_must_have_in_common_with_a_bert(
    bert: Path, text: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    options = distilling.DistillOptions(teacher=bert)
    with pytest.raises(DistillationError, match=said):
        distilling.plan_distillation([text], "nano", tmp_path / "out", overrides=settings(**changes), options=options)
    if "num_attention_heads" in changes:  # without attention maps heads need not be alike
        free = settings(**changes, **{"schedule.attention": False})
        assert distilling.plan_distillation([text], "nano", tmp_path / "out", overrides=free, options=options)


@pytest.mark.parametrize(
    ("sizes", "changes", "said"),
    [
        ({"max_position_embeddings": 12}, {}, "up to 16 tokens and the teacher reads 12.*schedule.max_length=12"),
        ({"type_vocab_size": 1}, {"schedule.pairs": True}, "one type of token.*schedule.pairs=false"),
    ],
)
def test_a_bert_that_cannot_read_what_the_student_does_is_refused_before_texts_are_read(
    vocabulary: Vocabulary, tmp_path: Path, sizes: dict[str, int], changes: dict[str, Any], said: str
) -> None:
    write_bert(tmp_path / "bert", vocabulary, **sizes)
    options = distilling.DistillOptions(teacher=tmp_path / "bert")
    with pytest.raises(DistillationError, match=said):
        distilling.distill(
            [tmp_path / "none.txt"], "nano", tmp_path / "out", overrides=settings(**changes), options=options
        )


def test_steps_asked_for_are_all_the_students_where_the_teacher_is_given(
    bert: Path, text: Path, tmp_path: Path
) -> None:
    options = distilling.DistillOptions(teacher=bert)
    (cost,) = distilling.plan_distillation([text], "nano", tmp_path / "out", 50, overrides=settings(), options=options)
    assert (cost["name"], cost["steps"]) == ("representations", 50)
    alone = settings(dataclasses.replace(SCHEDULE, strategy="none"))
    (cost,) = distilling.plan_distillation([text], "nano", tmp_path / "out", 50, overrides=alone)
    assert (cost["name"], cost["steps"]) == ("masked words", 50)
