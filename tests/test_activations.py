"""What the frozen part made of a text is kept: bounded, exact to what is stated, and nothing in training notices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketfed.client_sdk.activations import (
    ActivationCache,
    DiskCache,
    MemoryCache,
    equal_lengths,
    pack,
    unpack,
)
from pocketfed.client_sdk.artifact_trainer import PREFIX_TOKENS
from pocketfed.client_sdk.artifacts import Artifact
from pocketfed.client_sdk.errors import ConfigurationError, TrainingStopped
from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.client_sdk.trainer import Examples, TrainConfig, evaluate, make_batch, train
from pocketfed.model.tasks import Dataset

WIDTH = 8
Make = Callable[[int, str], ActivationCache]


def row(*ids: int) -> Any:
    return np.array(ids, np.int64)


def hidden(tokens: int, seed: int) -> Any:
    return np.random.default_rng(seed).normal(size=(tokens, WIDTH)).astype(np.float32)


@pytest.fixture(params=["memory", "disk"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    def memory(limit: int, precision: str) -> ActivationCache:
        return MemoryCache(limit, WIDTH, True, precision)

    def disk(limit: int, precision: str) -> ActivationCache:
        cache = DiskCache(tmp_path / "activations.db", limit, WIDTH, True, precision)
        request.addfinalizer(cache.close)
        return cache

    return memory if request.param == "memory" else disk


# ---- precision -------------------------------------------------------------------------------------------------------


def test_float32_is_kept_to_the_last_bit_float16_to_eleven_bits_and_int8_to_half_a_step() -> None:
    """A step of int8 is 1/127 of the row's largest value; float16 has a relative error of at most 2^-11."""
    h = hidden(5, seed=0) * np.logspace(-2, 3, 5)[:, None].astype(np.float32)
    assert unpack(pack(h, "float32"), WIDTH, True, "float32").tobytes() == h.tobytes()
    assert (np.abs(unpack(pack(h, "float16"), WIDTH, True, "float16") - h) <= np.abs(h) * 2.0**-11 + 2.0**-25).all()
    step = np.abs(h).max(1, keepdims=True) / 127
    assert (np.abs(unpack(pack(h, "int8"), WIDTH, True, "int8") - h) <= 0.501 * step).all()


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_a_pooled_row_comes_back_as_one_row_and_zeros_as_zeros(precision: str) -> None:
    h = hidden(1, seed=0)[0]
    assert unpack(pack(h, precision), WIDTH, False, precision).shape == (WIDTH,)
    zeros = np.zeros((2, WIDTH), np.float32)
    assert not unpack(pack(zeros, precision), WIDTH, True, precision).any()


def test_values_beyond_float16_are_its_largest_and_not_infinite() -> None:
    h = np.array([[1e9, -1e9, 0, 0, 0, 0, 0, 1]], np.float32)
    assert unpack(pack(h, "float16"), WIDTH, True, "float16")[0, :2].tolist() == [65504.0, -65504.0]


def test_lower_precisions_take_a_half_and_about_a_quarter() -> None:
    h = hidden(10, seed=0)
    assert [len(pack(h, p)) for p in ("float32", "float16", "int8")] == [320, 160, 10 * (8 + 4)]


# ---- both caches -----------------------------------------------------------------------------------------------------


def test_what_was_put_is_found_by_its_ids_and_nothing_else_is(make: Make) -> None:
    cache = make(10_000, "float32")
    cache.put(row(2, 7, 3), hidden(3, 1))
    assert cache.get(row(2, 7, 3)).tobytes() == hidden(3, 1).tobytes()  # type: ignore[union-attr]
    assert cache.get(row(2, 7)) is None
    assert cache.get(row(2, 8, 3)) is None
    cache.clear()
    assert cache.get(row(2, 7, 3)) is None


def test_it_never_holds_more_than_its_limit_and_keeps_what_it_has(make: Make) -> None:
    """A text of 3 tokens is 3 * 8 * 4 = 96 bytes: ten fit into 1000."""
    cache: Any = make(1000, "float32")
    for i in range(50):
        cache.put(row(2, i, 3), hidden(3, i))
        assert cache.bytes == 96 * min(10, i + 1)
    assert [i for i in range(50) if cache.get(row(2, i, 3)) is not None] == list(range(10))
    cache.put(row(2, 0, 3), hidden(3, 0))
    assert cache.bytes == 960, "the same text is held once"
    nothing = make(0, "float32") if isinstance(cache, MemoryCache) else None
    if nothing is not None:
        nothing.put(row(1), hidden(1, 0))
        assert nothing.get(row(1)) is None


def test_where_room_is_needed_what_the_last_use_did_not_touch_goes_and_what_it_did_stays(make: Make) -> None:
    cache: Any = make(1000, "float32")
    for i in range(10):
        cache.put(row(i), hidden(3, i))
    cache.begin()
    for i in (3, 4):
        assert cache.get(row(i)) is not None
    for i in range(100, 108):
        cache.put(row(i), hidden(3, i))
    assert all(cache.get(row(i)) is not None for i in (3, 4, *range(100, 108)))
    assert cache.bytes == 960
    cache.put(row(200), hidden(3, 0))
    assert cache.get(row(200)) is None, "all that is there was touched"


@pytest.mark.parametrize(("limit", "precision"), [(100, "float64"), (100, ""), (-1, "int8")])
def test_a_precision_that_does_not_exist_and_a_negative_limit_are_refused(
    make: Make, limit: int, precision: str
) -> None:
    with pytest.raises(
        ConfigurationError, match=r"the cache's (precision is .*; choose one of|limit is -1 bytes; give 0)"
    ):
        make(limit, precision)


# ---- on disk ---------------------------------------------------------------------------------------------------------


def test_a_disk_cache_is_still_there_when_it_is_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "activations.db"
    first = DiskCache(path, 10_000, WIDTH, True, "float32")
    first.put(row(2, 7, 3), hidden(3, 1))
    held = first.bytes
    first.close()
    again = DiskCache(path, 10_000, WIDTH, True, "float32")
    assert again.get(row(2, 7, 3)).tobytes() == hidden(3, 1).tobytes()  # type: ignore[union-attr]
    assert again.bytes == held == 96
    again.close()


@pytest.mark.parametrize("other", [(WIDTH, True, "int8"), (2 * WIDTH, True, "float32"), (WIDTH, False, "float32")])
def test_a_disk_cache_of_another_format_is_begun_anew(other: tuple[int, bool, str], tmp_path: Path) -> None:
    path = tmp_path / "activations.db"
    first = DiskCache(path, 10_000, WIDTH, True, "float32")
    first.put(row(2, 7, 3), hidden(3, 1))
    first.close()
    again = DiskCache(path, 10_000, *other)
    assert again.get(row(2, 7, 3)) is None
    assert again.bytes == 0
    again.close()


@pytest.mark.parametrize("damage", ["no database", "torn pages", "cut short", "empty"])
def test_a_damaged_disk_cache_is_begun_anew_and_works(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "activations.db"
    first = DiskCache(path, 1_000_000, WIDTH, True, "float32")
    for i in range(200):
        first.put(row(2, i, 3), hidden(3, i))
    first.close()
    data = bytearray(path.read_bytes())
    if damage == "no database":
        data = bytearray(b"this is no database" * 100)
    elif damage == "torn pages":
        data[4096:] = bytes(len(data) - 4096)
    elif damage == "cut short":
        data = data[:5000]
    else:
        data = bytearray()
    path.write_bytes(data)
    again = DiskCache(path, 1_000_000, WIDTH, True, "float32")
    again.begin()
    for i in range(200):
        found = again.get(row(2, i, 3))
        assert found is None or found.tobytes() == hidden(3, i).tobytes(), "lost, not wrong"
        again.put(row(2, i, 3), hidden(3, i))
        assert again.get(row(2, i, 3)) is not None
    again.close()


def test_what_a_disk_cache_forgets_is_no_longer_in_its_file(tmp_path: Path) -> None:
    path = tmp_path / "activations.db"
    cache = DiskCache(path, 10_000, WIDTH, True, "float32")
    mark = np.full((3, WIDTH), 1234.5, np.float32)
    cache.put(row(2, 7, 3), mark)
    assert mark.tobytes() in path.read_bytes()
    cache.clear()
    assert cache.bytes == 0
    assert mark.tobytes()[:32] not in path.read_bytes()
    cache.close()


# ---- groups ----------------------------------------------------------------------------------------------------------


def test_groups_have_one_length_and_no_more_tokens_than_allowed_unless_one_row_has() -> None:
    rows = [np.ones(n, np.int64) for n in (3, 5, 3, 3, 5, 20, 3)]
    assert list(equal_lengths(rows, 10)) == [[0, 2, 3], [6], [1, 4], [5]]


# ---- with a real artifact's plans ------------------------------------------------------------------------------------


def encoded(trainer: PlanTrainer, dataset: Dataset, count: int = 96) -> Examples:
    chosen = dataset.train[:count]
    labels = trainer.artifact.manifest.labels
    return Examples(trainer.encode([e.text for e in chosen]), np.array([labels.index(e.label or "") for e in chosen]))


def uncached(artifact: Artifact) -> PlanTrainer:
    return PlanTrainer(artifact, "head", cache=MemoryCache(0, 1, False))


class CountingPrefix(PlanTrainer):
    """Counts the rows that go through the prefix."""

    rows = 0

    def run_prefix(self, ids: Any) -> Any:
        self.rows += len(ids)
        return super().run_prefix(ids)


def test_a_rows_result_is_the_same_bits_whatever_group_it_is_computed_in(nano_artifact: Artifact) -> None:
    trainer = PlanTrainer(nano_artifact, "head")
    for length in (3, 8, 17):
        ids = np.random.default_rng(length).integers(5, 100, (7, length))
        together = trainer.run_prefix(ids)
        for i in range(7):
            assert trainer.run_prefix(ids[i : i + 1])[0].tobytes() == together[i].tobytes()


@pytest.mark.parametrize("keep", ["memory", "disk"])
def test_caching_changes_no_bit_of_an_update(
    keep: str, nano_artifact: Artifact, tiny_dataset: Dataset, tmp_path: Path
) -> None:
    without = uncached(nano_artifact)
    width, tokens = without.set.hidden_size, without.set.keeps_tokens
    cache: ActivationCache = (
        MemoryCache(10**8, width, tokens)
        if keep == "memory"
        else DiskCache(tmp_path / "a.db", 10**8, width, tokens, "float32")
    )
    cached = PlanTrainer(nano_artifact, "head", cache=cache)
    examples = encoded(cached, tiny_dataset)
    config = TrainConfig(epochs=2, batch_size=8)
    theta = cached.initial_theta()
    deltas = [train(t, theta, examples, config).delta.tobytes() for t in (without, cached, cached)]
    assert deltas[0] == deltas[1] == deltas[2]
    if isinstance(cache, DiskCache):
        cache.close()


def test_each_different_text_goes_through_the_prefix_once_over_epochs_rounds_and_evaluation(
    nano_artifact: Artifact, tiny_dataset: Dataset
) -> None:
    trainer = CountingPrefix(nano_artifact, "head")
    examples = encoded(trainer, tiny_dataset)
    different = len({r.tobytes() for r in examples.rows})
    assert different < len(examples)
    theta = trainer.initial_theta()
    for _ in range(2):
        train(trainer, theta, examples, TrainConfig(epochs=2, batch_size=8))
        evaluate(trainer, theta, examples)
    assert trainer.rows == different


def test_a_cache_without_room_makes_training_slower_and_not_wrong(
    nano_artifact: Artifact, tiny_dataset: Dataset
) -> None:
    """Room for 5 pooled rows: the others are computed each time."""
    reference = CountingPrefix(nano_artifact, "head")
    width = reference.set.hidden_size
    small = CountingPrefix(nano_artifact, "head", cache=MemoryCache(5 * 4 * width, width, False))
    examples = encoded(reference, tiny_dataset, 24)
    theta = reference.initial_theta()
    wanted, got = (train(t, theta, examples, TrainConfig(epochs=2)).delta for t in (reference, small))
    assert got.tobytes() == wanted.tobytes()
    assert small.rows > reference.rows


@pytest.mark.parametrize(("precision", "bound"), [("float16", 1e-3), ("int8", 2e-2)])
def test_a_lower_precision_moves_the_loss_by_little(
    precision: str, bound: float, nano_artifact: Artifact, tiny_dataset: Dataset
) -> None:
    exact = PlanTrainer(nano_artifact, "head")
    width, tokens = exact.set.hidden_size, exact.set.keeps_tokens
    rounded = PlanTrainer(nano_artifact, "head", cache=MemoryCache(10**8, width, tokens, precision))
    examples = encoded(exact, tiny_dataset)
    theta = exact.initial_theta()
    losses = [evaluate(t, theta, examples)["loss"] for t in (exact, rounded)]
    assert 0 < abs(losses[0] - losses[1]) < bound


def test_the_suffix_on_kept_activations_gives_what_the_whole_plan_gives(
    nano_artifact: Artifact, tiny_dataset: Dataset
) -> None:
    trainer = PlanTrainer(nano_artifact, "head")
    batch = make_batch(encoded(trainer, tiny_dataset, 8), range(8))
    theta = trainer.initial_theta()
    loss, right, gradient = trainer.gradient(theta, batch)
    feed = {"theta": theta, "input_ids": batch.ids, "attention_mask": batch.mask, "labels": batch.labels}
    whole = trainer._open("train", batch.ids.shape[1]).run(["loss", "correct", "gradient"], feed)
    assert loss == pytest.approx(float(whole[0]), abs=1e-5)
    assert right == int(whole[1])
    np.testing.assert_allclose(gradient, whole[2], rtol=0, atol=1e-5 * np.abs(whole[2]).max())


def test_a_stop_while_texts_are_read_is_heeded_and_what_was_read_is_kept(
    nano_artifact: Artifact, tiny_dataset: Dataset
) -> None:
    trainer = CountingPrefix(nano_artifact, "head")
    examples = encoded(trainer, tiny_dataset)
    groups = len(list(equal_lengths(list({r.tobytes(): r for r in examples.rows}.values()), PREFIX_TOKENS)))
    assert groups >= 3
    asked: list[int] = []

    def should_stop() -> bool:
        asked.append(1)
        return len(asked) > 2

    theta = trainer.initial_theta()
    with pytest.raises(TrainingStopped, match="stopped while the frozen part of the model read the examples"):
        train(trainer, theta, examples, TrainConfig(), should_stop)
    read = trainer.rows
    assert 0 < read < len({r.tobytes() for r in examples.rows})
    train(trainer, theta, examples, TrainConfig())
    assert trainer.rows == len({r.tobytes() for r in examples.rows})


def test_sets_without_a_prefix_keep_nothing(nano_artifact: Artifact, tiny_dataset: Dataset) -> None:
    trainer = PlanTrainer(nano_artifact, "norms")
    trainer.prepare(encoded(trainer, tiny_dataset, 4).rows)
    assert trainer._cache is None
    assert dataclasses.replace(trainer.set).prefix == ""
