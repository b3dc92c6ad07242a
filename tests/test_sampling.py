"""A cohort is drawn uniformly, reproducibly, and by name."""

from __future__ import annotations

from collections import Counter

from pocketfed.coordinator.sampling import sample_cohort

FLEET = {10: "c", 7: "a", 3: "d", 5: "b"}


def test_zero_or_more_than_there_are_takes_all_in_order_of_their_names() -> None:
    for cohort in (0, 4, 9):
        assert list(sample_cohort(FLEET, cohort, 1, 1).items()) == [(7, "a"), (5, "b"), (10, "c"), (3, "d")]


def test_a_cohort_is_a_subset_without_repetition_in_order_of_the_names() -> None:
    for number in range(20):
        chosen = sample_cohort(FLEET, 3, 5, number)
        assert len(chosen) == 3
        assert chosen.items() <= FLEET.items()
        assert list(chosen.values()) == sorted(chosen.values())


def test_the_same_names_seed_and_round_give_the_same_cohort_whatever_the_ids_and_their_order() -> None:
    renumbered = dict(enumerate(reversed("abcd")))
    for number in range(10):
        assert list(sample_cohort(FLEET, 2, 1, number).values()) == list(
            sample_cohort(renumbered, 2, 1, number).values()
        )


def test_rounds_and_seeds_draw_differently() -> None:
    draws = {(seed, n): tuple(sample_cohort(FLEET, 2, seed, n).values()) for seed in range(5) for n in range(5)}
    assert len({draws[0, n] for n in range(5)}) > 1
    assert len({draws[seed, 0] for seed in range(5)}) > 1


def test_every_device_is_drawn_about_equally_often() -> None:
    counts = Counter(name for n in range(2000) for name in sample_cohort(FLEET, 1, 0, n).values())
    assert set(counts) == set("abcd")
    assert all(430 < count < 570 for count in counts.values())  # 500 expected, standard deviation 19.4


def test_no_devices_are_no_cohort() -> None:
    assert sample_cohort({}, 3, 0, 1) == {}
