"""`pocketfed advise`: real trials on the demo's data, and a choice that follows from what they measured."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from pocketfed.model.tasks import read_dataset
from pocketfed.simulations.advise import (
    CANDIDATES,
    Advice,
    AdviseConfig,
    AdviseError,
    Candidate,
    Limits,
    _fitting_sets,
    _in_a_process,
    _split,
    advise,
    choose,
    standard_error,
)

SHORT = ("--model", "nano", "--examples", 150, "--steps", 20, "--rates", "1e-3,1e-2", "--devices", 6)


def pocketfed(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command, through its own entry point."""
    from pocketfed.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["pocketfed", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    return int(ended.value.code or 0), out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's: 240 utterances of 6 users, and a test of others."""
    from pocketfed.simulations.data import assistant_dataset, write_dataset

    folder = tmp_path_factory.mktemp("advise") / "data"
    write_dataset(assistant_dataset(seed=1, users=6, utterances_per_user=40, test_utterances=50), folder)
    return folder


@pytest.fixture(scope="module")
def told(data: Path) -> dict[str, Any]:
    """The JSON of a trial of two sets."""
    code, out, err = pocketfed("advise", "--data", data, *SHORT, "--sets", "full,head", "--json")
    assert (code, err) == (0, "")
    found: dict[str, Any] = json.loads(out)
    return found


def candidate(
    name: str, accuracy: float, update_bytes: int = 1000, peak_mb: float = 100, cpu_s: float = 1
) -> Candidate:
    """Of a trial with 98 examples held out."""
    error = standard_error(accuracy, 98)
    return Candidate(name, update_bytes // 4, accuracy, error, 1e-3, cpu_s, cpu_s / 2, peak_mb, update_bytes)


THREE = (
    candidate("small", 0.60, update_bytes=1000, peak_mb=80, cpu_s=1),
    candidate("middle", 0.86, update_bytes=20_000, peak_mb=90, cpu_s=4),
    candidate("large", 0.88, update_bytes=900_000, peak_mb=200, cpu_s=2),
)


def test_a_trial_reports_every_set_in_the_order_asked_for(told: dict[str, Any]) -> None:
    assert [c["trainable_set"] for c in told["candidates"]] == ["full", "head"]
    assert told["train_examples"] + told["held_out_examples"] == 150
    assert told["round_examples"] == 40  # 240 among 6
    for c in told["candidates"]:
        right = c["accuracy"] * told["held_out_examples"]
        assert right == pytest.approx(round(right), abs=1e-6)
        assert c["standard_error"] == standard_error(c["accuracy"], told["held_out_examples"])
        assert c["learning_rate"] in (1e-3, 1e-2)
        assert c["later_round_cpu_s"] > 0
        assert c["first_round_cpu_s"] > 0
        assert 4 * c["parameters"] < c["update_bytes"] <= 4 * c["parameters"] + 4096


def test_the_head_costs_less_than_the_whole_model_in_all_respects(told: dict[str, Any]) -> None:
    full, head = told["candidates"]
    assert head["update_bytes"] < full["update_bytes"] / 10
    assert head["later_round_cpu_s"] < full["later_round_cpu_s"]
    assert head["later_round_cpu_s"] < head["first_round_cpu_s"]  # the frozen part is computed once
    assert head["peak_mb"] < full["peak_mb"]


def test_memory_is_that_of_a_device_which_has_no_torch(told: dict[str, Any]) -> None:
    assert all(30 < c["peak_mb"] < 180 for c in told["candidates"])  # importing torch alone takes more


def test_the_choice_follows_from_what_was_measured(told: dict[str, Any]) -> None:
    measured = [Candidate(**c) for c in told["candidates"]]
    assert (told["choice"], told["why"]) == choose(measured, Limits())


def test_the_same_seed_gives_the_same_accuracy_and_no_memory_gives_no_choice(data: Path, told: dict[str, Any]) -> None:
    config = AdviseConfig(
        data, "nano", ("head",), Limits(memory_mb=20), 6, examples=150, steps=20, rates=(1e-3, 1e-2)
    )  # fmt: skip
    steps: list[str] = []
    found = advise(config, steps.append)
    assert found.candidates[0].accuracy == told["candidates"][1]["accuracy"]
    assert found.choice is None
    assert "the nearest is head" in found.why
    assert "(20 allowed)" in found.why
    assert not found.candidates[0].in_parts
    assert steps == ["reading the data", "trying head, 1 of 1"]


def test_too_large_a_batch_is_measured_in_parts_below_the_limit(data: Path) -> None:
    free = AdviseConfig(data, "nano", ("full",), devices=1, examples=240, steps=1, rates=(1e-3,), batch_size=160)
    peak = advise(free).candidates[0].peak_mb
    limit = Limits(memory_mb=peak - 15)
    (full,) = advise(AdviseConfig(**{**free.__dict__, "limits": limit})).candidates
    assert full.in_parts
    assert full.peak_mb < peak - 15


def test_the_trial_sees_training_examples_only_and_measures_on_none_it_trained_on(data: Path) -> None:
    dataset = read_dataset(data)
    trial = _split(dataset, AdviseConfig(data, examples=150, seed=3))
    assert (len(trial.train) + len(trial.test), trial.labels) == (150, dataset.labels)
    trained, held_out = {id(e) for e in trial.train}, {id(e) for e in trial.test}
    assert not trained & held_out
    assert trained | held_out <= {id(e) for e in dataset.train}


def test_the_more_accurate_set_wins_but_a_tie_goes_to_the_smaller_update() -> None:
    choice, why = choose(THREE, Limits())
    assert choice == "middle"  # .86 is within .033 of .88
    assert "0.860 against 0.880, 20 kB against 900" in why
    apart = (THREE[0], candidate("middle", 0.84, 20_000), THREE[2])
    assert choose(apart, Limits())[0] == "large"
    assert choose(THREE[:1], Limits()) == ("small", "small is the only set tried")


@pytest.mark.parametrize(
    ("limits", "choice"),
    [
        (Limits(update_kb=1), "small"),
        (Limits(memory_mb=85), "small"),
        (Limits(cpu_s=3), "large"),
        (Limits(cpu_s=3, update_kb=100), "small"),
        (Limits(memory_mb=200, update_kb=900, cpu_s=4), "middle"),
    ],
)
def test_limits_choose(limits: Limits, choice: str) -> None:
    assert choose(THREE, limits)[0] == choice


def test_impossible_limits_name_the_nearest_and_what_it_needs() -> None:
    choice, why = choose(THREE, Limits(memory_mb=60, update_kb=500))
    assert choice is None
    assert why == "no set stays within the limits; the nearest is small, which needs 80 MB of memory (60 allowed)"


def test_no_trial_however_lucky_is_certain() -> None:
    assert standard_error(1.0, 98) == pytest.approx(0.00995, abs=1e-5)  # sqrt(.99 * .01 / 100)


def test_by_default_those_sets_are_tried_that_the_model_is_deep_enough_for() -> None:
    assert _fitting_sets("micro") == CANDIDATES  # 4 blocks
    assert _fitting_sets("nano") == tuple(s for s in CANDIDATES if s != "lora:8@2")  # of 2 blocks: that is lora:8


def test_the_document_names_the_candidates_and_every_kind_of_set() -> None:
    from pocketfed.model.adapters import _FORMS

    document = (Path(__file__).parents[1] / "docs" / "choosing.md").read_text()
    assert f"`{', '.join(CANDIDATES)}`" in document
    assert [kind for kind in _FORMS if f"`{kind}" not in document] == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--memory", 0), "the limit on memory is 0"),
        (("--bytes", -3), "the limit on bytes is -3"),
        (("--time", "nan"), "the limit on time is nan"),
        (("--sets", "head,lore:8"), "there is no trainable set 'lore:8'"),
        (("--sets", "head,last:3"), "'last:3' asks for 3 blocks"),
        (("--sets", "head,head"), "the set 'head' is there twice"),
        (("--rates", "fast"), "--rates 'fast'"),
        (("--rates", "-1"), "learning_rate is -1"),
        (("--rates", ""), "no learning rate"),
        (("--model", "milli"), "milli"),
    ],
)
def test_a_mistake_is_one_sentence(data: Path, words: tuple[object, ...], sentence: str) -> None:
    code, _, err = pocketfed("advise", "--data", data, *SHORT, *words)
    assert code == 1
    assert sentence in err
    assert err.count("\n") == 1
    assert "unexpected" not in err


def test_the_table_says_what_was_measured_how_sure_it_is_and_what_to_choose(told: dict[str, Any]) -> None:
    from pocketfed.cli.advise import _show

    candidates = tuple(Candidate(**c) for c in told["candidates"])
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        _show(Advice(**{**told, "candidates": candidates}), epochs=2)
    lines = shown.getvalue()
    for c in candidates:
        assert f"{c.trainable_set} " in lines
        assert f"{c.accuracy:.3f} ± {c.standard_error:.3f}" in lines
    assert "2 epochs over a device's 40 examples" in lines
    assert "examples a label are few" in lines  # about 100 of 20 labels
    assert f"choice: {told['choice']}\n{told['why']}" in lines


def test_data_that_is_not_there_or_too_little_is_one_sentence(tmp_path: Path) -> None:
    code, _, err = pocketfed("advise", "--data", tmp_path / "none", *SHORT)
    assert (code, err.count("\n")) == (1, 1)
    assert str(tmp_path / "none") in err
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps({"text": f"say {i}", "label": str(i)}) + "\n" for i in range(2)))
    (tmp_path / "both").mkdir()
    for split in ("train", "test"):
        (tmp_path / "both" / f"{split}.jsonl").write_bytes(few.read_bytes())
    code, _, err = pocketfed("advise", "--data", tmp_path / "both", *SHORT)
    assert (code, err.count("\n")) == (1, 1)
    assert "has 2 training examples" in err


def test_a_trial_that_fails_says_why(tmp_path: Path) -> None:
    (tmp_path / "trial.json").write_text("{}")
    with pytest.raises(AdviseError, match="the trial of head ended with 1"):
        _in_a_process([str(tmp_path / "gone"), "0" * 64, "head", "0", "accuracy"], tmp_path)
