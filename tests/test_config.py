"""Configurations: what is accepted, and the sentence that refuses the rest."""

from __future__ import annotations

from typing import Any

import pytest

from pocketfed.model.config import STUDENTS, TEACHERS, ConfigError, MobileBertConfig, preset


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"num_hidden_layers": 10**9}, "at most 1024"),
        ({"intra_bottleneck_size": 130}, "130 is not divisible by num_attention_heads 4"),
        ({"hidden_act": "swish"}, "hidden_act is 'swish'"),
        ({"normalization_type": "batch_norm"}, "choose one of no_norm, layer_norm"),
        ({"mask_style": None}, "mask_style is None"),
        ({"trigram_input": "yes"}, "trigram_input is 'yes'; it must be true or false"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob is 1.0"),
        ({"attention_probs_dropout_prob": "0.1"}, "attention_probs_dropout_prob is '0.1'"),
        ({"initializer_range": 0}, "initializer_range is 0"),
    ],
)
def test_a_bad_value_is_refused_in_one_sentence_that_names_it(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        MobileBertConfig(**changes)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_an_unknown_preset_is_answered_with_the_nearest_and_the_list() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'mobilebert'.*nano") as refusal:
        preset("mobilbert")
    assert "micro" in str(refusal.value)


@pytest.mark.parametrize("name", STUDENTS)
def test_a_config_survives_its_dictionary_and_ignores_the_keys_of_others(name: str) -> None:
    config = STUDENTS[name]
    assert MobileBertConfig.from_dict({**config.to_dict(), "transformers_version": "5.0"}) == config


@pytest.mark.parametrize("name", STUDENTS)
def test_a_teacher_is_wider_inside_and_as_wide_between_blocks(name: str) -> None:
    student, teacher = STUDENTS[name], TEACHERS[name]
    assert teacher.intra_bottleneck_size > teacher.hidden_size == student.hidden_size
    assert teacher.num_hidden_layers == student.num_hidden_layers
    assert teacher.num_attention_heads == student.num_attention_heads
    assert teacher.normalization_type == "layer_norm"
