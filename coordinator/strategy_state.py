"""What a strategy has learned beside the parameters, as bytes and back: JSON and safetensors, never pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from pocketfed.coordinator import flwr_compat  # noqa: F401 - first: it silences flwr before flwr is imported

# isort: split
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import Strategy

KEY = "pocketfed"  # of the safetensors header that holds the JSON
GENERATORS = ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")


class StateError(RuntimeError):
    """A state that cannot be kept, or bytes that are none."""


def encode_state(state: Mapping[str, Any]) -> bytes:
    """Nested numbers, texts, arrays, lists, mappings and random generators; the same state gives the same bytes.

    Raises:
        StateError: something else is in it.
    """
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    document = _pack(dict(state), arrays, "state")
    return bytes(save(arrays, {KEY: json.dumps(document)}))


def decode_state(data: bytes) -> dict[str, Any]:
    """What `encode_state` was given, of the same types and bits.

    Raises:
        StateError: the bytes are not such a state.
    """
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        found = _unpack(json.loads(header["__metadata__"][KEY]), load(data))
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise StateError(f"{len(data)} bytes are not a checkpoint: {error}; restore an older database") from None
    return dict(found)


def capture(strategy: Strategy) -> dict[str, Any]:
    """What a strategy says of itself by `state_dict()`, else its attributes, but the functions that it was made with.

    Raises:
        StateError: the strategy holds something that cannot be kept, so that its run could not be resumed.
    """
    told = getattr(strategy, "state_dict", None)
    held = told() if told else {name: value for name, value in vars(strategy).items() if not callable(value)}
    return decode_state(encode_state(held)) if held else {}


def restore(strategy: Strategy, state: Mapping[str, Any]) -> None:
    """Make a strategy what `capture` saw."""
    copied = decode_state(encode_state(state))
    if hasattr(strategy, "load_state_dict"):
        strategy.load_state_dict(copied)
        return
    for name, value in copied.items():
        setattr(strategy, name, value)


def _pack(value: Any, arrays: dict[str, np.ndarray[Any, Any]], place: str) -> Any:
    """JSON for a value; its arrays go into `arrays`. Whatever JSON has no type for is a mapping with one key, its kind."""
    if isinstance(value, np.ndarray | np.generic):  # before float: numpy's float64 is one
        name = str(len(arrays))
        arrays[name] = np.array(value, order="C")
        return {"array" if isinstance(value, np.ndarray) else "scalar": name}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, ArrayRecord):
        return {"record": [[k, _pack(a.numpy(), arrays, place)] for k, a in value.items()]}
    if isinstance(value, Mapping):
        pairs = [
            [_pack(k, arrays, place), _pack(v, arrays, f"{place}.{k}")] for k, v in value.items() if not callable(v)
        ]
        return {"mapping": pairs}
    if isinstance(value, list | tuple):
        packed = [_pack(v, arrays, f"{place}[{i}]") for i, v in enumerate(value)]
        return packed if isinstance(value, list) else {"tuple": packed}
    if isinstance(value, np.random.Generator):
        return {"generator": _pack(value.bit_generator.state, arrays, place)}
    raise StateError(
        f"{place} is of type {type(value).__name__}, which a checkpoint cannot hold; "
        "keep numbers, texts, numpy arrays, lists and mappings of them"
    )


def _unpack(packed: Any, arrays: Mapping[str, np.ndarray[Any, Any]]) -> Any:
    if isinstance(packed, list):
        return [_unpack(item, arrays) for item in packed]
    if not isinstance(packed, dict):
        return packed
    ((kind, inside),) = packed.items()
    if kind == "array":
        return arrays[inside].copy()
    if kind == "scalar":
        return arrays[inside][()]
    if kind == "record":
        return ArrayRecord({k: Array(_unpack(a, arrays)) for k, a in inside})
    if kind == "mapping":
        return {_unpack(k, arrays): _unpack(v, arrays) for k, v in inside}
    if kind == "tuple":
        return tuple(_unpack(item, arrays) for item in inside)
    if kind == "generator":
        state = _unpack(inside, arrays)
        if state["bit_generator"] not in GENERATORS:
            raise StateError(f"{state['bit_generator']!r} is no generator of numpy's; restore an older database")
        generator = np.random.Generator(getattr(np.random, state["bit_generator"])())
        generator.bit_generator.state = state
        return generator
    raise StateError(f"a checkpoint has no {kind!r}; upgrade pocketfed, or restore an older database")
