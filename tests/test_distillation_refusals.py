"""What `pocketfed distill` is given and cannot use: refused in one sentence, before training, and nothing is left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pocketfed.coordinator.distilling import DistillOptions, distill
from pocketfed.model.checkpoints import CheckpointError, save_folder
from pocketfed.model.config import STUDENTS, TEACHERS, ConfigError
from pocketfed.model.corpus import CorpusError
from pocketfed.model.mobilebert import MobileBert
from pocketfed.model.schedules import DistillationError
from pocketfed.model.teacher import PreTrainingModel, save_pretrained
from pocketfed.model.tokenization import SPECIAL_TOKENS, Vocabulary

VOCABULARY = Vocabulary((*SPECIAL_TOKENS, "the", "cat", "dog", "sleeps", *"abcdefghij"))
LINES = "\n".join(f"the {a} sleeps {b} {c}" for a in ("cat", "dog") for b in "abcde" for c in "fghij")


def refused(tmp_path: Path, error: type[Exception], said: str, content: bytes = LINES.encode(), **more: Any) -> None:
    """Distilling from that content fails with that sentence and leaves what there was."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=said) as refusal:
        distill([corpus], "nano", tmp_path / "student", steps=10, **more)
    assert "\n" not in str(refusal.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds 0 distinct sentences"),
        (b"the cat sleeps\n", "holds 1 distinct sentences of two words or more; pre-training needs at least 20"),
        (b"\x7fELF\x02\x01\x00\x00" * 500, "holds NUL bytes, so it is not text"),
        (bytes(range(128, 256)) * 50, "is not UTF-8 text"),
    ],
)
def test_text_that_is_none(tmp_path: Path, content: bytes, said: str) -> None:
    refused(tmp_path, CorpusError, said, content)


def test_a_vocabulary_that_covers_nothing(tmp_path: Path) -> None:
    Vocabulary((*SPECIAL_TOKENS, "ж", "щ")).save(tmp_path / "vocab.txt")
    refused(tmp_path, CorpusError, "has no sentence of known tokens", overrides={"vocabulary": tmp_path / "vocab.txt"})


def kept_teacher(folder: Path, **changes: Any) -> DistillOptions:
    sizes = {"vocab_size": len(VOCABULARY), **changes}
    save_pretrained(PreTrainingModel(TEACHERS["nano"].with_changes(**sizes)), VOCABULARY, folder)
    return DistillOptions(teacher=folder)


def test_a_teacher_with_another_vocabulary_than_it_was_trained_with(tmp_path: Path) -> None:
    options = kept_teacher(tmp_path / "teacher")
    other = Vocabulary((*SPECIAL_TOKENS, *reversed(VOCABULARY.tokens[5:])))
    other.save(tmp_path / "vocab.txt")
    said = r"vocab\.txt is not the vocabulary of .*teacher, whose teacher would read other words; leave it out"
    refused(tmp_path, ConfigError, said, options=options, overrides={"vocabulary": tmp_path / "vocab.txt"})
    Vocabulary(VOCABULARY.tokens[:-1]).save(tmp_path / "teacher" / "vocab.txt")
    refused(
        tmp_path, CheckpointError, "the vocabulary has 18 tokens and the config's vocab_size is 19", options=options
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"num_hidden_layers": 3},
            "the student has 2 layers and the teacher 3; give the student as many, or a divisor",
        ),
        ({"num_attention_heads": 2}, "the student's num_attention_heads is 4 and the teacher's is 2"),
        ({"hidden_size": 48}, "the student's hidden_size is 64 and the teacher's is 48"),
    ],
)
def test_a_teacher_whose_layers_heads_or_widths_do_not_match(
    tmp_path: Path, changes: dict[str, int], said: str
) -> None:
    refused(tmp_path, DistillationError, said, options=kept_teacher(tmp_path / "teacher", **changes))


def test_a_teacher_that_is_given_and_described_as_another(tmp_path: Path) -> None:
    options = kept_teacher(tmp_path / "teacher")
    said = r"teacher\.intermediate_size is set and the teacher is given"
    refused(tmp_path, ConfigError, said, options=options, overrides={"teacher.intermediate_size": 12})


@pytest.mark.parametrize("place", ["keep_teacher", "keep_heads", "teacher"])
def test_a_folder_for_two_models(tmp_path: Path, place: str) -> None:
    options = DistillOptions(**{place: tmp_path / "." / "student"})
    refused(
        tmp_path,
        ConfigError,
        "student is named for two models, and one would replace the other",
        options=options,
    )
    assert not (tmp_path / "student").exists()


def test_a_teacher_of_another_kind_of_model(tmp_path: Path) -> None:
    options = kept_teacher(tmp_path / "teacher")
    path = tmp_path / "teacher" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "roberta"}))
    refused(tmp_path, CheckpointError, "describes a 'roberta'; only mobilebert or bert can be read", options=options)


def test_sequences_longer_than_the_model_has_positions(tmp_path: Path) -> None:
    said = r"schedule\.max_length is 513 and the student has 512 positions; shorten it"
    changes = {"max_position_embeddings": 512, "schedule.max_length": 513}
    refused(tmp_path, ConfigError, said, overrides=changes)
    model = MobileBert(STUDENTS["nano"].with_changes(vocab_size=8, max_position_embeddings=512))
    ids = torch.ones(1, 513, dtype=torch.int64)
    with pytest.raises(ValueError, match="a sequence of 513 tokens is longer than the model's 512 positions; cut it"):
        model(ids, torch.ones_like(ids))
    assert model(ids[:, :512], torch.ones_like(ids)[:, :512]).last.shape == (1, 512, 64)


@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_texts_too_short_to_learn_from(tmp_path: Path, length: int) -> None:
    said = (
        rf"max_length is {length} and texts of so few tokens teach nothing, three being special; set at least 8, or 0"
    )
    refused(tmp_path, DistillationError, said, overrides={"schedule.max_length": length})
    said = rf"max_position_embeddings is {length} and texts of so few tokens teach nothing; set at least 8"
    refused(tmp_path, ConfigError, said, overrides={"max_position_embeddings": length})


def test_a_vocabulary_that_is_not_there(tmp_path: Path) -> None:
    said = r"there is no vocabulary at nothere\.txt; give a vocab\.txt"
    refused(tmp_path, ConfigError, said, overrides={"vocabulary": "nothere.txt"})


@pytest.mark.parametrize("device", ["tpu", "cuda:x", ""])
def test_a_device_of_an_unknown_kind_is_refused_before_the_text_is_read(tmp_path: Path, device: str) -> None:
    said = rf"the device '{device}' is not known; choose one of cpu, cuda"
    refused(tmp_path, DistillationError, said, content=b"", options=DistillOptions(device=device))


def test_a_teacher_that_is_a_student_without_heads(tmp_path: Path) -> None:
    student = MobileBert(STUDENTS["nano"].with_changes(vocab_size=len(VOCABULARY)))
    save_folder(tmp_path / "teacher", student.config, student.state_dict(), VOCABULARY)
    said = "teacher has no pre-training heads, as a student has none; a teacher needs its pre-training heads"
    refused(tmp_path, CheckpointError, said, options=DistillOptions(teacher=tmp_path / "teacher"))


@pytest.mark.parametrize("stage", ["teacher", "transfer", "distillation"])
def test_a_rate_whose_very_last_update_spoils_the_weights(tmp_path: Path, stage: str) -> None:
    changes = {f"schedule.{stage}_rate": 1e30, "schedule.warm_up": 0, "schedule.phase_warm_up": 0}
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(LINES)
    with pytest.raises(DistillationError, match=rf"{stage}.*the loss is .* at step 1 of .*use a lower rate"):
        distill([corpus], "nano", tmp_path / "student", steps=4, overrides=changes)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.txt"]
