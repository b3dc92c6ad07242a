"""Every example on exactly one device, as skewed as asked."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from pocketfed.model.tasks import Example
from pocketfed.simulations.partition import PartitionError, label_counts, partition

LABELS = ("a", "b", "c", "d", "e")


def examples(count: int) -> list[Example]:
    """Labels in turn; user u0 says half, u1 a quarter, u2 an eighth and so on down to u5; rooms in turn of three."""
    zeros = [((i + 1) & -(i + 1)).bit_length() - 1 for i in range(count)]  # trailing zero bits of i + 1
    return [
        Example(str(i), LABELS[i % 5], user=f"u{min(5, zeros[i])}", fields={"room": f"r{i % 3}"}) for i in range(count)
    ]


@pytest.mark.parametrize(
    "spec",
    [
        "iid",
        "dirichlet:0.1",
        "dirichlet:1",
        "quantity:0.3",
        "shards:1",
        "shards:2",
        "by:user",
        "by:room",
        "by:label",
    ],
)
@pytest.mark.parametrize("devices", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_example_is_on_exactly_one_device(spec: str, devices: int, seed: int) -> None:
    parts = partition(examples(200), spec, devices, seed)
    assert len(parts) == devices
    assert sorted(i for part in parts for i in part) == list(range(200))
    assert all(parts)
    assert all(part == sorted(part) for part in parts)


@pytest.mark.parametrize("spec", ["iid", "dirichlet:0.3", "quantity:0.3", "shards:2"])
def test_the_seed_decides(spec: str) -> None:
    data = examples(200)
    assert partition(data, spec, 7, 1) == partition(data, spec, 7, 1)
    assert partition(data, spec, 7, 1) != partition(data, spec, 7, 2)


def test_iid_sizes_differ_by_at_most_one() -> None:
    assert sorted(map(len, partition(examples(20), "iid", 6, 0))) == [3, 3, 3, 3, 4, 4]


def test_iid_gives_every_device_every_label_about_equally() -> None:
    data = examples(5000)
    counts = label_counts(data, partition(data, "iid", 5, 0), LABELS)
    assert counts.sum() == 5000
    assert (abs(counts - 200) < 50).all()  # four standard deviations of the hypergeometric draw: 4 * 11.3


def skew(alpha: float) -> float:
    """The mean share of a device's most frequent label, over ten seeds: 0.2 if even, 1 if each device has one label."""
    data = examples(1000)
    shares = []
    for seed in range(10):
        counts = label_counts(data, partition(data, f"dirichlet:{alpha}", 10, seed), LABELS)
        shares.append((counts.max(1) / counts.sum(1)).mean())
    return float(np.mean(shares))


def test_a_smaller_alpha_skews_labels_more() -> None:
    few, some, even = skew(0.1), skew(1.0), skew(1000.0)
    assert even < 0.25 < some < 0.6 < few


def test_dirichlet_shares_have_the_mean_and_spread_of_the_distribution() -> None:
    """A device's share of a label has mean 1/K and variance (1/K)(1 - 1/K)/(K alpha + 1), .0375 for K = 4."""
    data = examples(2000)  # 400 of each label
    parts = [partition(data, "dirichlet:1", 4, seed) for seed in range(300)]
    shares = np.stack([label_counts(data, p, LABELS) for p in parts]) / 400  # (300, 4, 5)
    assert shares.mean() == pytest.approx(0.25, abs=1e-12)
    assert shares.var() == pytest.approx(0.0375, rel=0.1)


def test_no_device_is_empty_even_when_the_draw_would_leave_it_so() -> None:
    data = examples(40)
    parts = partition(data, "dirichlet:0.01", 40, 0)  # five labels, forty devices: chance never fills them all
    assert [len(p) for p in parts] == [1] * 40


@pytest.mark.parametrize("alpha", ["1e-300", "1e-9", "1e6"])
def test_extreme_alphas_still_deal_everything_out(alpha: str) -> None:
    parts = partition(examples(100), f"dirichlet:{alpha}", 5, 0)
    assert sorted(i for part in parts for i in part) == list(range(100))
    assert all(parts)


def test_quantity_shares_have_the_spread_of_the_distribution_and_the_labels_stay_even() -> None:
    """A device's share of everything has mean 1/4 and, for alpha = 1, variance (1/4)(3/4)/(4 + 1) = .0375."""
    data = examples(2000)
    counts = np.stack([label_counts(data, partition(data, "quantity:1", 4, seed), LABELS) for seed in range(300)])
    assert (counts.sum(2) / 2000).var() == pytest.approx(0.0375, rel=0.1)
    large = counts[counts.sum(2) > 500]  # of these every label is a fifth; 0.1 is more than four standard deviations
    assert (abs(large / large.sum(1, keepdims=True) - 0.2) < 0.1).all()


def test_with_much_more_skew_than_examples_no_device_is_left_with_nothing() -> None:
    sizes = [len(part) for part in partition(examples(30), "quantity:0.001", 20, 0)]
    assert (min(sizes), sum(sizes)) == (1, 30)
    assert max(sizes) >= 8


def test_shards_hold_one_label_each_where_that_comes_out_even() -> None:
    """200 examples of 5 labels in 20 shards of 10: four whole shards a label, two to each of 10 devices."""
    data = examples(200)
    counts = label_counts(data, partition(data, "shards:2", 10, 0), LABELS)
    assert set(counts.ravel().tolist()) <= {0, 10, 20}
    assert counts.sum(1).tolist() == [20] * 10
    assert counts.sum(0).tolist() == [40] * 5
    assert ((counts > 0).sum(1) <= 2).all()


def test_shards_of_one_sort_the_labels_over_the_devices() -> None:
    data = examples(50)
    counts = label_counts(data, partition(data, "shards:1", 5, 3), LABELS)
    assert sorted(counts.tolist()) == sorted((10 * np.eye(5, dtype=int)).tolist())


def test_a_user_stays_on_one_device() -> None:
    data = examples(320)
    parts = partition(data, "by:user", 3, 0)
    homes = {
        user: [d for d, part in enumerate(parts) if any(data[i].user == user for i in part)]
        for user in {e.user for e in data}
    }
    assert all(len(devices) == 1 for devices in homes.values())


def test_users_are_dealt_in_rounds_the_largest_first() -> None:
    data = examples(64)
    assert Counter(e.user for e in data) == {"u0": 32, "u1": 16, "u2": 8, "u3": 4, "u4": 2, "u5": 2}
    parts = partition(data, "by:user", 2, 0)
    assert [{data[i].user for i in part} for part in parts] == [{"u0", "u2", "u4"}, {"u1", "u3", "u5"}]


def test_by_needs_no_seed() -> None:
    assert partition(examples(50), "by:room", 2, 0) == partition(examples(50), "by:room", 2, 99)


def test_label_counts_are_counted_by_hand() -> None:
    data = [Example("x", label) for label in ("b", "a", "b", "z")]
    counts = label_counts(data, [[0, 2], [1, 3], []], ("a", "b"))
    assert counts.tolist() == [[0, 2], [1, 0], [0, 0]]  # z is no label of ours
    assert counts.dtype == np.int64


@pytest.mark.parametrize(
    ("spec", "devices", "says"),
    [
        ("iid", 0, "0 devices cannot hold data; give at least 1"),
        ("iid", 11, "11 devices cannot share 10 examples; give at most 10"),
        ("random", 2, "there is no partition 'random'; give iid, dirichlet:ALPHA .* or by:COLUMN"),
        ("iid:3", 2, "there is no partition 'iid:3'"),
        ("", 2, "there is no partition ''"),
        ("by:", 2, "there is no partition 'by:'"),
        ("dirichlet", 2, "needs a finite number above 0"),
        ("dirichlet:", 2, "needs a finite number above 0"),
        ("dirichlet:x", 2, "'dirichlet:x' needs a finite number above 0"),
        ("dirichlet:0", 2, "needs a finite number above 0"),
        ("dirichlet:-1", 2, "needs a finite number above 0"),
        ("dirichlet:nan", 2, "needs a finite number above 0"),
        ("dirichlet:inf", 2, "needs a finite number above 0"),
        ("quantity:0", 2, "'quantity:0' needs a finite number above 0, such as quantity:0.3"),
        ("quantity:nan", 2, "needs a finite number above 0"),
        ("shards", 2, "'shards' needs a whole number of shards a device, such as shards:2"),
        ("shards:0", 2, "'shards:0' needs a whole number"),
        ("shards:-1", 2, "needs a whole number"),
        ("shards:1.5", 2, "needs a whole number"),
        ("shards:3", 4, "4 devices of 3 shards need 12 examples, and there are 10; give fewer of either"),
        ("by:room", 4, "by:room has 3 distinct values for 4 devices; give at most 3 devices"),
        ("by:planet", 2, "example 0 has no 'planet', so by:planet cannot place it; the data has label, room, user"),
    ],
)
def test_a_bad_partition_is_refused_in_a_sentence(spec: str, devices: int, says: str) -> None:
    with pytest.raises(PartitionError, match=says):
        partition(examples(10), spec, devices, 0)
