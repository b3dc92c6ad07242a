"""Losses by hand, stages one at a time, and a whole distillation that must beat what it is compared with."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pocketfed.coordinator import pipeline
from pocketfed.model.checkpoints import CheckpointError, load, load_student
from pocketfed.model.config import STUDENTS, TEACHERS, ConfigError, MobileBertConfig
from pocketfed.model.distillation import (
    DistillationError,
    Schedule,
    attention_loss,
    check_pair,
    distill,
    feature_map_loss,
    linear_decay,
    phase_decay,
    pretraining_distillation_loss,
    schedule_for,
    train_masked,
    transfer_layer,
)
from pocketfed.model.lamb import Lamb, parameter_groups
from pocketfed.model.pretraining import (
    CorpusError,
    TokenCorpus,
    encode_corpus,
    epoch,
    mask_tokens,
    masked_batches,
    read_corpus,
    score_masked,
    split_held_out,
)
from pocketfed.model.teacher import PreTrainingModel, copy_from_teacher
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
def material() -> tuple[TokenCorpus, Vocabulary]:
    lines = sentences(1500)
    vocabulary = train_vocabulary(lines, 400)
    return encode_corpus(Tokenizer(vocabulary), lines, 24), vocabulary


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


def test_losses_are_computed_in_float32_whatever_the_model_has() -> None:
    x, mask = torch.randn(2, 3, 4).bfloat16(), torch.ones(2, 3)
    assert feature_map_loss(x, x + 1, mask).dtype == torch.float32
    assert feature_map_loss(x.double(), x.double(), mask).dtype == torch.float64
    assert pretraining_distillation_loss(x[0], x[0], torch.tensor([0, 1, 2])).dtype == torch.float32


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


# ---- the head ------------------------------------------------------------------------------------------------------


def test_masked_language_logits_are_those_of_hugging_face() -> None:
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
        theirs = transformers.MobileBertForMaskedLM(transformers.MobileBertConfig(**values))
        for parameter in theirs.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    theirs = theirs.double().eval()
    ours = PreTrainingModel(config).double().eval()
    state = {k: v for k, v in theirs.state_dict().items() if "predictions.decoder" not in k}
    ours.load_state_dict(state, strict=True)
    ids = torch.tensor([[3, 4, 5, 6]])
    chosen = torch.tensor([[False, True, False, True]])
    with torch.no_grad():
        torch.testing.assert_close(
            ours(ids, torch.ones_like(ids), chosen), theirs(input_ids=ids).logits[chosen], rtol=1e-6, atol=1e-9
        )


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


# ---- corpus and masks ----------------------------------------------------------------------------------------------


def test_a_corpus_is_read_from_every_kind_of_file_and_each_line_once(tmp_path: Path) -> None:
    lines = [f"line number {i}" for i in range(24)]
    (tmp_path / "a.txt").write_text("\n".join(lines[:8]) + "\n\nword\n" + lines[0] + "\n")
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": line, "id": 1}) for line in lines[8:14]))
    (tmp_path / "c.csv").write_text("label,text\n" + "\n".join(f'x,"{line}"' for line in lines[14:19]))
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "d.tsv").write_text("sentence\tlabel\n" + "\n".join(f"{line}\ty" for line in lines[19:]))
    (tmp_path / "ignored.png").write_bytes(b"\x89PNG\0")
    assert read_corpus([tmp_path]) == tuple(lines)


def test_a_quotation_mark_in_a_tsv_is_a_character(tmp_path: Path) -> None:
    rows = "".join(f'he said "number {i}\n' for i in range(20))
    (tmp_path / "a.tsv").write_text("text\n" + rows)
    assert len(read_corpus([tmp_path])) == 20


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.txt", b"", "holds 0 distinct lines"),
        ("short.txt", b"one short line\n", "holds 1 distinct lines of two words or more; pre-training needs at least"),
        ("latin.txt", b"caf\xe9 au lait\n", "is not UTF-8 text"),
        ("binary.txt", b"a b\0c d\n", "holds NUL bytes"),
        ("bad.jsonl", b'{"text": "a b"}\n{"text"\n', "line 2 is not JSON"),
        ("nokey.jsonl", b'{"txt": "a b"}\n', 'line 1 has no "text"'),
        ("list.jsonl", b'["a b"]\n', 'line 1 has no "text"'),
        ("bad.csv", b"id,label\n1,x\n", "has no column named text; its columns are id, label"),
        ("none.csv", b"", "its columns are none"),
    ],
)
def test_a_bad_corpus_is_refused_in_one_sentence(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CorpusError) as refusal:
        read_corpus([path])
    assert said in str(refusal.value)
    assert name in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_corpus_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="nowhere does not exist"):
        read_corpus([tmp_path / "nowhere"])
    with pytest.raises(CorpusError, match="holds no text"):
        read_corpus([tmp_path])
    with pytest.raises(CorpusError, match="no corpus was given"):
        read_corpus([])


def test_a_line_too_long_for_the_model_becomes_several(material: tuple[TokenCorpus, Vocabulary]) -> None:
    _, vocabulary = material
    corpus = encode_corpus(Tokenizer(vocabulary), ["cat " * 100], 10)
    assert len(corpus) == 17  # six words a piece
    assert corpus.lengths.tolist() == [8] * 16 + [6]


def test_masking_hides_fifteen_percent_of_ordinary_tokens_as_bert_does(
    material: tuple[TokenCorpus, Vocabulary],
) -> None:
    corpus, vocabulary = material
    ids, mask = corpus.rows(np.arange(len(corpus)), vocabulary.pad_id)
    hidden, chosen = mask_tokens(ids, mask, vocabulary, np.random.default_rng(0))
    special = [vocabulary.pad_id, vocabulary.unk_id, vocabulary.cls_id, vocabulary.sep_id, vocabulary.mask_id]
    assert not np.isin(ids[chosen], special).any()
    assert (hidden == ids)[~chosen].all()
    ordinary = (mask == 1) & ~np.isin(ids, special)
    assert (chosen.sum(1) == np.maximum(1, np.rint(0.15 * ordinary.sum(1)))).all()
    masked = (hidden == vocabulary.mask_id)[chosen].mean()
    kept = (hidden == ids)[chosen].mean()
    assert masked == pytest.approx(0.8, abs=0.03)
    assert kept == pytest.approx(0.1, abs=0.03)
    again = mask_tokens(ids, mask, vocabulary, np.random.default_rng(0))
    assert (again[0] == hidden).all()


def test_an_epoch_has_each_line_once_in_batches_of_similar_length() -> None:
    lengths = np.random.default_rng(0).integers(3, 60, 1000)
    batches = epoch(lengths, 32, np.random.default_rng(1))
    assert sorted(np.concatenate(batches).tolist()) == list(range(1000))
    padded = sum(int(lengths[b].max()) * len(b) for b in batches)
    assert padded < 1.1 * lengths.sum()


def test_held_out_lines_are_not_trained_on(material: tuple[TokenCorpus, Vocabulary]) -> None:
    corpus, _ = material
    training, held_out = split_held_out(corpus, np.random.default_rng(0))
    assert (len(training), len(held_out)) == (1425, 75)
    assert len(training.tokens) + len(held_out.tokens) == len(corpus.tokens)


# ---- the stages ----------------------------------------------------------------------------------------------------


def test_transfer_moves_only_the_layers_up_to_the_current_one(material: tuple[TokenCorpus, Vocabulary]) -> None:
    corpus, vocabulary = material
    config = fitted(SMALL, vocabulary)
    deep = config.with_changes(num_hidden_layers=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = PreTrainingModel(deep).eval()
        teacher = PreTrainingModel(fitted(SMALL_TEACHER, vocabulary).with_changes(num_hidden_layers=3)).eval()
    before = {k: v.clone() for k, v in student.state_dict().items()}
    batches = masked_batches(corpus, vocabulary, 16, np.random.default_rng(0))
    losses = transfer_layer(student, teacher, 1, batches, 5, dataclasses.replace(QUICK, optimizer="lamb"))
    moved = {k for k, v in student.state_dict().items() if not torch.equal(v, before[k])}
    assert len(losses) == 5
    assert {k.split(".")[3] for k in moved} == {"0", "1"}
    assert all(k.startswith("mobilebert.encoder.layer.") for k in moved)

    def change(layer: int) -> float:
        name = f"mobilebert.encoder.layer.{layer}.attention.self.value.weight"
        return float((student.state_dict()[name] - before[name]).norm() / before[name].norm())

    assert change(0) == pytest.approx(0.1 * change(1), rel=0.35)  # a tenth of the rate


def test_a_loss_that_is_not_finite_stops_with_stage_and_step(material: tuple[TokenCorpus, Vocabulary]) -> None:
    corpus, vocabulary = material
    model = PreTrainingModel(fitted(SMALL, vocabulary))
    batches = masked_batches(corpus, vocabulary, 8, np.random.default_rng(0))
    hopeless = dataclasses.replace(QUICK, teacher_rate=1e30, warm_up=0.0)
    with pytest.raises(DistillationError, match=r"teacher: the loss is .* at step \d+ of 400; use a lower rate"):
        train_masked(model, batches, hopeless)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"num_hidden_layers": 3}, "num_hidden_layers is 2 and the teacher's is 3"), ({"hidden_size": 48}, "hidden_size")],
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
    with pytest.raises(DistillationError, match="25 steps are too few; 24 layers need at least 26"):
        schedule.scaled(25, layers=24)
    with pytest.raises(DistillationError, match="batch_size is 0"):
        dataclasses.replace(schedule, batch_size=0)


@pytest.mark.slow
def test_a_distilled_student_follows_its_teacher_and_beats_one_that_never_had_a_teacher(
    material: tuple[TokenCorpus, Vocabulary],
) -> None:
    corpus, vocabulary = material
    student, teacher = fitted(SMALL, vocabulary), fitted(SMALL_TEACHER, vocabulary)
    seen: list[tuple[str, int, int]] = []
    state = torch.get_rng_state()
    watch = lambda stage, step, steps, loss: seen.append((stage, step, steps))  # noqa: E731
    result = distill(student, teacher, corpus, vocabulary, QUICK, 0, watch)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(seen) == QUICK.steps
    assert seen[-1] == ("distillation", 200, 200)
    assert list(result.losses) == ["teacher", "transfer/1", "transfer/2", "distillation"]
    for stage in ("transfer/1", "transfer/2"):
        assert np.mean(result.losses[stage][-10:]) < 0.75 * result.losses[stage][0]

    training, held_out = split_held_out(corpus, np.random.default_rng(0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        alone = PreTrainingModel(student)
        batches = masked_batches(training, vocabulary, QUICK.batch_size, np.random.default_rng(1))
        train_masked(alone, batches, dataclasses.replace(QUICK, teacher_steps=QUICK.distillation_steps))
    without = score_masked(alone, held_out, vocabulary, 0)
    scores = result.scores
    assert scores["student"].loss < scores["student before"].loss
    assert scores["student"].loss < without.loss  # the same steps on the same text, without a teacher
    assert scores["student"].loss < scores["teacher"].loss + 0.1


def test_the_same_seed_gives_the_same_student_to_the_last_bit(material: tuple[TokenCorpus, Vocabulary]) -> None:
    corpus, vocabulary = material
    student, teacher = fitted(SMALL, vocabulary), fitted(SMALL_TEACHER, vocabulary)
    short = QUICK.scaled(20, layers=2)
    first, second, other = (distill(student, teacher, corpus, vocabulary, short, seed) for seed in (3, 3, 4))
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
    report = pipeline.distill([text], "nano", tmp_path / "student", steps=20, seed=1, overrides=overrides)
    checkpoint = load(tmp_path / "student")
    assert checkpoint.config.hidden_size == 32
    assert checkpoint.config.vocab_size == len(checkpoint.vocabulary)
    assert report["schedule"]["batch_size"] == 8
    assert sum(report["schedule"][f"{stage}_steps"] for stage in ("teacher", "transfer", "distillation")) == 20
    assert set(report["scores"]) == {"teacher", "student before", "student transferred", "student"}
    card = (tmp_path / "student" / "README.md").read_text()
    assert report["corpus"]["sha256"] in card
    assert "seed 1" in card

    stored = pipeline.quantize(tmp_path / "student", tmp_path / "small")
    assert stored["bytes_after"] < stored["bytes_before"] / 2
    assert stored["bytes_after"] == (tmp_path / "small" / "model.safetensors").stat().st_size
    assert 0 < stored["mean_error"] < stored["largest_error"] < 0.05
    assert (tmp_path / "small" / "README.md").read_text() == card

    seen = pipeline.inspect(tmp_path / "small")
    assert seen["quantization"] == "int8"
    assert seen["parameters"] == sum(p.numel() for p in load_student(checkpoint).parameters())
    header = stored["bytes_after"] - seen["bytes"]["int8"]  # names, shapes and offsets of the safetensors file
    assert 0 < header < 20_000
    ids = torch.tensor([[2, 10, 11, 3]])
    exact, rounded = (
        load_student(load(tmp_path / name))(ids, torch.ones_like(ids)).last.detach() for name in ("student", "small")
    )
    assert float(F.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0)) > 0.999


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
        ({"corpus": [tmp_path / "none.txt"]}, CorpusError, "does not exist"),
        ({"overrides": {"schedule.teacher_rate": 1e30}, "steps": 60}, DistillationError, "teacher: the loss is"),
    ]
    for changes, error, said in cases:
        arguments = {"corpus": [text], "preset": "nano", "out": out, "steps": 10, **changes}
        with pytest.raises(error, match=said):
            pipeline.distill(**arguments)  # type: ignore[arg-type]
        assert [p.name for p in tmp_path.iterdir()] == ["corpus.txt"]
    with pytest.raises(CheckpointError, match="no quantization scheme 'int3'"):
        pipeline.quantize(out, out, "int3")
