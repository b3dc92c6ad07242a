"""Sums in float64, from memory or from the spool, the same bits in blocks, in threads and at once."""

from __future__ import annotations

import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketfed.coordinator import aggregation
from pocketfed.coordinator.aggregation import (
    BLOCK,
    Delta,
    RunningMean,
    geometric_median,
    krum,
    krum_scores,
    mean,
    median,
    norm,
    payload_start,
    read_delta,
    trimmed_mean,
)
from pocketfed.model.parameters import ParametersError, Vector, encode_vector


def held(*rows: list[float]) -> list[Delta]:
    return [Delta(np.array(row, np.float32), len(row)) for row in rows]


def spooled(folder: Path, rows: list[Vector]) -> list[Delta]:
    for i, row in enumerate(rows):
        (folder / f"{i}.update").write_bytes(encode_vector("delta", row))
    return [Delta(folder / f"{i}.update", len(row)) for i, row in enumerate(rows)]


def rows_of(count: int, size: int, seed: int = 0) -> list[Vector]:
    rng = np.random.default_rng(seed)
    return [(10.0 ** rng.integers(-4, 4) * rng.standard_normal(size)).astype(np.float32) for _ in range(count)]


@given(st.integers(1, 10**9), st.sampled_from(["delta", "theta"]))
@settings(max_examples=50, deadline=None)
def test_the_quick_reader_expects_what_the_writer_writes(size: int, name: str) -> None:
    small = size % 2000
    if small:
        written = encode_vector(name, np.zeros(small, np.float32))
        assert written[: -4 * small] == payload_start(name, small)
    assert len(payload_start(name, size)) % 8 == 0


def test_a_spooled_update_is_read_whole_in_columns_and_scaled(tmp_path: Path) -> None:
    row = np.arange(10, dtype=np.float32)
    (delta,) = spooled(tmp_path, [row])
    assert delta.columns(3, 6).tolist() == [3, 4, 5]
    assert delta.raw().tolist() == row.tolist()
    assert delta.scaled(0.5).vector().tolist() == (row / 2).tolist()
    assert delta.scaled(0.5).columns(2, 4).tolist() == [1.0, 1.5]
    delta.drop()
    assert delta.scaled(0.5).columns(2, 4).tolist() == [1.0, 1.5]


def test_an_update_that_another_sdk_laid_out_is_read_all_the_same(tmp_path: Path) -> None:
    header = b'{"__metadata__":{"made":"elsewhere"},"delta":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    header += b" " * (-len(header) % 8)
    path = tmp_path / "other.update"
    path.write_bytes(len(header).to_bytes(8, "little") + header + np.array([1, 2], np.float32).tobytes())
    assert read_delta(path, 2).tolist() == [1.0, 2.0]
    assert Delta(path, 2).columns(1, 2).tolist() == [2.0]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 100,
        encode_vector("delta", np.zeros(3, np.float32))[:-1],
        encode_vector("delta", np.zeros(4, np.float32)),
        encode_vector("other", np.zeros(3, np.float32)),
        encode_vector("delta", np.zeros(3, np.float32)) + b"\0" * 4,
        encode_vector("delta", np.zeros(3, np.float32)).replace(b"F32", b"I32"),
    ],
)
def test_fault_07_bytes_that_are_not_the_update_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.update"
    path.write_bytes(data)
    for read in (lambda: Delta(path, 3).raw(), lambda: Delta(path, 3).columns(0, 1)):
        with pytest.raises(ParametersError):
            read()


def test_a_spool_file_that_is_gone_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ParametersError, match="the spooled update cannot be read: No such file or directory; look at"):
        read_delta(tmp_path / "gone.update", 3)


@pytest.mark.parametrize("size", [1, 7, aggregation.DOT, 3 * aggregation.DOT + 5])
def test_the_norm_is_that_of_float64(size: int) -> None:
    (row,) = rows_of(1, size)
    assert norm(row) == pytest.approx(float(np.linalg.norm(row.astype(np.float64))), rel=1e-5)


def test_the_norm_of_the_largest_and_smallest_floats_neither_overflows_nor_vanishes() -> None:
    huge = float(np.finfo(np.float32).max)
    assert norm(np.array([huge, huge], np.float32)) == pytest.approx(math.sqrt(2) * huge)
    assert norm(np.array([3e-30, 4e-30], np.float32)) == pytest.approx(5e-30)
    assert math.isnan(norm(np.array([1, math.nan], np.float32)))
    assert norm(np.array([1, -math.inf], np.float32)) == math.inf


def test_the_mean_is_weighted_and_clipped_updates_keep_their_weight() -> None:
    first, second = held([1, 10], [4, 10])
    assert mean([first, second], [1, 2]).tolist() == [3.0, 10.0]  # (1·1 + 2·4) / 3
    assert mean([first, second.scaled(0.5)], [1, 2]).tolist() == [5 / 3, 20 / 3]  # (1 + 2·2) / 3, (10 + 2·5) / 3


@pytest.mark.parametrize("workers", [2, 3, 8])
def test_fault_33_any_number_of_workers_gives_the_same_bits(tmp_path: Path, workers: int) -> None:
    rows = rows_of(9, 5 * BLOCK + 17)
    one = mean(spooled(tmp_path, rows), range(1, 10))
    with ThreadPoolExecutor(workers) as pool:
        running = RunningMean(len(rows[0]), pool, workers)
        for row, weight in zip(rows, range(1, 10), strict=True):
            running.add(Delta(row, len(row)), weight)
    assert running.result().tobytes() == one.tobytes()


def test_fault_33_the_norm_has_the_same_bits_with_one_and_with_two_blas_threads() -> None:
    code = (
        "import numpy as np; from pocketfed.coordinator.aggregation import norm; "
        "print(norm(np.random.default_rng(0).standard_normal(300_001).astype(np.float32)).hex())"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"OPENBLAS_NUM_THREADS": n, "PATH": ""},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for n in ("1", "2")
    }
    assert len(told) == 1


def test_the_trimmed_mean_forgets_both_ends() -> None:
    rows = held([1, -1e9], [2, 1], [3, 2], [4, 3], [1e9, 4])
    assert trimmed_mean(rows, 0.2).tolist() == [3.0, 2.0]
    assert trimmed_mean(held([1, 2], [3, 4]), 0.2).tolist() == [2.0, 3.0]  # ⌊0.4⌋: nothing to cut


def test_the_median_is_each_coordinates_own() -> None:
    assert median(held([1, 9], [2, 7], [1e9, 8])).tolist() == [2.0, 8.0]
    assert median(held([1, 9], [2, 7])).tolist() == [1.5, 8.0]


def test_krum_scores_are_distances_to_the_nearest() -> None:
    """Four at 0, 1, 2 and 10 on a line, one malicious: the 4 - 1 - 2 = 1 nearest."""
    rows = held([0], [1], [2], [10])
    assert krum_scores(rows, 1).tolist() == [1.0, 1.0, 1.0, 64.0]
    assert krum(rows, [1, 1, 1, 1], 1, 1).tolist() == [0.0]  # the first of equals
    assert krum(rows, [1, 1, 2, 1], 1, 3).tolist() == [1.25]  # (0 + 1 + 2·2) / 4
    assert krum(held([0], [4]), [1, 3], 1, 1).tolist() == [3.0]  # of two nobody is nearer: their mean


def test_the_geometric_median_of_a_line_is_its_weighted_median_and_no_outlier_moves_it() -> None:
    near = geometric_median(held([0], [1], [3]), [1, 1, 1], iterations=200)
    far = geometric_median(held([0], [1], [1e6]), [1, 1, 1], iterations=200)
    assert near == pytest.approx([1.0], abs=1e-3)
    assert far == pytest.approx([1.0], abs=1e-3)
    assert geometric_median(held([0], [1], [3]), [1, 1, 5], iterations=200) == pytest.approx([3.0], abs=1e-3)


@pytest.mark.parametrize("name", ["trimmed", "median", "krum", "geometric"])
def test_robust_rules_give_the_same_from_the_spool_in_small_blocks_as_from_memory_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    rules = {
        "trimmed": lambda d: trimmed_mean(d, 0.2),
        "median": median,
        "krum": lambda d: krum(d, [1.0] * len(d), 1, 4),
        "geometric": lambda d: geometric_median(d, [1.0] * len(d)),
    }
    rows = rows_of(7, 1001)
    whole = rules[name]([Delta(row, 1001) for row in rows])
    monkeypatch.setattr(aggregation, "COLUMN_BYTES", 4 * 7 * 100)
    assert rules[name](spooled(tmp_path, rows)).tobytes() == whole.tobytes()
