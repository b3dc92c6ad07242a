"""A strategy's state comes back of the same types and bits, and what cannot be kept is refused by name."""

from __future__ import annotations

import numpy as np
import pytest

from pocketfed.coordinator.strategy_state import StateError, capture, decode_state, encode_state, restore

# isort: split
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedAdam, FedAvgM


def test_nested_values_come_back_with_their_types_and_bits() -> None:
    values = {
        "numbers": [1, 2.5, True, None, "text", float("inf")],
        "tuple": (1, (2, 3)),
        "by number": {1: "one", "2": {"deep": np.arange(6, dtype=np.float64).reshape(2, 3).T}},
        "scalar": np.float32(0.1),
        "double": np.float64(0.1),
        "empty": {},
        "flags": np.array([True, False]),
    }
    back = decode_state(encode_state(values))
    assert back["numbers"] == values["numbers"]
    assert [type(v) for v in back["numbers"]] == [int, float, bool, type(None), str, float]
    assert back["tuple"] == (1, (2, 3))
    assert back["by number"][1] == "one"
    assert np.array_equal(back["by number"]["2"]["deep"], [[0, 3], [1, 4], [2, 5]])
    assert (type(back["scalar"]), back["scalar"]) == (np.float32, np.float32(0.1))
    assert (type(back["double"]), back["double"]) == (np.float64, 0.1)
    assert back["empty"] == {}
    assert back["flags"].dtype == bool
    assert encode_state(back) == encode_state(values)


def test_a_random_generator_goes_on_where_it_was() -> None:
    generator = np.random.default_rng(5)
    generator.random(3)
    back = decode_state(encode_state({"rng": generator}))["rng"]
    assert back.random(4).tolist() == generator.random(4).tolist()


def test_flowers_moments_are_captured_apart_and_restored_into_a_new_object() -> None:
    first = FedAdam(eta=0.5)
    first.m_t = {"theta": np.array([1.0, 2.0])}
    kept = capture(first)
    first.m_t["theta"] += 1  # what was captured does not change with it
    second = FedAdam(eta=0.1)
    restore(second, kept)
    assert second.m_t is not None
    assert second.m_t["theta"].tolist() == [1.0, 2.0]
    assert second.eta == 0.5


def test_an_array_record_comes_back_as_one() -> None:
    first, second = FedAvgM(server_momentum=0.5), FedAvgM()
    first.current_arrays = ArrayRecord({"theta": Array(np.array([1.5, 2.5]))})
    first.momentum_vector = [np.array([3.5], np.float32)]
    restore(second, capture(first))
    assert isinstance(second.current_arrays, ArrayRecord)
    assert second.current_arrays["theta"].numpy().tolist() == [1.5, 2.5]
    assert second.momentum_vector is not None
    assert second.momentum_vector[0].dtype == np.float32


class WithDict:
    """A strategy that says itself what is to be kept."""

    def __init__(self) -> None:
        self.open_file, self.seen = object(), 3

    def state_dict(self) -> dict[str, int]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]


def test_a_strategy_may_say_itself_what_to_keep() -> None:
    second = WithDict()
    second.seen = 0
    restore(second, capture(WithDict()))  # type: ignore[arg-type]
    assert second.seen == 3


def test_what_cannot_be_kept_is_named_and_what_is_no_state_refused() -> None:
    with pytest.raises(StateError, match=r"state\.a\.b\[1\] is of type object, which a checkpoint cannot hold"):
        encode_state({"a": {"b": [1, object()]}})
    good = encode_state({"a": np.zeros(3)})
    for bad in (b"", b"x" * 50, good[:-1], good.replace(b"array", b"arroy")):
        with pytest.raises(StateError):
            decode_state(bad)
    with pytest.raises(StateError, match="'os' is no generator of numpy's"):
        decode_state(encode_state({"rng": np.random.default_rng(0)}).replace(b'\\"PCG64\\"', b'\\"os\\"   '))
