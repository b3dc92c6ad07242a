"""What the screen lets through: hostile replies leave no trace in the aggregate, honest ones are left alone."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketfed.coordinator import flwr_compat

# isort: split
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MessageType, MetricRecord, RecordDict

from pocketfed.coordinator.aggregation import Compass, Delta
from pocketfed.coordinator.config import RunConfig
from pocketfed.coordinator.grid import UNREADABLE
from pocketfed.coordinator.screening import WARM_UP, Tally, screen
from pocketfed.coordinator.strategy import OURS, THETA, DeltaArray, make_strategy
from pocketfed.coordinator.validation import History, Limits
from pocketfed.model.parameters import Vector, encode_vector

SIZE = 40
START = np.linspace(-1, 1, SIZE).astype(np.float32)
LIMITS = Limits.of(SIZE, RunConfig())


def reply(name: str, content: Mapping[str, Any]) -> Message:
    flwr_compat.enter_run(1)
    asked = flwr_compat.name_message(Message(RecordDict(), 1, MessageType.TRAIN), name)
    return Message(RecordDict(dict(content)), reply_to=asked)


def trained(name: str, delta: Vector, examples: float = 10, digest: str = "") -> Message:
    """As a stock Flower client sends it; with a digest as ours does."""
    content: dict[str, Any] = {
        "arrays": ArrayRecord({THETA: Array(START + delta)}),
        "metrics": MetricRecord({"num-examples": examples, "loss": 1.0}),
    }
    if digest:
        content["update"] = ConfigRecord({"bytes": 1, "digest": digest})
    return reply(name, content)


def spooled(folder: Path, name: str, delta: Vector, examples: float = 10, data: bytes | None = None) -> Message:
    """As the grid makes it of an upload."""
    data = encode_vector("delta", delta) if data is None else data
    (folder / f"{name}.update").write_bytes(data)
    arrays = ArrayRecord()
    arrays[THETA] = DeltaArray(START, Delta(folder / f"{name}.update", SIZE))
    update = ConfigRecord({"bytes": len(data), "digest": hashlib.sha256(data).hexdigest()})
    return reply(name, {"arrays": arrays, "metrics": MetricRecord({"num-examples": examples}), "update": update})


def honest(count: int, seed: int = 0) -> list[Vector]:
    rng = np.random.default_rng(seed)
    return [(0.1 + 0.05 * rng.standard_normal(SIZE)).astype(np.float32) for _ in range(count)]


def result(
    replies: Sequence[Message],
    strategy: str = "StreamingFedAvg",
    limits: Limits = LIMITS,
    history: History | None = None,
) -> tuple[Vector, Tally]:
    tally = Tally()
    passed = screen(replies, START, limits, tally, history)
    arrays, _ = make_strategy(strategy, {}).aggregate_train(1, passed if strategy in OURS else list(passed))
    return np.asarray(arrays[THETA].numpy()), tally


NAN = np.concatenate([np.full(SIZE - 1, 0.1), [math.nan]]).astype(np.float32)
HOSTILE: dict[str, tuple[Any, str]] = {
    "06 NaN": (lambda n: trained(n, NAN), "not_finite: 1 of the update's 40 values"),
    "06 infinity": (lambda n: trained(n, np.full(SIZE, -math.inf, np.float32)), "not_finite: 40 of"),
    "06 denormals": (lambda n: trained(n, np.full(SIZE, 1e-44, np.float32)), "zero: "),
    "07 shape": (lambda n: reply_of_arrays(n, {THETA: np.zeros(1, np.float32)}), "shape: 'theta'"),
    "07 broadcastable": (lambda n: reply_of_arrays(n, {THETA: np.zeros((1, SIZE), np.float32)}), "shape: 'theta'"),
    "07 dtype": (lambda n: reply_of_arrays(n, {THETA: np.zeros(SIZE)}), "dtype: 'theta' is float64"),
    "07 another name": (lambda n: reply_of_arrays(n, {"beta": START}), "names: arrays are named ['beta']"),
    "07 one too many": (lambda n: reply_of_arrays(n, {THETA: START, "x": START}), "names: arrays are named"),
    "07 none": (lambda n: reply_of_arrays(n, {}), "names: arrays are named []"),
    "08 no examples": (lambda n: trained(n, honest(9)[8], 0), "num_examples: num-examples is 0"),
    "08 minus nine": (lambda n: trained(n, honest(9)[8], -9), "num_examples: num-examples is -9"),
    "08 NaN examples": (lambda n: trained(n, honest(9)[8], math.nan), "num_examples: num-examples is nan"),
    "09 times 1e6": (lambda n: trained(n, 1e6 * honest(9)[8]), "norm: the update's norm"),
    "09 the largest": (lambda n: trained(n, np.full(SIZE, 3e38, np.float32)), "norm: the update's norm"),
    "10 the model itself": (lambda n: trained(n, np.zeros(SIZE, np.float32)), "zero: "),
    "10 next to nothing": (lambda n: trained(n, 1e-12 * honest(9)[8]), "zero: "),
    "unreadable": (lambda n: unreadable(n), "unreadable: not safetensors bytes"),
}


def reply_of_arrays(name: str, arrays: Mapping[str, Any]) -> Message:
    record = ArrayRecord({k: Array(v) for k, v in arrays.items()})
    return reply(name, {"arrays": record, "metrics": MetricRecord({"num-examples": 10})})


def unreadable(name: str) -> Message:
    asked = flwr_compat.name_message(Message(RecordDict(), 1, MessageType.TRAIN), name)
    return Message(Error(UNREADABLE, "not safetensors bytes: too short"), reply_to=asked)


def test_where_each_update_pointed_is_measured_against_the_last_step_and_refuses_nobody(tmp_path: Path) -> None:
    step, across = np.zeros(SIZE, np.float32), np.zeros(SIZE, np.float32)
    step[:2], across[2] = (3.0, 4.0), 1.0
    first = np.zeros(SIZE, np.float32)
    first[0] = 2.0
    given = [
        trained("with", 2 * step),
        spooled(tmp_path, "against", -step),
        spooled(tmp_path, "across", across),
        trained("leaning", first),
        trained("bad", NAN),
    ]
    tally = Tally()
    assert len(list(screen(given, START, LIMITS, tally, step=step))) == 4
    assert {name: round(cosine, 6) for name, cosine in tally.cosines.items()} == {
        "with": 1.0, "against": -1.0, "across": 0.0, "leaning": 0.6,
    }  # fmt: skip
    for unknown in (None, np.zeros(SIZE, np.float32), np.full(SIZE, math.nan, np.float32)):
        tally = Tally()
        assert len(list(screen([trained("d", step)], START, LIMITS, tally, step=unknown))) == 1
        assert tally.cosines == {}


def test_a_cosine_is_the_same_whatever_the_length_and_of_many_values_too() -> None:
    rng = np.random.default_rng(5)
    here, there = rng.standard_normal((2, 20_001)).astype(np.float32)
    compass = Compass.of(here)
    assert compass is not None
    told = compass.cosine(there, float(np.linalg.norm(there)))
    wide = here.astype(np.float64), there.astype(np.float64)
    assert told == pytest.approx(wide[0] @ wide[1] / np.linalg.norm(wide[0]) / np.linalg.norm(wide[1]), abs=1e-6)
    assert Compass.of(np.full(4, 3e38, np.float32)).cosine(np.full(4, 3e38, np.float32), 6e38) is None  # type: ignore[union-attr]


@pytest.mark.parametrize("strategy", ["StreamingFedAvg", "FedAvg", "StreamingMedian"])
@pytest.mark.parametrize("attack", HOSTILE)
def test_fault_06_to_10_a_refused_update_leaves_the_aggregate_bit_identical(attack: str, strategy: str) -> None:
    hostile, says = HOSTILE[attack]
    good = [trained(f"d{i}", delta, 5 + i) for i, delta in enumerate(honest(5))]
    with np.errstate(over="ignore"):
        attacked = [*good[:2], hostile("bad"), *good[2:]]
    after, tally = result(attacked, strategy)
    status, why, _ = tally.statuses["bad"]
    assert status == "quarantined"
    assert str(why).startswith(says)
    assert tally.accepted == 5
    without, _ = result([trained(f"d{i}", delta, 5 + i) for i, delta in enumerate(honest(5))], strategy)
    assert after.tobytes() == without.tobytes()


@pytest.mark.parametrize("place", [0, 3, WARM_UP - 1, WARM_UP, 39])
def test_fault_09_a_giant_leaves_no_trace_in_what_others_are_clipped_to(place: int) -> None:
    """Some honest ones are clipped; the giant does not shift the median that they are clipped to, wherever it stands."""
    rows = [delta * np.float32(1 + 5 * (i % 7 == 0)) for i, delta in enumerate(honest(40))]
    good = [trained(f"d{i:02}", row) for i, row in enumerate(rows)]
    without, clean = result(good)
    good = [trained(f"d{i:02}", row) for i, row in enumerate(rows)]
    after, tally = result([*good[:place], trained("bad", 1e6 * rows[0]), *good[place:]])
    assert tally.statuses["bad"][0] == "quarantined"
    assert clean.clipped == tally.clipped == 6
    assert after.tobytes() == without.tobytes()


def test_fault_09_whatever_one_device_claims_it_moves_the_mean_no_further_than_two_ordinary_ones() -> None:
    """Ten times as long, against the others, and with a billion examples: clipped to 3 medians, it weighs 2/3 of one."""
    row = np.full(SIZE, 0.1, np.float32)
    good = [trained(f"d{i}", row * np.float32(1 + 1e-3 * i)) for i in range(9)]
    tally = Tally()
    passed = list(screen([*good, trained("x", -10 * row, 10**9)], START, LIMITS, tally))
    weights = {reply.metadata.reply_to_message_id: reply.content["metrics"]["num-examples"] for reply in passed}
    assert (tally.clipped, tally.capped) == (1, 1)
    assert weights["x"] == pytest.approx(2 / 3 * 10, rel=1e-2)
    arrays, _ = make_strategy("StreamingFedAvg", {}).aggregate_train(1, passed)
    moved = (arrays[THETA].numpy() - START) / row
    assert moved == pytest.approx((9 - 2) / (9 + 2 / 3), rel=1e-2)  # nine forward, one that counts as two back


def test_fault_06_to_10_are_told_from_uploads_in_the_spool_too(tmp_path: Path) -> None:
    rows = honest(4)
    replies = [spooled(tmp_path, f"d{i}", row) for i, row in enumerate(rows)]
    replies += [
        spooled(tmp_path, "e1", NAN),
        spooled(tmp_path, "e2", np.zeros(SIZE, np.float32)),
        spooled(tmp_path, "e3", 1e6 * rows[0]),
        spooled(tmp_path, "e4", rows[0][:-1]),
        spooled(tmp_path, "e5", rows[0], data=b"\x80\x04K\x01."),  # a pickle
        spooled(tmp_path, "e6", rows[0] + 1e-3, examples=0),
        spooled(tmp_path, "e7", rows[2]),
    ]
    after, tally = result(replies)
    codes = {name: str(why).split(":")[0] for name, (_, why, _) in tally.statuses.items() if why}
    assert codes == {
        "e1": "not_finite",
        "e2": "zero",
        "e3": "norm",
        "e4": "unreadable",
        "e5": "unreadable",
        "e6": "num_examples",
        "e7": "duplicate",
    }
    without, _ = result([spooled(tmp_path, f"d{i}", row) for i, row in enumerate(rows)])
    assert after.tobytes() == without.tobytes()


def test_fault_08_a_boast_counts_as_twice_the_median_and_no_more() -> None:
    deltas = [np.zeros(SIZE, np.float32) + v for v in (2, 2, 2, 1)]
    replies = [trained(f"d{i}", d, n) for i, (d, n) in enumerate(zip(deltas, (10, 10, 10, 10**9), strict=True))]
    after, tally = result(replies)
    assert tally.capped == 1
    assert after - START == pytest.approx((30 * 2 + 20 * 1) / 50)


def test_fault_08_without_any_weight_nothing_is_aggregated() -> None:
    tally = Tally()
    replies = [trained(f"d{i}", d, 0) for i, d in enumerate(honest(3))]
    assert make_strategy("StreamingFedAvg", {}).aggregate_train(1, screen(replies, START, LIMITS, tally)) == (
        None,
        None,
    )
    assert tally.accepted == 0


def test_fault_09_a_long_update_is_clipped_to_three_medians_for_every_strategy() -> None:
    unit = np.zeros(SIZE, np.float32)
    unit[0] = 1.0
    for strategy in ("StreamingFedAvg", "FedAvg"):
        replies = [trained(f"d{i}", unit * np.float32(f)) for i, f in enumerate((1, 1, 1, 20))]
        after, tally = result(replies, strategy)
        assert (tally.clipped, tally.accepted) == (1, 4)
        assert (after - START)[0] == pytest.approx((3 * 10 + 3 * 20 / 3) / (30 + 20 / 3))  # it weighs 20/3


def test_fault_10_the_same_bytes_count_once_in_a_round_and_once_in_the_rounds_remembered() -> None:
    first, second, third = honest(3)
    replies = [trained("d0", first, digest="aa"), trained("d1", second, digest="bb"), trained("d2", first, digest="aa")]
    _, tally = result(replies)
    assert tally.statuses["d2"][:2] == (
        "quarantined", "duplicate: another device of this round has handed in the very same bytes"
    )  # fmt: skip
    replies = [trained("d0", third, digest="cc"), trained("d1", second, digest="bb")]
    _, tally = result(replies, history=History((1.0,), (10,), {"bb": 4}))
    assert str(tally.statuses["d1"][1]) == "repeated: the very same bytes were handed in in round 4"
    assert tally.accepted == 1


def test_earlier_rounds_judge_from_the_first_update_on() -> None:
    """With WARM_UP norms remembered nothing is held back: each reply is passed on before the next one is made."""
    made: list[str] = []

    def one_by_one() -> Iterator[Message]:
        for i, row in enumerate(honest(5)):
            made.append(f"d{i}")
            yield trained(f"d{i}", row)

    known = History((float(np.linalg.norm(honest(1)[0])),) * WARM_UP, (10,) * WARM_UP)
    passed = screen(one_by_one(), START, LIMITS, Tally(), known)
    next(passed)
    assert made == ["d0"]
    tally = Tally()
    list(screen([trained("bad", 1e6 * honest(1)[0])], START, LIMITS, tally, known))
    assert tally.statuses["bad"][0] == "quarantined"


def test_two_devices_of_very_different_norms_are_both_heard() -> None:
    """Of fewer than three nobody can say who is wrong."""
    row = honest(1)[0]
    _, tally = result([trained("a", row), trained("b", 1000 * row)])
    assert (tally.accepted, tally.clipped) == (2, 0)


def test_with_the_factors_at_nought_only_the_form_is_checked() -> None:
    replies = [trained(f"d{i}", row * np.float32(10**i), 10**i) for i, row in enumerate(honest(5))]
    _, tally = result(replies, limits=Limits(SIZE, 10**9))
    assert (tally.accepted, tally.clipped, tally.capped) == (5, 0, 0)


@pytest.mark.parametrize("strategy", list(OURS))
def test_fault_33_arrival_order_and_where_updates_lie_do_not_change_a_bit(tmp_path: Path, strategy: str) -> None:
    """The grid hands replies over by the devices' names; the files may have come in any order."""
    rows = dict(zip(("a", "b", "c", "d", "e", "f"), honest(6), strict=True))
    results = set()
    for order in itertools.islice(itertools.permutations(rows), 0, 720, 97):
        for name in order:
            spooled(tmp_path, name, rows[name])
        replies = [spooled(tmp_path, name, rows[name], 10 + i) for i, name in enumerate(sorted(order))]
        results.add(result(replies, strategy)[0].tobytes())
    assert len(results) == 1


def peak_kb() -> int:
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to measure the peak")
def test_a_thousand_spooled_updates_of_a_megabyte_take_no_more_memory_than_a_few(tmp_path: Path) -> None:
    """1,000 updates of 1 MB: the peak may rise by 150 MB, the updates themselves are 1,000. They share 20 files."""
    size = 250_000
    start = np.zeros(size, np.float32)
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{i}.update" for i in range(20)]
    for path in paths:
        path.write_bytes(encode_vector("delta", rng.standard_normal(size).astype(np.float32)))

    def replies(count: int) -> Iterator[Message]:
        for i in range(count):
            arrays = ArrayRecord()
            arrays[THETA] = DeltaArray(start, Delta(paths[i % 20], size))
            yield reply(f"{i}", {"arrays": arrays, "metrics": MetricRecord({"num-examples": 10})})

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak_kb()
    tally = Tally()
    strategy = make_strategy("StreamingFedAvg", {})
    strategy.aggregate_train(1, screen(replies(1000), start, Limits.of(size, RunConfig()), tally))
    assert tally.accepted == 1000
    assert peak_kb() - before < 150 << 10
