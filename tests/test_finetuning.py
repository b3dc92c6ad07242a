"""A student is fine-tuned on tasks of several kinds; trials are repeated with seeds and not done twice."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pocketfed.model.config import STUDENTS
from pocketfed.model.finetuning import FineTuningError, Recipe, batches, fine_tune, make_model, predict
from pocketfed.model.supervision import IGNORED, Classification, Encoded, Regression, Tagging, kind_of
from pocketfed.model.tasks import DataError, Dataset, Example
from pocketfed.model.tfidf import features, fit
from pocketfed.model.tokenization import SPECIAL_TOKENS, Tokenizer, Vocabulary
from pocketfed.model.trial_rows import best_metric, data_digest, floor, floor_rows, markdown, read_rows
from pocketfed.model.trials import Plan, Start, run_trials, untrained

WORDS = ("red", "green", "blue", "one", "two", "three", "##s", "paris", "oslo", "in", "went", "to", "big", "city")
VOCABULARY = Vocabulary((*SPECIAL_TOKENS, *WORDS))
TOKENIZER = Tokenizer(VOCABULARY)
TINY = STUDENTS["nano"].with_changes(
    vocab_size=len(VOCABULARY), hidden_size=32, intermediate_size=32, intra_bottleneck_size=16, embedding_size=16
)
RECIPE = Recipe(epochs=6, batch_size=8, learning_rate=1e-2, max_length=16)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def colours(count: int, seed: int) -> tuple[Example, ...]:
    """Sentences of numbers, labelled by the one colour in each."""
    drawn = np.random.Generator(np.random.PCG64(seed))
    made = []
    for _ in range(count):
        words = [str(w) for w in drawn.choice(["one", "two", "three"], size=int(drawn.integers(1, 6)))]
        colour = str(drawn.choice(["red", "green", "blue"]))
        words.insert(int(drawn.integers(0, len(words) + 1)), colour)
        made.append(Example(" ".join(words), colour))
    return tuple(made)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    labels = ("blue", "green", "red")
    return Dataset("colours", colours(96, 1), colours(24, 2), colours(24, 3), labels, {})


@pytest.fixture
def start() -> Start:
    return Start("tiny", TINY, {}, VOCABULARY)


# --- rows and batches -----------------------------------------------------------------------------------------------


def test_every_example_is_in_one_batch_of_texts_of_similar_length() -> None:
    lengths = np.random.Generator(np.random.PCG64(0)).integers(3, 60, size=1000)
    cut = list(batches(lengths, 16, seed=0, epoch=0))
    assert sorted(np.concatenate(cut)) == list(range(1000))
    assert sum(len(rows) != 16 for rows in cut) <= 2, "one batch a pool may be short"
    padded = sum(int(lengths[rows].max()) * len(rows) for rows in cut)
    assert padded / lengths.sum() < 1.1, "less than a tenth is padding"
    again, other = (list(batches(lengths, 16, seed, epoch=0)) for seed in (0, 1))
    assert all((a == b).all() for a, b in zip(cut, again, strict=True))
    assert any(len(a) != len(b) or (a != b).any() for a, b in zip(cut, other, strict=True))


def test_rows_are_padded_to_the_longest_of_their_batch() -> None:
    kind = Classification(("blue", "green", "red"))
    encoded = kind.encode([Example("one red", "red"), Example("two two two blue", "blue")], TOKENIZER, 16)
    ids, mask, targets = encoded.take([1, 0])
    assert mask.tolist() == [[1] * 6, [1] * 4 + [0] * 2]
    assert ids[1].tolist() == [2, 8, 5, 3, 0, 0]  # [CLS] one red [SEP] [PAD] [PAD]
    assert targets.tolist() == [0, 2]


def test_the_first_piece_of_a_word_carries_its_tag() -> None:
    kind = Tagging(("B-L", "O"))
    example = Example(
        "went to oslos ½ paris", words=("went", "to", "oslos", "\u200b", "paris"), tags=("O", "O", "B-L", "O", "B-L")
    )
    encoded = kind.encode([example], TOKENIZER, 16)
    ids, _, targets = encoded.take([0])
    assert [VOCABULARY.tokens[i] for i in ids[0]] == ["[CLS]", "went", "to", "oslo", "##s", "[UNK]", "paris", "[SEP]"]
    assert targets[0].tolist() == [IGNORED, 1, 1, 0, IGNORED, 1, 0, IGNORED]
    right = np.zeros((8, 2), np.float32)
    right[[3, 6], 0], right[[1, 2, 5], 1], right[4, 0] = 1, 1, 9  # what is said of a later piece is not heard
    assert kind.score([right], encoded)["f1"] == 1.0


def test_words_that_are_cut_off_count_as_outside() -> None:
    kind = Tagging(("B-L", "O"))
    example = Example("paris to oslo", words=("paris", "to", "oslo"), tags=("B-L", "O", "B-L"))
    encoded = kind.encode([example], TOKENIZER, 4)
    assert encoded.lengths.tolist() == [4]  # [CLS] paris to [SEP]
    outputs = np.array([[0, 0], [1, 0], [0, 1], [0, 0]], np.float32)
    assert kind.score([outputs], encoded)["recall"] == 0.5


# --- training -------------------------------------------------------------------------------------------------------


def test_a_student_learns_to_classify_and_the_best_epoch_on_dev_is_kept(dataset: Dataset) -> None:
    kind = kind_of(dataset)
    train, dev = (kind.encode(part, TOKENIZER, 16) for part in (dataset.train, dataset.dev))
    model = make_model(TINY, {}, VOCABULARY.sep_id, kind, seed=0)
    tuned = fine_tune(model, kind, train, RECIPE, seed=0, dev=dev, metric="accuracy")
    assert len(tuned.losses) == len(tuned.dev) == 6
    assert tuned.losses[-1] < 0.3 < tuned.losses[0]
    reached = [scores["accuracy"] for scores in tuned.dev]
    assert tuned.epoch == reached.index(max(reached)) + 1
    kept = kind.score(predict(model, dev), dev)
    assert kept["accuracy"] == max(reached) > 0.9
    once_more = make_model(TINY, {}, VOCABULARY.sep_id, kind, seed=0)
    assert fine_tune(once_more, kind, train, RECIPE, seed=0).losses == tuned.losses, "looking at dev changes no bit"


def test_a_student_learns_a_number(dataset: Dataset) -> None:
    value = {"blue": 10.0, "green": 20.0, "red": 60.0}
    scored = tuple(dataclasses.replace(e, label=None, score=value[e.label or ""]) for e in dataset.train)
    kind = kind_of(dataclasses.replace(dataset, train=scored, labels=(), kind="regression"))
    assert isinstance(kind, Regression)
    encoded = kind.encode(scored, TOKENIZER, 16)
    model = make_model(TINY, {}, VOCABULARY.sep_id, kind, seed=0)
    before = kind.score(predict(model, encoded), encoded)
    fine_tune(model, kind, encoded, RECIPE, seed=0)
    after = kind.score(predict(model, encoded), encoded)
    assert abs(before["pearson"]) < 0.7 < 0.9 < after["pearson"]
    assert after["mse"] < 0.2 * before["mse"], "the spread of the scores is about 22"


def test_of_an_error_the_least_is_chosen(dataset: Dataset, start: Start) -> None:
    value = {"blue": 10.0, "green": 20.0, "red": 60.0}

    def scored(part: tuple[Example, ...]) -> tuple[Example, ...]:
        return tuple(dataclasses.replace(e, label=None, score=value[e.label or ""]) for e in part)

    numbers = Dataset(
        "numbers", scored(dataset.train), scored(dataset.dev), scored(dataset.test), (), {}, kind="regression"
    )
    plan = Plan(dataclasses.replace(RECIPE, epochs=2), space={"learning_rate": (1e-6, 1e-2)})
    slow, fast, final = run_trials(best_metric(numbers, "mse"), [start], plan)
    assert fast["dev"]["mse"] < slow["dev"]["mse"]
    assert final["learning_rate"] == 1e-2
    kind = kind_of(numbers)
    train, dev = (kind.encode(part, TOKENIZER, 16) for part in (numbers.train, numbers.dev))
    model = make_model(TINY, {}, VOCABULARY.sep_id, kind, seed=0)
    tuned = fine_tune(model, kind, train, RECIPE, seed=0, dev=dev, metric="mse")
    errors = [scores["mse"] for scores in tuned.dev]
    assert tuned.epoch == errors.index(min(errors)) + 1
    assert min(errors) < max(errors)


def test_a_student_learns_to_tag() -> None:
    drawn = np.random.Generator(np.random.PCG64(0))
    made = []
    for _ in range(96):
        words = tuple(str(w) for w in drawn.choice(["paris", "oslo", "went", "to", "in", "big", "city"], size=5))
        made.append(
            Example(" ".join(words), words=words, tags=tuple("B-L" if w in ("paris", "oslo") else "O" for w in words))
        )
    kind = Tagging(("B-L", "O"))
    encoded = kind.encode(made, TOKENIZER, 16)
    model = make_model(TINY, {}, VOCABULARY.sep_id, kind, seed=0)
    fine_tune(model, kind, encoded, RECIPE, seed=0)
    assert kind.score(predict(model, encoded), encoded)["f1"] > 0.95


def test_a_loss_that_diverges_is_told_with_the_step_and_the_remedy(dataset: Dataset) -> None:
    kind = kind_of(dataset)
    encoded = kind.encode(dataset.train, TOKENIZER, 16)
    model = make_model(TINY, {}, VOCABULARY.sep_id, kind, seed=0)
    wild = dataclasses.replace(RECIPE, learning_rate=1e30)
    with pytest.raises(FineTuningError, match=r"the loss is (nan|inf) at step \d+ of 72; use a lower learning rate"):
        fine_tune(model, kind, encoded, wild, seed=0)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"epochs": 0}, "epochs is 0; it must be at least 1"),
        ({"learning_rate": float("nan")}, "learning_rate is nan; it must be a positive number"),
        ({"precision": "float16"}, "precision is 'float16'; choose one of float32, bfloat16"),
        ({"device": "gpu"}, "device is 'gpu'; choose one of cpu, cuda, mps"),
        ({"warm_up": 1.0}, "warm_up is 1.0; it must be at least 0 and less than 1"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(FineTuningError, match=says):
        Recipe(**settings)


def test_half_the_bits_give_nearly_the_same_student(dataset: Dataset) -> None:
    kind = kind_of(dataset)
    encoded = kind.encode(dataset.train, TOKENIZER, 16)
    model = make_model(TINY, {}, VOCABULARY.sep_id, kind, seed=0)
    fine_tune(model, kind, encoded, dataclasses.replace(RECIPE, precision="bfloat16"), seed=0)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert kind.score(predict(model, encoded), encoded)["accuracy"] > 0.9


def test_the_cpu_said_by_name_gives_the_same_bits_and_the_same_trial(dataset: Dataset, start: Start) -> None:
    recipe = dataclasses.replace(RECIPE, epochs=1)
    rows = [run_trials(dataset, [start], Plan(r))[0] for r in (recipe, dataclasses.replace(recipe, device="cpu"))]
    for row in rows:
        del row["cpu_seconds"]
    assert rows[0] == rows[1]
    assert rows[0]["device"] == "cpu"


def test_on_an_accelerator_a_student_learns_the_same_and_is_another_trial(dataset: Dataset, start: Start) -> None:
    place = next((name for name in ("cuda", "mps") if name in accelerators()), None)
    if place is None:
        pytest.skip("there is no accelerator here")
    recipe = dataclasses.replace(RECIPE, epochs=4)
    rows = [run_trials(dataset, [start], Plan(dataclasses.replace(recipe, device=d)))[0] for d in ("cpu", place)]
    assert rows[0]["key"] != rows[1]["key"]
    assert rows[1]["losses"] == pytest.approx(rows[0]["losses"], rel=0.1)
    assert rows[1]["test"]["accuracy"] > 0.9


def accelerators() -> set[str]:
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return {name for name, here in there.items() if here}


# --- out of scope ---------------------------------------------------------------------------------------------------


def test_the_threshold_below_which_a_text_is_out_of_scope_is_the_best_on_dev() -> None:
    kind = Classification(("a", "b"), outside="oos")
    # sure of a by 3, of b by 2, of a by 1 (oos), of b by 0.5 (oos), of a by 0.2 (right): one mistake is the best there is
    logits = [np.array(row, np.float32) for row in ([3, 0], [0, 2], [1, 0], [0, 0.5], [0.2, 0])]
    expected = ("a", "b", "oos", "oos", "a")
    rows = Encoded(tuple(Example("x", y) for y in expected), np.zeros(0), np.zeros(6, np.int64), np.zeros(5))
    assert kind.score(logits, rows)["accuracy"] == 3 / 5
    fitted = kind.fitted(logits, rows)
    assert isinstance(fitted, Classification)
    between = [1 / (1 + np.exp(-margin)) for margin in (1, 2)]
    assert between[0] < fitted.threshold < between[1]
    scores = fitted.score(logits, rows)
    assert scores["accuracy"] == 4 / 5
    assert (scores["in_scope_accuracy"], scores["oos_recall"]) == (2 / 3, 1.0)


# --- trials ---------------------------------------------------------------------------------------------------------


def test_trials_are_rows_in_a_file_and_none_is_done_twice(dataset: Dataset, start: Start, tmp_path: Path) -> None:
    out, told = tmp_path / "rows.jsonl", []
    plan = Plan(dataclasses.replace(RECIPE, epochs=2), seeds=(0, 1))
    first = run_trials(dataset, [start], plan, out, lambda what, fraction: told.append(what))
    assert {"tiny, seed 0", "tiny, seed 1"} <= set(told)
    assert [(r["seed"], r["chosen_on"], r["test_examples"]) for r in first] == [(0, "dev", 24), (1, "dev", 24)]
    assert [json.loads(line) for line in out.read_text().splitlines()] == first
    with open(out, "a") as file:
        file.write('{"key": "cut short by a ki')
    told.clear()
    more = run_trials(dataset, [start], dataclasses.replace(plan, seeds=(0, 1, 2)), out, lambda w, f: told.append(w))
    assert more[:2] == first
    assert {what for what in told if "seed" in what} == {"tiny, seed 2"}
    assert read_rows(out) == more
    table = markdown(dataset, more)
    values = [row["test"]["accuracy"] for row in more]
    assert f"| tiny | 3 | {sum(values) / 3:.4f} ({min(values):.4f} to {max(values):.4f}) |" in table


def test_calls_seed_by_seed_end_in_the_table_of_one_call_with_all_seeds(
    dataset: Dataset, start: Start, tmp_path: Path
) -> None:
    plan = Plan(dataclasses.replace(RECIPE, epochs=1), seeds=(0, 1, 2))
    whole = run_trials(dataset, [start], plan, tmp_path / "whole.jsonl")
    out = tmp_path / "rows.jsonl"
    # Of other settings, another start and other data, and so of no other table.
    run_trials(dataset, [start, untrained("nano", start)], Plan(dataclasses.replace(RECIPE, epochs=2), (7,)), out)
    run_trials(
        dataclasses.replace(dataset, train=dataset.train[:40]), [start], dataclasses.replace(plan, seeds=(8,)), out
    )
    for seeds in ((2,), (0,), (1,)):
        told = run_trials(dataset, [start], dataclasses.replace(plan, seeds=seeds), out)
    assert [row["seed"] for row in told] == [0, 1, 2]
    assert markdown(dataset, told) == markdown(dataset, whole)


def test_rows_of_earlier_versions_keep_their_keys(dataset: Dataset, start: Start) -> None:
    odd = dataclasses.replace(
        dataset,
        train=(Example("a", "x", 'b"', fields={"c": "'"}, words=("a",), answers=(("b", 1),)), *dataset.train),
        further={"mismatched": dataset.dev[:1], "none": ()},
        skipped={"empty text": 2},
        outside="oos",
    )
    for some in (odd, dataset, dataclasses.replace(dataset, train=dataset.train[:1], test=())):
        assert data_digest(some) == hashlib.sha256(repr(some).encode()).hexdigest()
    later = dataclasses.make_dataclass("Example", [("hint", str, "")], bases=(Example,), frozen=True)
    same, other = (
        dataclasses.replace(dataset, train=(later("a", "x", hint=hint), *dataset.train)) for hint in ("", "b")
    )
    before = dataclasses.replace(dataset, train=(Example("a", "x"), *dataset.train))
    assert data_digest(same) == data_digest(before) != data_digest(other)
    # As today's command makes them: the digest of the data, that of the start, the settings, the seed, whether it searches.
    recipe = dataclasses.replace(RECIPE, epochs=1)
    settings = {"epochs": 1, "batch_size": 8, "learning_rate": 0.01, "warm_up": 0.1, "weight_decay": 0.01,
                "max_length": 16, "precision": "float32"}  # fmt: skip
    told = json.dumps([hashlib.sha256(repr(dataset).encode()).hexdigest(), start.digest(), settings, 3, False])
    (row,) = run_trials(dataset, [start], Plan(recipe, (3,)))
    assert row["key"] == hashlib.sha256(told.encode()).hexdigest()[:32]


def test_a_file_whose_first_row_was_cut_short_begins_anew(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    out.write_text('{"key": "cut short by a ki')
    assert read_rows(out) == []
    assert out.read_bytes() == b""


def test_other_data_another_student_or_another_setting_is_another_trial(
    dataset: Dataset, start: Start, tmp_path: Path
) -> None:
    plan = Plan(dataclasses.replace(RECIPE, epochs=1))
    fewer = dataclasses.replace(dataset, train=dataset.train[:40])
    other = untrained("nano", start)
    keys = set()
    for data, begin, how in (
        (dataset, start, plan),
        (fewer, start, plan),
        (fewer, other, plan),
        (fewer, start, dataclasses.replace(plan, recipe=dataclasses.replace(plan.recipe, learning_rate=1e-3))),
    ):
        keys |= {row["key"] for row in run_trials(data, [begin], how, tmp_path / "rows.jsonl")}
    assert len(keys) == 4
    assert (other.name, other.config.vocab_size) == ("nano, untrained", len(VOCABULARY))


def test_a_search_chooses_on_dev_and_every_seed_is_run_with_its_choice(dataset: Dataset, start: Start) -> None:
    plan = Plan(dataclasses.replace(RECIPE, epochs=2), (0, 1), {"learning_rate": (1e-6, 1e-2), "epochs": (1, 3)})
    rows = run_trials(dataset, [start], plan)
    search, final = ([row for row in rows if row["phase"] == phase] for phase in ("search", "final"))
    assert [(r["learning_rate"], r["epochs"]) for r in search] == [(1e-6, 1), (1e-6, 3), (1e-2, 1), (1e-2, 3)]
    assert "test" not in search[0], "the test split is not looked at while choosing"
    best = max(search, key=lambda row: row["dev"]["accuracy"])
    assert best["learning_rate"] == 1e-2
    assert {(r["learning_rate"], r["epochs"]) for r in final} == {(1e-2, best["epochs"])}


def test_without_a_dev_a_search_holds_out_a_tenth_of_train(dataset: Dataset, start: Start) -> None:
    whole = dataclasses.replace(dataset, dev=())
    rows = run_trials(whole, [start], Plan(dataclasses.replace(RECIPE, epochs=1), space={"learning_rate": (1e-3,)}))
    assert [(r["chosen_on"], r["train_examples"]) for r in rows] == [("held out", 87), ("last epoch", 96)]


def test_of_a_large_search_a_part_is_drawn() -> None:
    plan = Plan(Recipe(), space={"epochs": (1, 2, 3, 4, 5), "batch_size": (16, 32)}, at_most=3)
    drawn = [(r.epochs, r.batch_size) for r in plan.candidates()]
    assert len(set(drawn)) == 3
    assert drawn == sorted(drawn)
    assert drawn == [(r.epochs, r.batch_size) for r in plan.candidates()]


def test_the_floor_is_the_commonest_label_of_train(dataset: Dataset) -> None:
    lopsided = dataclasses.replace(dataset, train=(*dataset.train, *[Example("red", "red")] * 100))
    share = sum(e.label == "red" for e in dataset.test) / len(dataset.test)
    assert floor(lopsided)["accuracy"] == pytest.approx(share)
    assert floor(lopsided)["matthews"] == 0.0


def test_mistakes_in_trials_are_a_sentence(dataset: Dataset, start: Start, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"'bleu' is not measured on colours; choose one of accuracy, macro_f1, matthews"
    ):
        best_metric(dataset, "bleu")
    with pytest.raises(FineTuningError, match="the seeds are 1, 1; give each once"):
        Plan(Recipe(), (1, 1))
    with pytest.raises(DataError, match="colours leaves no example to test on"):
        run_trials(dataclasses.replace(dataset, test=()), [start], Plan(Recipe()))
    (tmp_path / "notes.txt").write_text("thesis\n")
    for name in ("notes.txt", ""):
        with pytest.raises(
            DataError, match=r"does not hold rows of evaluate; name a new file|is a folder; name a file"
        ):
            run_trials(dataset, [start], Plan(Recipe()), tmp_path / name)
    constant = tuple(Example("x", score=2.0) for _ in range(3))
    with pytest.raises(DataError, match="every training score of c is 2; there is nothing to learn"):
        kind_of(Dataset("c", constant, (), (), (), {}, kind="regression"))


# --- the floor ------------------------------------------------------------------------------------------------------


def test_terms_are_weighed_by_how_rare_they_are() -> None:
    x = features([Example("red red one"), Example("nothing known")], {"red": 2.0, "one": 1.0}, {"red": 0, "one": 1})
    weights = np.array([(1 + np.log(2)) * 2.0, 1.0])
    assert x.to_dense()[0].numpy() == pytest.approx(weights / np.linalg.norm(weights))
    assert x.to_dense()[1].tolist() == [0.0, 0.0]


def test_the_linear_model_is_scikit_learns() -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    drawn = np.random.Generator(np.random.PCG64(0))
    dense = drawn.random((60, 5)).astype(np.float32)
    targets = (dense[:, 0] * 3 + drawn.random(60)).astype(np.int64) % 3
    weights, biases = fit(torch.from_numpy(dense).to_sparse_coo(), targets, 3)
    oracle = linear.LogisticRegression(C=10.0, tol=1e-8, max_iter=1000).fit(dense, targets)
    expected = oracle.predict_proba(dense)
    ours = torch.softmax(torch.from_numpy(dense) @ weights + biases, 1).numpy()
    assert np.abs(ours - expected).max() < 0.01


def test_the_floors_are_a_blind_guess_and_a_bag_of_words(dataset: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    blind, words = floor_rows(dataset, out)
    assert (blind["start"], words["start"]) == ("always the commonest label", "TF-IDF, logistic regression")
    assert blind["test"]["accuracy"] < 0.6 < words["test"]["accuracy"] == 1.0, "each text has its label as a word"
    assert read_rows(out) == [words]
    out.write_text(out.read_text().replace("1.0", "0.25"))
    assert floor_rows(dataset, out)[1]["test"]["accuracy"] == 0.25, "it is not computed again"
